"""The report says that a runtime is exact, or which operator is the first that is not."""

import dataclasses

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers as L

import kqat
import tflite_export
from tests.tflite_export.small_models import quantized
from tflite_export import flatbuffer
from tflite_export.runtimes.execution import run
from tflite_export.runtimes.feeds import as_type
from tflite_export.verification.exactness import exactness
from tflite_export.verification.report import Exactness


@pytest.fixture(scope="module")
def shipped() -> tuple[keras.Model, bytes, np.ndarray]:
    keras.utils.set_random_seed(0)
    qat, x = quantized((12,), lambda x: L.Dense(4, name="head")(L.LeakyReLU(name="leaky")(x)))
    # For LiteRT alone, as only then its two ways to round LEAKY_RELU are in the file.
    return qat, tflite_export.convert(qat, target="litert"), x


def test_a_right_file_is_exact(shipped: tuple[keras.Model, bytes, np.ndarray]) -> None:
    report = tflite_export.verify(*shipped)
    for part in report.runtimes:
        assert part.exact is not None and part.exact.is_exact
        assert part.exact.elements == report.samples * (12 + 4)
    assert "exact: all 256 integers" in " ".join(str(report).split()) or report.samples != 16


def test_the_first_operator_that_differs_is_named(
    shipped: tuple[keras.Model, bytes, np.ndarray],
) -> None:
    _, blob, x = shipped
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    feed = as_type(x, graph.tensors[int(graph.inputs[0])])
    computed = run(blob, [feed], runtime="litert", tensors="all").tensors
    # Two integers of the first operator, which reach the second one as they are.
    middle = int(graph.operators[0].outputs[0])
    changed = computed[middle].copy()
    changed.flat[:2] ^= 1
    found = exactness(model, computed | {middle: changed}, "litert")
    assert found.first.startswith("LEAKY_RELU") and "(2)" in found.first
    assert not found.is_exact and found.differing >= 2
    assert "not exact" in str(found) and found.first in str(found)
    # The wrong runtime's rounding shows too.
    assert exactness(model, computed, "litert_reference").differing > 0


@pytest.mark.parametrize("shape", [[0, 12], [2, 12], []])
def test_a_damaged_shape_is_told(
    shipped: tuple[keras.Model, bytes, np.ndarray], shape: list[int]
) -> None:
    """The runtime finds the shapes anew and runs; the other operators are still compared."""
    qat, blob, x = shipped
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    graph.tensors[int(graph.operators[0].outputs[0])].shape = shape
    part = tflite_export.verify(qat, flatbuffer.write(model), x, runtimes=["litert_reference"])
    found = part.on("litert_reference").exact
    assert found is not None and not found.is_exact and not found.differing
    assert any(words.startswith("'leaky', whose shape") for words in found.unknown)


def test_what_was_not_compared_is_said() -> None:
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")
    model = keras.Sequential([keras.Input((8,)), L.Dense(4), L.Dense(3, name="odd")])
    qat = kqat.quantize_model(model, {"odd": None}, calibration_data=x)
    blob = tflite_export.convert(qat, inference_output_type="float32")
    part = tflite_export.verify(qat, blob, x, runtimes=["litert"]).on("litert")
    assert part.exact is not None and not part.exact.is_exact
    assert any("FULLY_CONNECTED" in words for words in part.exact.unknown)
    assert str(part.exact).startswith("exact, but for")
    assert dataclasses.replace(part.exact, unknown=()).is_exact
    assert str(Exactness(elements=1000, differing=0)) == (
        "exact: all 1,000 integers are those of the kernels"
    )


@pytest.mark.parametrize("kind", [schema.TensorType.STRING, schema.TensorType.BOOL])
def test_a_damaged_type_is_told(shipped: tuple[keras.Model, bytes, np.ndarray], kind: int) -> None:
    """Runtimes may set the types of values anew; our own arithmetic never raises of it."""
    _, blob, x = shipped
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    feed = as_type(x, graph.tensors[int(graph.inputs[0])])
    computed = run(blob, [feed], runtime="litert_reference", tensors="all").tensors
    graph.tensors[int(graph.operators[0].outputs[0])].type = kind
    found = exactness(model, computed, "litert_reference")
    assert not found.is_exact and not found.differing
    assert "LEAKY_RELU of 'leaky'" in found.unknown
