"""What is read from a file's bytes alone: counts that can be done by hand."""

import keras
import numpy as np
import pytest
from keras import layers as L

import tflite_export
from kqat.base.errors import ExportError
from tests.tflite_export.small_models import quantized
from tflite_export import flatbuffer


@pytest.mark.parametrize(
    ("shape", "layer", "operator", "macs", "constants"),
    [
        # Outputs × products per output; weights, then a bias of int32.
        ((8, 8, 3), L.Conv2D(4, 3), "CONV_2D", 6 * 6 * 4 * 27, 4 * 27 + 16),
        ((8, 8, 3), L.DepthwiseConv2D(3), "DEPTHWISE_CONV_2D", 6 * 6 * 3 * 9, 27 + 12),
        ((5,), L.Dense(7), "FULLY_CONNECTED", 35, 35 + 28),
    ],
    ids=["conv", "depthwise", "dense"],
)
def test_work_and_bytes_are_counted(
    shape: tuple[int, ...], layer: L.Layer, operator: str, macs: int, constants: int
) -> None:
    qat, _ = quantized(shape, layer)
    found = tflite_export.inspect(tflite_export.convert(qat))
    (row,) = [o for o in found.operators if o.name == operator]
    assert (row.macs, row.constant_bytes, row.weight_dtype) == (macs, constants, "int8")
    assert (found.macs, found.float_operators) == (macs, 0)
    assert row.outputs[0].dtype == "int8" and row.outputs[0].channels == 1


def test_a_transposed_convolution_multiplies_per_input() -> None:
    qat, _ = quantized((4, 4, 2), L.Conv2DTranspose(3, 2, strides=2))
    found = tflite_export.inspect(tflite_export.convert(qat))
    assert found.macs == 4 * 4 * 2 * 2 * 2 * 3


def test_products_of_two_tensors_count_too() -> None:
    a, b = keras.Input((4, 6), name="a"), keras.Input((6, 5), name="b")
    from kqat.parts.single_op_layers import Matmul

    model = keras.Model([a, b], Matmul(name="product")([a, b]))
    import kqat

    x = [np.ones((8, 4, 6), "f"), np.ones((8, 6, 5), "f")]
    found = tflite_export.inspect(
        tflite_export.convert(kqat.quantize_model(model, calibration_data=x))
    )
    assert found.macs == 4 * 5 * 6


def test_ends_and_floats_are_told() -> None:
    qat, _ = quantized((4,), L.Dense(2))
    found = tflite_export.inspect(tflite_export.convert(qat, inference_output_type="float32"))
    assert [t.dtype for t in (*found.inputs, *found.outputs)] == ["int8", "float32"]
    assert (found.float_operators, found.description) == (1, "kqat")
    assert found.counts() == {"DEQUANTIZE": 1, "FULLY_CONNECTED": 1}
    assert found.outputs[0].scale is None and found.inputs[0].scale is not None


def test_odd_shapes_count_as_no_work() -> None:
    qat, _ = quantized((4,), L.Dense(2))
    model = flatbuffer.read(tflite_export.convert(qat))
    for tensor in model.subgraphs[0].tensors:
        tensor.shape = np.asarray([], np.int32)
    assert tflite_export.inspect(flatbuffer.write(model)).macs == 0
    with pytest.raises(ExportError, match="Expected a TFLite file"):
        tflite_export.inspect(b"nothing of the kind")
