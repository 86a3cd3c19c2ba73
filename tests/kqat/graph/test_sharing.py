"""Weights that two places read are refused by name: copies of them would train apart."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
from kqat.base import ModelError


class Given(L.Layer):
    """Reads a variable that it is given."""

    def __init__(self, table: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = table

    def call(self, x: Any) -> Any:
        return ops.matmul(x, self.table)


class Owner(L.Layer):
    def build(self, input_shape: Any) -> None:
        self.w = self.add_weight(shape=(6, 6), name="w")

    def call(self, x: Any) -> Any:
        return ops.matmul(x, self.w)


class Reader(L.Layer):
    """Reads a weight of another layer."""

    def __init__(self, other: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.other = other

    def call(self, x: Any) -> Any:
        return ops.matmul(x, ops.transpose(self.other.w))


class Twice(Owner):
    def call(self, x: Any) -> Any:
        return ops.matmul(ops.tanh(ops.matmul(x, self.w)), self.w)


class Tied(Owner):
    def call(self, x: Any) -> Any:
        return ops.matmul(ops.tanh(ops.matmul(x, self.w)), ops.transpose(self.w))


class Autoencoder(keras.Model):
    """Decodes by the transposed kernel of its encoder."""

    def __init__(self) -> None:
        super().__init__(name="autoencoder")
        self.encoder = L.Dense(4, name="encoder")

    def call(self, x: Any) -> Any:
        return ops.matmul(self.encoder(x), ops.transpose(self.encoder.kernel))


def given(trainable: bool = True) -> list[L.Layer]:
    table = keras.Variable(np.full((6, 6), 0.1, np.float32), name="table", trainable=trainable)
    return [Given(table, name="first"), Given(table, name="second")]


def borrowed() -> list[L.Layer]:
    owner = Owner(name="owner")
    return [owner, Reader(owner, name="reader")]


def model_of(layers: list[L.Layer]) -> keras.Model:
    return keras.Sequential([keras.Input((6,)), *layers, L.Dense(2)])


def autoencoder() -> keras.Model:
    model = Autoencoder()
    model(np.zeros((1, 6), np.float32))
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: model_of(given()), "'table', which 'first' and 'second' read"),
        (lambda: model_of(borrowed()), "owner/w', which 'owner' and 'reader' read"),
        (lambda: model_of([Twice(name="twice")]), "layer 'twice' .*twice/w', which"),
        (lambda: model_of([Tied(name="tied")]), "layer 'tied' .*tied/w', which"),
        (autoencoder, "encoder/kernel', which 'encoder' and 'matmul' read"),
    ],
    ids=["given", "borrowed", "twice", "transposed", "model"],
)
def test_a_weight_read_in_two_places_is_named(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"(?s){message}.*each would train a copy of its own"):
        kqat.plan(build())


def test_what_cannot_train_apart_is_taken() -> None:
    kqat.plan(model_of(given(trainable=False)))  # A frozen table stays what it is.
    shared = L.Dense(6, name="shared")
    kqat.plan(model_of([shared, L.ReLU(), shared]))  # One layer, called twice.
    # Layers of equal numbers, as those of a fresh BatchNormalization, are two layers.
    kqat.plan(model_of([L.BatchNormalization(), L.ReLU(), L.BatchNormalization()]))
