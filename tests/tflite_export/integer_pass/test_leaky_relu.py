"""LeakyReLU for TFLite Micro: a PRELU, which rounds as the QAT model does."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from tests.tflite_export.small_models import operators, quantized
from tflite_export import flatbuffer
from tflite_export.runtimes.execution import RUNTIMES, run
from tflite_export.runtimes.feeds import as_type


def leaky(slope: float) -> Any:
    return lambda x: keras.ops.leaky_relu(x, slope)


def shipped(qat: keras.Model, **options: Any) -> list[str]:
    return operators(flatbuffer.read(tflite_export.convert(qat, **options)))


@pytest.mark.parametrize("slope", [0.2, 1.7, 1e-4])
def test_no_runtime_is_a_step_off(slope: float) -> None:
    """LEAKY_RELU of 0.2 is, at 17 % of these values on reference kernels."""
    keras.utils.set_random_seed(0)
    qat, x = quantized((64,), leaky(slope))
    blob = tflite_export.convert(qat)
    model = flatbuffer.read(blob)
    assert operators(model) == ["PRELU"]
    graph = model.subgraphs[0]
    given, result = graph.tensors[int(graph.inputs[0])], graph.tensors[int(graph.outputs[0])]
    scale, zero = result.quantization.scale[0], result.quantization.zeroPoint[0]
    want = np.rint(qat.predict(x, verbose=0) / scale) + zero
    for runtime in RUNTIMES:
        off = want - run(blob, [as_type(x, given)], runtime=runtime).outputs[0]
        assert np.abs(off).max() <= 1, runtime
        # What is left are ties.
        assert np.mean(off != 0) < 0.01, runtime


def test_a_negative_slope_ships_as_a_table() -> None:
    """`keras.ops.leaky_relu` takes one, which the layer refuses."""
    keras.utils.set_random_seed(0)
    qat, x = quantized((64,), leaky(-0.4))
    blob = tflite_export.convert(qat)
    assert operators(flatbuffer.read(blob)) == ["CAST", "ADD", "GATHER"]
    report = tflite_export.verify(qat, blob, x)
    assert all(site.max_steps == 0 for part in report.runtimes for site in part.sites)


def test_where_it_stays_leaky_relu() -> None:
    """LiteRT alone has the faster kernel; PRELU has no int16 kernel and takes four axes."""
    keras.utils.set_random_seed(0)
    qat, _ = quantized((8,), leaky(0.2))
    assert shipped(qat, target="tflite_micro") == ["PRELU"]
    assert shipped(qat, target="litert") == ["LEAKY_RELU"]
    wide, _ = quantized((8,), leaky(0.2), "int16x8")
    assert shipped(wide) == ["LEAKY_RELU"]
    deep, _ = quantized((2, 2, 2, 3), leaky(0.2))
    assert shipped(deep) == ["LEAKY_RELU"]


@pytest.mark.parametrize(
    ("shape", "policy", "ops"),
    [
        ((8,), "int8", ("LEAKY_RELU", "PRELU")),
        ((8,), "int16x8", ("LEAKY_RELU",)),
        ((2, 2, 2, 3), "int8", ("LEAKY_RELU",)),
    ],
)
def test_the_plan_says_which(shape: tuple[int, ...], policy: str, ops: tuple[str, ...]) -> None:
    model = keras.Sequential([keras.Input(shape), L.LeakyReLU(0.2, name="leaky")])
    plan = kqat.plan(model, policy, target="tflite_micro")
    (layer,) = (layer for layer in plan.layers if layer.name == "leaky")
    assert layer.ops == ops
    assert plan.misfits == ()
