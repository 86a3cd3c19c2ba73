"""Blends of two values by a weight train the one weight of the user's."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
from kqat.graph.tracer import rebuild, trace
from kqat.planning.expansion import expand

X = np.random.default_rng(0).normal(size=(32, 5, 4)).astype(np.float32)


class Blend(keras.Model):
    """A model, or a layer, that computes what it is given of two values and of a weight."""

    def __init__(self, function: Callable[..., Any], shape: tuple[int, ...], name: str) -> None:
        super().__init__(name=name)
        self.function = function
        self.w = self.add_weight(shape=shape, initializer="random_uniform", name="w")

    def call(self, x: Any) -> Any:
        """Of each step and the one before it, as time is mixed in RWKV."""
        return self.function(x, ops.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))), self.w)


def _mixed(x: Any, y: Any, w: Any) -> Any:
    return x * w + y * (1.0 - w)


def _gated(x: Any, y: Any, w: Any) -> Any:
    gate = ops.sigmoid(w)
    return (1 - gate) * x + gate * ops.tanh(y)


def _computed_twice(x: Any, y: Any, w: Any) -> Any:
    return ops.sigmoid(w) * x[:, :1] + (ops.ones_like(w) - ops.sigmoid(w)) * y


def _model(function: Callable[..., Any], shape: tuple[int, ...], inside: bool) -> keras.Model:
    keras.utils.set_random_seed(0)
    blend = Blend(function, shape, "blend")
    x = keras.Input((5, 4))
    if inside:
        return keras.Model(x, layers.Dense(3)(blend(x)))
    blend(X)
    return blend


def _numbers(model: keras.Model) -> int:
    return sum(int(np.size(v)) for v in model.trainable_variables)


@pytest.mark.parametrize("inside", [True, False], ids=["layer", "model"])
@pytest.mark.parametrize(
    ("function", "shape"), [(_mixed, (1, 1, 4)), (_gated, ()), (_computed_twice, (4,))]
)
def test_one_weight_is_trained(function: Any, shape: Any, inside: bool) -> None:
    """They were refused: two values are computed of one weight."""
    model = _model(function, shape, inside)
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    parts = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "parts")
    np.testing.assert_allclose(parts(X), model(X), rtol=1e-4, atol=1e-5)
    assert _numbers(parts) == _numbers(model)


def test_a_blend_quantizes_without_a_warning() -> None:
    model = _model(_mixed, (1, 1, 4), inside=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", kqat.TrainerWarning)
        qat = kqat.quantize_model(model, calibration_data=X)
    assert _numbers(qat) == _numbers(model)
    wanted = np.asarray(model(X))
    assert np.mean((np.asarray(qat(X)) - wanted) ** 2) < 3e-3 * np.mean(wanted**2)


def test_a_product_that_is_read_elsewhere_keeps_its_own_weight() -> None:
    def function(x: Any, y: Any, w: Any) -> Any:
        part = w * x
        return ops.concatenate([part, part + (1 - w) * y], axis=-1)

    with pytest.warns(kqat.TrainerWarning, match="read as 2 weights"):
        qat = kqat.quantize_model(_model(function, (4,), inside=True), calibration_data=X)
    assert _numbers(qat) == 4 + 4 + 8 * 3 + 3
