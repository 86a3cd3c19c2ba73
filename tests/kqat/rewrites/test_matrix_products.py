"""Products of tensors and weights: what ships is one operator that reads the weight."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from kqat.rewrites.layers import matrix_products

_IMAGES = np.random.default_rng(0).normal(size=(32, 2, 6, 4)).astype(np.float32)


class _Product(layers.Layer):
    """A weight of `shape`, and what `how` computes of a tensor and it."""

    def __init__(self, shape: tuple[int, ...], how: Any) -> None:
        super().__init__()
        self.shape, self.how = shape, how

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(name="w", shape=self.shape, initializer="random_normal")

    def call(self, x: Any) -> Any:
        return self.how(x, self.w)


def test_weights_per_head_are_operands_of_one_operator() -> None:
    """Each was computed, as zero plus the weight: three operators more for every product."""
    x = keras.Input((2, 6, 4))
    heads = _Product((2, 5, 4), lambda x, w: ops.einsum("bhqd,hkd->bhqk", x, w))(x)
    right = _Product((2, 5, 3), ops.matmul)(heads)
    left = _Product((1, 2, 5, 6), lambda x, w: ops.matmul(w, x))(right)
    model = keras.Model(x, left)
    qat = kqat.quantize_model(model, calibration_data=_IMAGES)
    blob = tflite_export.convert(qat)
    assert [o.name for o in tflite_export.inspect(blob).operators] == ["BATCH_MATMUL"] * 3
    report = tflite_export.verify(qat, blob, _IMAGES, samples=8)
    assert all(part.is_right and not part.unmatched for part in report.runtimes)
    expected, found = np.asarray(model(_IMAGES)), np.asarray(qat(_IMAGES))
    noise = np.mean(np.square(expected - found)) / np.mean(np.square(expected))
    assert noise < 10**-3


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((5, 6), lambda x, w: ops.matmul(w, x)),
        ((2, 4, 3), ops.matmul),
        ((2, 3, 5), lambda x, w: ops.einsum("bhqd,hrk->bqdr", x, w)),
        ((4, 2, 6), lambda x, w: ops.einsum("bhqd,dhq->bhq", x, w)),
    ],
)
def test_weights_of_any_rank_are_trained(shape: tuple[int, ...], how: Any) -> None:
    x = keras.Input((2, 6, 4))
    qat = kqat.quantize_model(keras.Model(x, _Product(shape, how)(x)), calibration_data=_IMAGES)
    qat.compile("sgd", "mse")
    (weight,) = qat.trainable_weights
    before = weight.numpy()
    qat.train_on_batch(_IMAGES, np.zeros(qat.compute_output_shape(_IMAGES.shape), np.float32))
    assert np.any(weight.numpy() != before)


@pytest.mark.parametrize(
    ("inputs", "shape", "how"),
    [
        ((1, 6, 4), (3, 5, 6), lambda x, w: ops.matmul(w, x)),
        ((2, 1, 6, 4), (1, 2, 3, 4, 5), ops.matmul),  # capsules: a matrix for each pair
    ],
)
def test_a_weight_that_repeats_the_tensor_ships(inputs: Any, shape: Any, how: Any) -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input(inputs)
    model = keras.Model(x, _Product(shape, how)(x))
    data = np.random.default_rng(0).normal(size=(32, *inputs)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=data)
    expected, found = np.asarray(model(data)), np.asarray(qat(data))
    assert np.mean(np.square(expected - found)) < 10**-3 * np.mean(np.square(expected))


def test_a_weight_with_more_axes_than_the_tensor_is_named() -> None:
    weight = np.ones((2, 1, 5, 6), np.float32)
    with pytest.raises(kqat.UnsupportedLayerError, match=r"shape \(2, 1, 5, 6\).*Reshape"):
        matrix_products.with_weight(keras.Input((6, 4)), weight, "product", weight_first=True)
