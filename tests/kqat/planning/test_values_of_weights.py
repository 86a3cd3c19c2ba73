"""Queries, latents and tokens: weights that are tiled to the batch and read in several places."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat

X = np.random.default_rng(0).normal(size=(32, 5, 4)).astype(np.float32)


class Pooled(layers.Layer):
    """Attention of some trained queries, which are added to what they find."""

    def __init__(self, tiled: Callable[[Any, Any], Any]) -> None:
        super().__init__(name="pooled")
        self.tiled, self.attention = tiled, layers.MultiHeadAttention(1, 4)

    def build(self, shape: Any) -> None:
        self.seed = self.add_weight(shape=(1, 2, 4), initializer="random_normal", name="seed")
        self.attention.build((None, 2, 4), shape)

    def call(self, x: Any) -> Any:
        queries = self.tiled(self.seed, x)
        return queries + self.attention(queries, x)


class Subclassed(keras.Model):
    """A model whose call is run to be traced, and that holds the weight itself."""

    def __init__(self, once: bool) -> None:
        super().__init__(name="subclassed")
        self.attention, self.once = layers.MultiHeadAttention(1, 4), once

    def build(self, shape: Any) -> None:
        self.seed = self.add_weight(shape=(2, 4), initializer="random_normal", name="seed")

    def call(self, x: Any) -> Any:
        queries = ops.repeat(self.seed[None], ops.shape(x)[0], axis=0)
        found = self.attention(queries, x)
        return found if self.once else queries + found


def _inside(tiled: Callable[[Any, Any], Any]) -> keras.Model:
    x = keras.Input((5, 4))
    return keras.Model(x, layers.Dense(3)(Pooled(tiled)(x)))


def _subclassed(once: bool) -> keras.Model:
    model = Subclassed(once)
    model(X)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: _inside(lambda w, x: ops.tile(w, (ops.shape(x)[0], 1, 1))),
        lambda: _inside(lambda w, x: ops.broadcast_to(w, (ops.shape(x)[0], 2, 4))),
        lambda: _subclassed(once=False),
        lambda: _subclassed(once=True),
    ],
)
def test_readers_of_one_value(build: Callable[[], keras.Model]) -> None:
    """They were refused, or the trial of the model crashed; one variable serves all readers."""
    keras.utils.set_random_seed(0)
    model = build()
    qat = kqat.quantize_model(model, calibration_data=X)
    seeds = [v for v in qat.trainable_variables if "seed" in v.path or tuple(v.shape) == (1, 2, 4)]
    assert len(seeds) == 1
    noise = np.mean(np.square(np.asarray(qat(X)) - np.asarray(model(X))))
    assert noise < 3e-3 * np.mean(np.square(model(X)))


def test_a_value_of_as_many_rows_as_samples_keeps_the_batch() -> None:
    """Keras took one number for each of two samples for a bias of two channels."""
    model = _inside(lambda w, x: ops.tile(w, (ops.shape(x)[0], 1, 1)))
    qat = kqat.quantize_model(model, calibration_data=X)
    for samples in (1, 2, 3):
        assert qat(X[:samples]).shape == (samples, 2, 3)


def test_equal_weights_are_no_single_one() -> None:
    """Two weights that begin with zeros train apart."""

    class Two(layers.Layer):
        def build(self, shape: Any) -> None:
            self.first, self.second = (
                self.add_weight(shape=(1, 5, 4), initializer="zeros", name=name) for name in "ab"
            )

        def call(self, x: Any) -> Any:
            return ops.tanh(x + self.first) + self.second

    x = keras.Input((5, 4))
    qat = kqat.quantize_model(keras.Model(x, Two()(x)), calibration_data=X)
    assert len([v for v in qat.trainable_variables if tuple(v.shape)[-2:] == (5, 4)]) == 2
