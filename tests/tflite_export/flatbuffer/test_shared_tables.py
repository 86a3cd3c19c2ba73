"""What is equal is written once; what is read back is the same."""

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers

import kqat
import tflite_export
from tests.tflite_export.small_models import constants
from tflite_export import flatbuffer
from tflite_export.kernels.weight_layout import quantization


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


def test_constants_are_one_where_type_shape_bytes_and_grid_are_equal() -> None:
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.buffers, model.operatorCodes, model.subgraphs = [schema.BufferT()], [], [graph]
    graph.tensors = []
    data, int8 = np.arange(4, dtype=np.int8), schema.TensorType.INT8
    kinds = [
        (int8, [2, 2], quantization([0.5, 0.5], [0, 0], 0)),
        (int8, [2, 2], quantization([0.5, 0.5], [0, 0], 0)),  # the only equal one
        (int8, [2, 2], quantization([0.5, 0.5], [0, 0], 1)),
        (int8, [2, 2], quantization([0.5, 0.25], [0, 0], 0)),
        (int8, [2, 2], quantization([0.5, 0.5], [0, 1], 0)),
        (int8, [4], quantization([0.5, 0.5], [0, 0], 0)),
        (schema.TensorType.UINT8, [2, 2], quantization([0.5, 0.5], [0, 0], 0)),
        (int8, [2, 2], None),
    ]
    inputs = [
        flatbuffer.add_tensor(model, shape, kind, grid=grid, data=data)
        for kind, shape, grid in kinds
    ]
    graph.operators = [flatbuffer.new_operator(model, "CONCATENATION", inputs, [])]
    flatbuffer.share_constants(model)
    assert graph.operators[0].inputs == [0, 0, 2, 3, 4, 5, 6, 7]


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
