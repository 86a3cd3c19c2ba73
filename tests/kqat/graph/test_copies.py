"""Copies of layers whose config says more than their class takes."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import kqat
from kqat.base import ModelError
from kqat.graph.copies import Part, clone, duplicate


class Block(L.Layer):
    """Its config has keys that its class does not take, as configs in the wild do."""

    def __init__(self, units: int, kind: Any = L.Dense, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.dense = kind(units)

    def build(self, input_shape: Any) -> None:
        self.dense.build(input_shape)

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def get_config(self) -> dict[str, Any]:
        own = {"units": self.units, "kind": L.Dense, "version": 3, "channels": 4}
        return {**super().get_config(), **own}


class Stubborn(Block):
    """No config makes it."""

    def __init__(self, units: int, secret: Any, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)


def test_a_float_layer_with_more_keys_than_arguments_is_copied() -> None:
    model = keras.Sequential([keras.Input((6,)), Block(4, name="block"), L.Dense(2)])
    data = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    qat = kqat.quantize_model(model, {"block": None}, calibration_data=data)
    np.testing.assert_array_equal(
        qat.get_layer("block").dense.kernel, model.get_layer("block").dense.kernel
    )


def test_the_error_quotes_no_config() -> None:
    with pytest.raises(
        kqat.ModelError, match=r"'odd' of type Stubborn, which cannot:.*secret"
    ) as e:
        clone(Stubborn(3, 1, name="odd"))
    assert "config=" not in str(e.value) and "'units'" not in str(e.value)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.Dense(3, bias_initializer="random_normal"), (4,)),
        (L.GRU(3), (5, 4)),
        (L.Bidirectional(L.LSTM(2)), (5, 4)),
    ],
)
def test_weights_that_are_taken_over_are_not_drawn_first(
    layer: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.ones((2, *shape), np.float32)
    want = np.asarray(layer(x))
    copy = duplicate(layer)

    def draws(*_: Any, **__: Any) -> None:
        raise AssertionError("random numbers that nobody reads")

    for kind in (keras.initializers.GlorotUniform, keras.initializers.Orthogonal):
        monkeypatch.setattr(kind, "__call__", draws)
    copy(keras.Input(shape))
    assert np.array_equal(copy(x), want)
    # They are what a config says.
    assert copy.layer.get_config() == {**layer.get_config(), "name": copy.layer.name}


def test_weights_that_a_config_has_no_place_for_are_refused() -> None:
    """As where a layer that another owns was replaced after that was made."""
    part = Part(L.Dense(2, name="dense"), [np.zeros((3, 2)), np.zeros(2), np.zeros(1)])
    with pytest.raises(ModelError, match=r"the 2 weights that the config of layer 'dense'.* 3"):
        part(keras.Input((3,)))


def test_a_copy_of_a_lambda_knows_its_output_shape() -> None:
    """Keras cannot find it of a function that runs Python code, as `tf.numpy_function` does."""

    def unseen(x: Any) -> Any:
        return tf.numpy_function(np.tanh, [x], tf.float32)

    layer = L.Lambda(unseen, output_shape=(3,))
    assert duplicate(layer)(keras.Input((3,))).shape == (None, 3)
    by_function = clone(L.Lambda(unseen, output_shape=lambda shape: shape))
    assert by_function(keras.Input((4,))).shape == (None, 4)
