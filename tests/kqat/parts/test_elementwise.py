"""Functions of one number: what is one, and a layer that carries it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from kqat.parts.elementwise import DOMAINS, Elementwise, is_elementwise, power

SHAPE = (None, 4, 5)
COUNTER = np.arange(5, dtype=np.float32)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: 2.0 * x, True),
        (lambda x: ops.log(x), True),  # NaN below zero is a value as well
        (lambda x: ops.zeros_like(x), True),
        (lambda x: x - ops.mean(x), False),  # follows any permutation, but is of all numbers
        (lambda x: x - ops.mean(x, axis=-1, keepdims=True), False),
        (lambda x: x + COUNTER, False),
        (lambda x: ops.flip(x, 1), False),
        (lambda x: ops.cumsum(x, 1), False),
        (lambda x: x[:, :2], False),
        (lambda x: x > 0, False),
        (lambda x: x + keras.random.normal(ops.shape(x)), False),
        (lambda x: [x, x], False),
        # They branch on all numbers, mostly one way.
        (lambda x: ops.cond(ops.sum(x) > -100, lambda: x, lambda: -x), False),
        (lambda x: ops.where(ops.max(x) > 0.5, x, -x), False),
        (lambda x: ops.where(ops.min(x) < 500.0, x, -x), False),
        (lambda x: ops.where(ops.mean(ops.absolute(x)) > 1e-3, x, 0.0), False),
    ],
)
def test_a_function_of_each_number_alone_is_told_by_trial(
    function: Callable[[Any], Any], expected: bool
) -> None:
    assert is_elementwise(function, SHAPE) is expected


def test_the_layer_computes_and_loads_without_custom_objects(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    inputs = keras.Input((4, 5))
    layer = Elementwise.of(lambda t: t * ops.sigmoid(1.7 * t))
    model = keras.Model(inputs, layer(inputs))
    # Keras orders the product's factors differently: one float32 rounding.
    np.testing.assert_allclose(model(x), x / (1 + np.exp(-1.7 * x)), rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.parametrize("name", DOMAINS)
def test_inside_its_domain_a_function_and_its_gradient_are_finite(name: str) -> None:
    tf = pytest.importorskip("tensorflow")
    guarded = DOMAINS[name]
    x = tf.Variable(np.array([-100.0, -1.0, -1e-9, 0.0, 1e-9, 1.0, 100.0], np.float32))
    with tf.GradientTape() as tape:
        y = getattr(ops, name.lower())(guarded(x))
    assert np.isfinite(y).all()
    assert np.isfinite(tape.gradient(y, x)).all()


@pytest.mark.parametrize("exponent", [3.0, 2.0, 1.0, 0.5, 1 / 3, -1.5, -1.0])
def test_a_power_and_its_gradients_are_finite(exponent: float) -> None:
    """Also at zero, onto which a clip behind which a root is taken may be rounded."""
    tf = pytest.importorskip("tensorflow")
    x = tf.constant([-2.0, -0.5, 0.0, 0.5, 2.0])
    trained = tf.constant(exponent)
    with tf.GradientTape() as tape:
        tape.watch([x, trained])
        y = power(x, trained)
    assert all(np.isfinite(g).all() for g in (y, *tape.gradient(y, [x, trained])))
    with np.errstate(all="ignore"):
        want = np.power(x.numpy(), np.float32(exponent))
    known = np.isfinite(want)
    np.testing.assert_allclose(y.numpy()[known], want[known], rtol=1e-5)
