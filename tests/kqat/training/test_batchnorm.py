"""The fused BatchNormalization trains as Keras's own does."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from kqat.training import batchnorm

# Sums over 500 numbers in another order: some roundings of float32, relative to the largest.
ROUNDINGS = 2e-5


def built(**options: Any) -> keras.layers.BatchNormalization:
    norm = keras.layers.BatchNormalization(**options)
    norm.build((None, 3, 5, 5) if norm.axis == 1 else (None, 5, 5, 3))
    generator = np.random.default_rng(1)
    norm.set_weights([generator.uniform(0.5, 2.0, w.shape) for w in norm.get_weights()])
    return norm


def images() -> np.ndarray:
    return np.random.default_rng(0).normal(2.0, 3.0, (20, 5, 5, 3)).astype(np.float32)


def step(call: Any, norm: Any, x: np.ndarray) -> list[np.ndarray]:
    """Output, gradients by input and weights, and the moving statistics after it."""
    weight = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    variable = tf.Variable(x)
    with tf.GradientTape() as tape:
        y = call(tf.convert_to_tensor(variable))
        loss = tf.reduce_sum(y * y * weight)
    sources = [variable, *(w.value for w in norm.trainable_weights)]
    return [np.asarray(v) for v in (y, *tape.gradient(loss, sources), *norm.get_weights())]


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"momentum": 0.6}])
def test_trains_as_keras_does(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, ours, theirs = images(), built(**options), built(**options)
    monkeypatch.setattr(type(ours), "call", None)  # the fused kernel alone may be at work
    got = step(lambda value: batchnorm.normalize(ours, value, True), ours, x)
    monkeypatch.undo()
    for a, b in zip(got, step(lambda v: theirs(v, training=True), theirs, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDINGS * np.abs(b).max())


class Doubled(keras.layers.BatchNormalization):
    """A user's own."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return 2.0 * super().call(inputs, training=training, mask=mask)


@pytest.mark.parametrize(
    ("norm", "training"),
    [
        (built(), False),
        (built(), None),
        (built(epsilon=1e-6), True),
        (built(axis=1, momentum=0.5), True),
        (built(trainable=False), True),
        (built(dtype="mixed_float16"), True),
        (Doubled(), True),
    ],
)
def test_leaves_to_keras_what_the_kernel_does_not_compute(norm: Any, training: Any) -> None:
    x = images().transpose(0, 3, 1, 2) if norm.axis == 1 else images()
    twin = type(norm).from_config(norm.get_config())
    for layer in (norm, twin):  # The user's own is not built yet.
        if not layer.built:
            layer.build(x.shape)
    twin.set_weights(norm.get_weights())
    got = batchnorm.normalize(norm, tf.constant(x), training)
    np.testing.assert_array_equal(got, twin(tf.constant(x), training=training))
    for a, b in zip(norm.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_float32_where_all_variables_have_16_bits(dtype: str) -> None:
    norm = built(dtype=dtype)
    assert all(keras.backend.standardize_dtype(w.dtype) == dtype for w in norm.weights)
    factor, offset = batchnorm.normalization_numbers(norm, norm.beta)
    assert factor.dtype == offset.dtype == tf.float32
