"""What reduces one value, or moves none, computes nothing: no operator is left of it."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from tests.tflite_export.small_models import operators
from tflite_export import flatbuffer


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        ((4, 1, 6), lambda x: ops.sum(x, axis=2)),
        ((4, 1, 6), lambda x: ops.mean(x, axis=-2, keepdims=True)),
        ((4, 1, 6), lambda x: ops.max(x, axis=2)),
        ((4, 1, 6), lambda x: ops.prod(x, axis=2)),
        ((1, 1, 6), lambda x: ops.mean(x, axis=(1, 2))),
        ((1, 1, 6), L.GlobalAveragePooling2D(keepdims=True)),
        ((1, 6), L.GlobalMaxPooling1D()),
        ((6, 1, 1), L.GlobalAveragePooling2D(data_format="channels_first")),
        ((4, 4, 6), L.MaxPooling2D(1)),
        ((4, 6), L.AveragePooling1D(1, 1, padding="same")),
        ((4, 4, 6), L.ZeroPadding2D(0)),
        ((4, 6), L.Cropping1D(0)),
        ((4, 4, 6), L.UpSampling2D(1)),
        ((4, 4, 6), L.Resizing(4, 4)),
        ((4, 4, 6), lambda x: ops.image.resize(x, (4, 4))),
    ],
)
def test_it_is_the_value(shape: tuple[int, ...], call: Callable[[Any], Any]) -> None:
    inputs = keras.Input(shape)
    model = keras.Model(inputs, L.ReLU()(call(inputs)))
    x = np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)
    assert {op for layer in kqat.plan(model).layers for op in layer.ops} <= {"RESHAPE", "RELU"}
    qat = kqat.quantize_model(model, calibration_data=x)
    wanted = np.maximum(np.reshape(x, model(x).shape), 0.0)
    assert np.array_equal(model(x), wanted)
    # Half a step of the input and half a step of the output.
    bound = 0.501 * (np.ptp(x) + np.ptp(wanted)) / 255
    assert np.max(np.abs(qat.predict(x, verbose=0) - wanted)) <= bound


@pytest.mark.parametrize(
    ("call", "op"),
    [
        (L.MaxPooling2D(1, strides=2), "MAX_POOL_2D"),
        (L.AveragePooling2D(3, strides=1, padding="same"), "AVERAGE_POOL_2D"),
        (L.Cropping2D(((1, 0), (0, 1))), "STRIDED_SLICE"),
    ],
)
def test_what_moves_values_stays(call: Callable[[Any], Any], op: str) -> None:
    inputs = keras.Input((4, 4, 6))
    plan = kqat.plan(keras.Model(inputs, call(inputs)))
    assert [found for layer in plan.layers for found in layer.ops] == [op]


def test_a_layer_of_several_shapes_moves_nothing_in_one_call() -> None:
    """As one Resizing of a decoder, called on each level, of which one has the size already."""
    large, small = keras.Input((4, 4, 6), name="large"), keras.Input((2, 2, 6), name="small")
    one = keras.Input((1, 1, 6), name="one")
    resize, pool = L.Resizing(4, 4, interpolation="nearest"), L.GlobalAveragePooling2D()
    levels = L.Concatenate()([resize(large), resize(small), resize(one)])
    model = keras.Model([large, small, one], [levels, pool(one) + pool(large)])
    found = [op for layer in kqat.plan(model).layers for op in layer.ops]
    assert found.count("RESIZE_NEAREST_NEIGHBOR") == 2 and found.count("MEAN") == 1
    rng = np.random.default_rng(0)
    data = [rng.normal(size=(32, *x.shape[1:])).astype(np.float32) for x in model.inputs]
    qat = kqat.quantize_model(model, calibration_data=data)
    for part in tflite_export.verify(qat, tflite_export.convert(qat), data, samples=4).runtimes:
        assert part.is_right and part.unmatched == ()


def test_linear_attention_of_one_context_is_compared_whole() -> None:
    """MobileViT v2: an `einsum` sums the one context of all steps; its mean was not compared."""
    inputs = keras.Input((4, 4, 6))
    x = L.Dense(6)(inputs)
    context = ops.sum(x * ops.softmax(x[..., :1], axis=-2), axis=-2, keepdims=True)
    y = ops.einsum("...sd,...td->...sd", ops.relu(x), context)
    model = keras.Model(inputs, L.Dense(3)(y))
    data = np.random.default_rng(0).normal(size=(32, 4, 4, 6)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=data)
    blob = tflite_export.convert(qat)
    assert operators(flatbuffer.read(blob)).count("MEAN") == 1
    for part in tflite_export.verify(qat, blob, data, samples=4).runtimes:
        assert part.is_right and part.unmatched == ()
