"""What is equal is written once; what is read back is the same."""

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from tests.tflite_export.small_models import constants
from tflite_export import flatbuffer


@pytest.fixture(scope="module")
def wide() -> bytes:
    x = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    chain = [layers.Dense(200, bias_initializer="ones", name="wide")]
    model = keras.Sequential([keras.Input((8,)), *chain])
    return tflite_export.convert(kqat.quantize_model(model, calibration_data=x))


def test_equal_vectors_are_written_once_and_read_back_alike(wide: bytes) -> None:
    channels = 200
    graph = flatbuffer.read(wide).subgraphs[0]
    per_channel = [
        t.quantization
        for t in graph.tensors
        if t.quantization is not None and len(t.quantization.scale) == channels
    ]
    assert len(per_channel) == 2  # weights and bias
    for params in per_channel:
        np.testing.assert_array_equal(params.zeroPoint, np.zeros(channels))
    # Two vectors of scales, one of zero points, the integers; the rest is names and tables.
    payload = channels * (2 * 4 + 8 + 8 + 4)
    assert payload < len(wide) < payload + channels * 8


def test_weights_are_named_by_layer_and_variable_and_biases_by_their_operator(wide: bytes) -> None:
    names = [flatbuffer.tensor_name(t) for t, _ in constants(flatbuffer.read(wide), 0)]
    assert names == ["wide/kernel", ""]


@pytest.mark.slow
def test_more_operators_of_a_kind_cost_no_more_options() -> None:
    """Equal strings, vectors and tables are shared, and what differs is kept apart."""

    def blob(strides: tuple[int, ...]) -> bytes:
        x = image = keras.Input((16, 16, 2), name="image")
        for index, stride in enumerate(strides):
            x = layers.MaxPooling2D(2, strides=stride, padding="same", name=f"p{index}")(x)
        data = np.random.default_rng(0).normal(size=(8, 16, 16, 2))
        model = keras.Model(image, x)
        return tflite_export.convert(kqat.quantize_model(model, calibration_data=data))

    for strides in ((1, 1, 1, 1), (1, 2, 1, 2)):
        operators = flatbuffer.read(blob(strides)).subgraphs[0].operators
        assert tuple(op.builtinOptions.strideH for op in operators) == strides
    # A third and a fourth of the same kind: an operator, a tensor and its name each.
    assert len(blob((1, 1, 1, 1))) - len(blob((1, 1))) < 2 * 160
