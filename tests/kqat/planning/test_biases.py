"""A constant added behind a kernel is its bias: one layer in training, one operator in the file."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export

SHAPE = (6, 6, 3)
X = np.random.default_rng(0).normal(size=(64, *SHAPE)).astype(np.float32)
CONSTANT = np.array([0.5, -2.0, 1.0, 3.0], np.float32)


class Shift(L.Layer):
    """A trained weight for each channel."""

    def build(self, input_shape: Any) -> None:
        self.shift = self.add_weight(shape=(input_shape[-1],), initializer="normal")

    def call(self, x: Any) -> Any:
        return x + self.shift


def batchnorm(x: Any, **options: Any) -> Any:
    layer = L.BatchNormalization(**options)
    y = layer(x)
    generator = np.random.default_rng(1)
    layer.set_weights([generator.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    return y


KINDS: dict[str, Callable[[Any], Any]] = {
    "array": lambda x: L.Conv2D(4, 3)(x) + CONSTANT,
    "number": lambda x: L.ReLU(6.0)(L.Conv2D(4, 3, use_bias=False)(x) + 3.0),
    "trained": lambda x: Shift()(L.Dense(4)(x)),
    "minus": lambda x: L.DepthwiseConv2D(3)(x) - CONSTANT[:3],
    "twice": lambda x: (L.Conv2D(4, 3)(x) + CONSTANT) + CONSTANT,
    "batchnorm": lambda x: L.ReLU()(batchnorm(L.Conv2D(4, 3)(x)) + CONSTANT),
    "dropout": lambda x: L.Dropout(0.1)(L.Conv2DTranspose(4, 3)(x)) + CONSTANT,
}


def model_of(kind: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input(SHAPE)
    return keras.Model(x, KINDS[kind](x))


@pytest.mark.parametrize("kind", KINDS)
def test_it_joins_the_bias(kind: str) -> None:
    model = model_of(kind)
    qat = kqat.quantize_model(model, calibration_data=X)
    names = {type(layer).__name__ for layer in qat.layers}
    assert not names & {"Rescaling", "ChannelAffine"}
    assert sum(isinstance(layer, kqat.QuantizeWrapper) for layer in qat.layers) == 1
    np.testing.assert_allclose(kqat.strip(qat)(X), model(X), rtol=1e-4, atol=1e-4)
    blob = tflite_export.convert(qat)
    operators = [operator.name for operator in tflite_export.inspect(blob).operators]
    assert not {"ADD", "MUL"} & set(operators)
    report = tflite_export.verify(qat, blob, X[:8], runtimes=("litert",))
    assert report.runtimes[0].is_right and not report.runtimes[0].unmatched


def test_it_joins_at_all_calls_of_a_layer_or_none() -> None:
    x, dense, shift = keras.Input((4,)), L.Dense(4, use_bias=False), Shift()
    both = shift(dense(L.ReLU()(shift(dense(x)))))
    plan = kqat.plan(keras.Model(x, both))
    assert not any(layer.kind == "ChannelAffine" for layer in plan.layers)
    plan = kqat.plan(keras.Model(x, dense(both)))  # One more call, without the sum.
    assert sum(layer.kind == "ChannelAffine" for layer in plan.layers) == 2
    first, second = L.Dense(4), L.Dense(4)
    sums = [shift(first(x)), shift(second(x)), first(L.ReLU()(x)), second(L.ReLU()(x))]
    plan = kqat.plan(keras.Model(x, sums))  # Half the calls of either have it behind them.
    assert sum(layer.kind == "ChannelAffine" for layer in plan.layers) == 2


@pytest.mark.parametrize(
    ("build", "policy"),
    [
        (lambda x: L.Add()([(y := L.Conv2D(4, 3, name="conv")(x)) + CONSTANT, y]), "int8"),
        (lambda x: L.Conv2D(4, 3, activation="relu")(x) + CONSTANT, "int8"),
        (lambda x: L.Conv2D(4, 1)(x) + np.ones((6, 6, 4), np.float32), "int8"),
        (lambda x: L.Conv2D(4, 3, name="conv")(x) + CONSTANT, {"conv": "w4a8"}),
        (lambda x: L.Rescaling(1.0, 2.0, activity_regularizer="l2")(L.Dense(4)(x)), "int8"),
    ],
    ids=["read_twice", "behind_an_activation", "of_places", "of_another_config", "penalized"],
)
def test_what_is_no_bias_stays_a_sum(build: Callable[[Any], Any], policy: Any) -> None:
    x = keras.Input(SHAPE)
    plan = kqat.plan(keras.Model(x, build(x)), policy)
    sums = {"ChannelAffine", "Rescaling", "WithConstant"}
    assert any(layer.kind in sums for layer in plan.layers)
