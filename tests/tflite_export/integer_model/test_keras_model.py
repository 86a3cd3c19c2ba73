"""The Keras model of a file gives the file's integers, whatever the batch, on each runtime."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from kqat.base.errors import ExportError
from tests.tflite_export.small_models import quantized
from tflite_export import flatbuffer
from tflite_export.integer_model.execution import execute
from tflite_export.integer_model.keras_model import integer_model
from tflite_export.integer_model.program import read_program
from tflite_export.runtimes.execution import run
from tflite_export.runtimes.feeds import as_type, real
from tflite_export.verification.verifier import DEFAULT_RUNTIMES


def call(x: Any) -> Any:
    x = L.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="conv")(x)
    y = L.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = L.LeakyReLU(0.2)(L.Add(name="sum")([x, y]))
    return L.Dense(5, "softmax", name="head")(L.GlobalAveragePooling2D()(x))


@pytest.fixture(scope="module")
def shipped() -> tuple[keras.Model, bytes, np.ndarray]:
    keras.utils.set_random_seed(0)
    qat, x = quantized((8, 8, 3), call)
    # For LiteRT alone, as only then its two ways to round LEAKY_RELU are in the file.
    return qat, tflite_export.convert(qat, target="litert"), x


def tensors(blob: bytes) -> tuple[Any, Any]:
    graph = flatbuffer.read(blob).subgraphs[0]
    return graph.tensors[int(graph.inputs[0])], graph.tensors[int(graph.outputs[0])]


@pytest.mark.parametrize("runtime", DEFAULT_RUNTIMES)
def test_every_integer_is_the_runtimes(
    shipped: tuple[keras.Model, bytes, np.ndarray], runtime: str
) -> None:
    _, blob, x = shipped
    given, result = tensors(blob)
    found = run(blob, [as_type(x, given)], runtime=runtime).outputs[0]
    model = integer_model(blob, runtime, outputs="integers")
    for batch_size in (1, 7):
        integers = model.predict(x, batch_size=batch_size, verbose=0)
        np.testing.assert_array_equal(integers, found)
    floats = integer_model(blob, runtime).predict(x, verbose=0)
    np.testing.assert_array_equal(floats, real(found, result))
    fed = integer_model(blob, runtime, inputs="integers", outputs="integers")
    np.testing.assert_array_equal(fed.predict(as_type(x, given).astype("int32"), verbose=0), found)
    # The oracle in NumPy goes the same way.
    program = read_program(flatbuffer.read(blob))
    values = execute(program, [as_type(x, given)[:, np.newaxis]], runtime)
    np.testing.assert_array_equal(values[program.outputs[0].index][:, 0], found)


def test_one_layer_per_operator_and_nothing_to_train(
    shipped: tuple[keras.Model, bytes, np.ndarray],
) -> None:
    _, blob, _ = shipped
    model = integer_model(blob)
    operators = [operator.name.lower() for operator in tflite_export.inspect(blob).operators]
    names = [layer.name.rsplit("_", 1)[0] for layer in model.layers]
    assert [name for name in names if name in operators] == operators
    assert model.trainable_weights == []
    # Two convolutions, the head, and the scale of the input.
    assert len(model.non_trainable_weights) == 4


def test_a_users_name_may_be_that_of_a_layer_inside() -> None:
    """Keras calls the second sum of a process `add_1`, which may be the second operator."""
    x = keras.Input((4,), name="entry_0")
    model = keras.Model(x, L.Add(name="add_1")([x, L.Dense(4)(x)]))
    data = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=data)
    device = integer_model(tflite_export.convert(qat))
    assert device.output_names == ["add_1"] and device.inputs[0].name == "entry_0"
    np.testing.assert_array_equal(device(data), qat(data))


def test_it_computes_in_float32_whatever_the_process_trains_in(
    shipped: tuple[keras.Model, bytes, np.ndarray],
) -> None:
    _, blob, x = shipped
    expected = integer_model(blob)(x)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        found = integer_model(blob)(x)
    finally:
        keras.config.set_dtype_policy(before)
    np.testing.assert_array_equal(found, expected)


def test_roundings_of_runtimes_are_told_apart(
    shipped: tuple[keras.Model, bytes, np.ndarray],
) -> None:
    """Otherwise the tests above would pass with any of them."""
    _, blob, _ = shipped
    program = read_program(flatbuffer.read(blob))
    feed = np.random.default_rng(0).integers(-128, 128, (64, 1, 8, 8, 3)).astype(np.int8)
    once, twice = (execute(program, [feed], r) for r in ("litert", "litert_reference"))
    for name in ("CONV_2D", "DEPTHWISE_CONV_2D", "LEAKY_RELU", "MEAN"):
        step = next(step for step in program.steps if step.name == name)
        assert np.any(once[step.result.index] != twice[step.result.index]), name


def test_what_it_cannot_follow_is_refused_by_name(
    shipped: tuple[keras.Model, bytes, np.ndarray],
) -> None:
    qat, blob, _ = shipped
    with pytest.raises(ExportError, match=r"a runtime of .*'tflm'"):
        integer_model(blob, "tflm")
    with pytest.raises(ExportError, match="outputs='int8'"):
        integer_model(blob, outputs="int8")
    with pytest.raises(ExportError, match=r"one sample.*batch_size=1"):
        integer_model(tflite_export.convert(qat, batch_size=2))
    keras.utils.set_random_seed(0)
    floating = kqat.quantize_model(
        keras.Sequential([keras.Input((8,)), L.Dense(4), L.Dense(3, name="odd")]),
        {"odd": None},
        calibration_data=np.random.default_rng(0).normal(size=(16, 8)).astype("float32"),
    )
    blob = tflite_export.convert(floating, inference_output_type="float32")
    with pytest.raises(ExportError, match="FULLY_CONNECTED of floats"):
        integer_model(blob)


def test_inputs_are_rounded_as_they_are_for_the_runtime(
    shipped: tuple[keras.Model, bytes, np.ndarray],
) -> None:
    """In a compiled graph too: TensorFlow divides by what it knows by multiplying."""
    _, blob, _ = shipped
    given, _ = tensors(blob)
    scale = np.float32(given.quantization.scale[0])
    # Halfway between two integers, and a bit to either side.
    ties = (np.arange(-100, 92, dtype=np.float32).reshape(1, 8, 8, 3) + np.float32(0.5)) * scale
    x = np.concatenate([ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, -ties * 9)])
    x = np.concatenate([x * np.float32(1 + k * 2.0**-22) for k in range(20)])
    expected = run(blob, [as_type(x, given)], runtime="litert", tensors="all").tensors
    model = integer_model(blob)
    entry = keras.Model(model.inputs, model.get_layer("entry_0").output)
    integers = entry.predict(x, verbose=0).reshape(x.shape)
    graph = flatbuffer.read(blob).subgraphs[0]
    np.testing.assert_array_equal(integers, expected[int(graph.inputs[0])].reshape(x.shape))


@pytest.mark.parametrize("shape", [[], [1, 3, 5], [1, 2**30, 2], [1, 1, 1, 1, 1, 1]])
def test_tensors_that_do_not_fit_are_told(
    shipped: tuple[keras.Model, bytes, np.ndarray], shape: list[int]
) -> None:
    """Of a damaged file; whatever the arithmetic raises of it, the error names the operator."""
    model = flatbuffer.read(shipped[1])
    graph = model.subgraphs[0]
    graph.tensors[int(graph.operators[0].outputs[0])].shape = shape
    with pytest.raises(ExportError, match=r"CONV_2D to fit one another"):
        integer_model(flatbuffer.write(model))


def test_a_window_beyond_its_image_is_told_at_once() -> None:
    model = keras.Sequential([keras.Input((8, 8, 2)), L.AveragePooling2D(2)])
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 2)).astype("float32")
    blob = tflite_export.convert(kqat.quantize_model(model, calibration_data=x))
    tree = flatbuffer.read(blob)
    tree.subgraphs[0].operators[0].builtinOptions.filterWidth = 58626
    with pytest.raises(ExportError, match="a window of 58626 places over 8"):
        integer_model(flatbuffer.write(tree))


def test_what_shows_only_when_it_runs_is_told_before(
    shipped: tuple[keras.Model, bytes, np.ndarray],
) -> None:
    model = flatbuffer.read(shipped[1])
    options = model.subgraphs[0].operators[0].builtinOptions
    options.strideH = options.strideW = 10**6
    with pytest.raises(ExportError, match="to fit one another"):
        integer_model(flatbuffer.write(model))
    model = flatbuffer.read(shipped[1])
    model.subgraphs[0].outputs = np.array([], np.int32)
    with pytest.raises(ExportError, match="0 outputs"):
        integer_model(flatbuffer.write(model))
