"""What a `call` was seen to do is tried on other values; integers are no quantities."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import kqat

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


class Own(keras.Model):
    """A model of which each test gives the middle."""

    def __init__(self, middle: Callable[[Any], Any]) -> None:
        super().__init__(name="own")
        self.middle, self.first, self.last = middle, layers.Dense(8), layers.Dense(5)

    def call(self, x: Any) -> Any:
        """Two Dense layers, and what is between them."""
        return self.last(self.middle(self.first(x)))


def subclassed(middle: Callable[[Any], Any]) -> keras.Model:
    model = Own(middle)
    model(X)
    return model


def inside(middle: Callable[[Any], Any]) -> keras.Model:
    x = keras.Input((8,))
    return keras.Model(x, layers.Dense(4)(subclassed(middle)(x)))


def moved(middle: Callable[[Any], Any]) -> keras.Model:
    """Windows merged into the batch, outside of any layer."""
    x = keras.Input((6, 8))
    y = layers.Lambda(middle)(layers.Dense(8)(ops.reshape(x, (-1, 3, 8))))
    return keras.Model(x, layers.Dense(4)(ops.reshape(y, (-1, 6, 8))))


def of_samples(x: Any) -> Any:
    return x / ops.cast(ops.shape(x)[0], "float32") * 16.0


def of_numbers(x: Any) -> Any:
    return x / tf.cast(tf.size(x), tf.float32) * 128.0


def at_random(x: Any) -> Any:
    return x + keras.random.normal([8])


@pytest.mark.parametrize("build", [subclassed, inside, moved])
@pytest.mark.parametrize("middle", [of_samples, of_numbers, at_random])
def test_what_depends_on_the_batch_or_on_chance_is_refused(build: Any, middle: Any) -> None:
    with pytest.raises(kqat.KqatError, match=r"compute what its call was seen to do.*Received: "):
        kqat.plan(build(middle))


@pytest.mark.parametrize("build", [subclassed, inside, moved])
def test_other_calls_are_planned(build: Any) -> None:
    assert kqat.plan(build(lambda x: ops.tanh(x) * 2.0)).float_layers() == ()


def test_what_tensorflow_draws_is_refused() -> None:
    with pytest.raises(kqat.ModelError, match="RandomUniform, whose result changes"):
        kqat.plan(subclassed(lambda x: tf.nn.dropout(x, 0.5)))


def _of_integers(function: Callable[[Any], Any]) -> keras.Model:
    x = keras.Input((7,), dtype="int32", name="x")
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(function(x))))


def _rows(x: Any) -> Any:
    return layers.Embedding(10, 4)(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: _rows(ops.where(x > 2, 3, x)),
        lambda x: _rows(ops.where(x > 2, x - 1, x)),
        lambda x: _rows(ops.where(x > 2, x, 0)),
        lambda x: _rows(ops.clip(x - 2, 0, 4)),
        lambda x: _rows(ops.cumsum(ops.cast(x > 2, "int32"), axis=1)),
        lambda x: _rows(ops.sum(ops.cast(x > 2, "int32"), axis=1, keepdims=True)),
        lambda x: _rows(ops.count_nonzero(x, axis=1)),
        lambda x: _rows(ops.max(ops.abs(x - 4), axis=1)),
    ],
)
def test_integers_are_selected_as_integers(function: Any) -> None:
    model, data = _of_integers(function), np.arange(56).reshape(8, 7) % 8
    qat = kqat.quantize_model(model, calibration_data=data)
    noise = np.mean(np.square(np.asarray(qat(data)) - np.asarray(model(data))))
    assert noise < 1e-3 * np.mean(np.square(model(data)))
    assert "Select" not in {type(layer).__name__ for layer in qat.layers}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: ops.cast(x * 5000, "float32"), "few values in 'cast.*0 to 5000"),
        (lambda x: layers.Dense(2)(x > 2), "to read quantities.*bool"),
        (lambda x: _rows(ops.mean(x, 1)), "integers all the way to the table.* of 'mean'"),
    ],
)
def test_integers_that_are_quantities_are_refused(function: Any, message: str) -> None:
    with pytest.raises(kqat.KqatError, match=message):
        kqat.plan(_of_integers(function))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.cast(ops.where(x > 2, 3, x), "float32"),
        lambda x: ops.cast(ops.cast(x > 2, "int32") + ops.cast(x > 4, "int32"), "float32"),
        lambda x: ops.cast(ops.sum(ops.cast(x > 2, "int32"), 1, keepdims=True), "float32"),
        lambda x: _rows(x) * ops.cumsum(ops.cast(x > 2, "int32"), 1)[..., None],
        lambda x: ops.sum(_rows(x), 1) / ops.maximum(ops.sum(x > 2, 1, keepdims=True), 1),
        lambda x: ops.divide_no_nan(ops.sum(_rows(x), 1), ops.count_nonzero(x > 5, 1)[:, None]),
    ],
)
def test_integers_of_few_values_become_quantities(function: Any) -> None:
    """Counts and places were refused; the file has them exactly, by a table of all they may be."""
    model, data = _of_integers(function), np.arange(112).reshape(16, 7) * 5 % 8
    qat = kqat.quantize_model(model, calibration_data=data)
    noise = np.mean(np.square(np.asarray(qat(data)) - np.asarray(model(data))))
    assert noise < 3e-3 * np.mean(np.square(model(data)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: ops.cast(ops.sum(x, 1, keepdims=True), "float32"), "from 0 to 7 for 'cast"),
        (lambda x: _rows(x + 3), r"from 0 to 9 for 'embedding.*Received: 10, .* in sample 1 "),
        (lambda x: ops.one_hot(x, 8)[:, :, 0] * x, "0 to 1 in input 'x', which 'multiply"),
    ],
)
def test_integers_without_a_row_are_refused_in_calibration(function: Any, message: str) -> None:
    """Those that the model computes were looked up beside the table, in silence."""
    with pytest.raises(kqat.CalibrationError, match=message):
        kqat.quantize_model(
            _of_integers(function), calibration_data=np.arange(56).reshape(8, 7) % 8
        )
