"""Gradient estimators against readings of their equations in NumPy, on weights and activations."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kqat
from kqat.base.errors import PolicyError, SpecError
from kqat.grids.gradients.estimator import estimated
from kqat.grids.methods import GRADIENTS, gradient_estimator, gradient_from_dict, gradient_to_dict
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.spec import QuantSpec
from tests.kqat.step_cases import grid, normal

LOW, HIGH = -1.0, 1.5


@keras.saving.register_keras_serializable("tests")
def halved(upstream: Any, x: Any, rounded: Any, low: Any, high: Any) -> Any:
    return upstream * 0.5


def expected(
    name: str, x: np.ndarray, rounded: np.ndarray, low: Any, high: Any, upstream: np.ndarray
) -> np.ndarray:
    """Bengio 2013; Hubara 2016, equation 4; Lee 2021, equation 5; Défossez 2022, section 3.2."""
    inside = (x >= low) & (x <= high)
    if name == "identity":
        return upstream
    if name == "ewgs":
        # In the paper's units: value and rounded value on [0, 1].
        unit = (x - low) / (high - low), (rounded - low) / (high - low)
        return inside * upstream * (1 + 20.0 * np.sign(upstream) * (unit[0] - unit[1]))
    return upstream * 0.5 if name == "halved" else upstream * inside


def estimator(name: str) -> Any:
    if name == "halved":
        return gradient_estimator(halved)
    return kqat.ElementWiseScaling(20.0) if name == "ewgs" else gradient_estimator(name)


NAMES = (*GRADIENTS, "halved")


@pytest.mark.parametrize("name", NAMES)
def test_each_is_the_papers(name: str) -> None:
    x, upstream = normal((50,)) * 2, normal((50,), 1)
    rounded = np.rint(np.clip(x, LOW, HIGH) * 4) / 4
    v = tf.Variable(x)
    with tf.GradientTape() as tape:
        zeros = estimated(estimator(name), v + 0.0, tf.constant(rounded), LOW, HIGH)
    np.testing.assert_array_equal(zeros, np.zeros(50))
    got = tape.gradient(zeros, v, upstream)
    want = expected(name, x, rounded, LOW, HIGH, upstream)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", ["max_abs", "lsq", "tqt"])
def test_weights_round_as_before_with_this_gradient(name: str, step: str) -> None:
    weight, upstream = normal((40, 6)), normal((40, 6), 1)

    def wrapper(gradient: Any) -> kqat.QuantizeWrapper:
        config = kqat.QuantizeConfig(weights=grid(3), weight_step=step, weight_gradient=gradient)
        made = kqat.QuantizeWrapper(
            layers.Dense(6, use_bias=False), {"kernel": grid(3)},
            weight_step=config.weight_step, gradient=config.weight_gradient,
        )  # fmt: skip
        made.build((None, 40))
        made.take_over([weight])
        return made

    plain, one = wrapper(None), wrapper(estimator(name))
    np.testing.assert_array_equal(one.on_grid("kernel"), plain.on_grid("kernel"))
    variables = [one.layer.kernel.value, *(v.value for v in one.steps.values())]
    with tf.GradientTape() as tape:
        rounded = one.on_grid("kernel", training=True)
    got = tape.gradient(rounded, variables, upstream)
    most = np.asarray(one.scale("kernel")) * 3
    if name == "noise":
        noise = np.asarray(rounded) - np.clip(weight, -most, most)
        assert np.abs(noise).max() <= 0.5001 * most.max() / 3 and np.abs(noise).mean() > 0.01
    else:
        np.testing.assert_array_equal(rounded, plain.on_grid("kernel"))
    want = expected(name, weight, np.asarray(rounded), -most, most, upstream)
    # Weights at the very edge of the grid may count as inside or outside.
    sure = np.abs(np.abs(weight) - most) > 1e-5
    np.testing.assert_allclose(got[0][sure], want[sure], rtol=1e-4, atol=1e-5)
    assert all(np.any(np.asarray(g) != 0) for g in got[1:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "method", [Fixed(LOW, HIGH), kqat.MovingAverage(), kqat.LearnedRange()], ids=str
)
def test_activations_round_as_before_with_this_gradient(name: str, method: Any) -> None:
    x, upstream = normal((4, 50)) * 2, normal((4, 50), 1)

    def quantizer(gradient: Any) -> kqat.ActivationQuantizer:
        made = kqat.ActivationQuantizer(QuantSpec(), method, gradient=gradient)
        made.build((None, 50))
        if not isinstance(method, Fixed):
            made.site_low.assign([LOW])
            made.site_high.assign([HIGH])
            made.count.assign([1.0])
            made.frozen = not isinstance(method, kqat.LearnedRange)
        return made

    one = quantizer(estimator(name))
    np.testing.assert_array_equal(one(x), quantizer(None)(x))
    v = tf.Variable(x)
    with tf.GradientTape() as tape:
        rounded = one(v + 0.0, training=True)
    got = tape.gradient(rounded, [v, *(t.value for t in one.trainable_variables)], upstream)
    step = (HIGH - LOW) / 255
    zero = np.floor(-LOW / step + 0.5)
    low, high = -zero * step, (255 - zero) * step
    if name == "noise":
        noise = np.asarray(rounded) - np.clip(x, LOW, HIGH)
        assert np.abs(noise).max() <= 0.501 * step and np.abs(noise).mean() > 0.2 * step
        low, high = LOW, HIGH
    want = expected(name, x, np.asarray(rounded), LOW, HIGH, upstream)
    sure = (np.abs(x - low) > step) & (np.abs(x - high) > step)
    np.testing.assert_allclose(got[0][sure], want[sure], rtol=1e-3, atol=1e-4)
    assert all(np.any(np.asarray(g) != 0) for g in got[1:])


@pytest.mark.parametrize("name", ["identity", "halved", "ewgs", "noise"])
def test_a_clamp_that_the_quantizer_carries_out_keeps_its_gradient(name: str) -> None:
    """Nothing passes below a ReLU, whatever stands for the derivative of rounding."""
    made = kqat.ActivationQuantizer(
        QuantSpec(), kqat.MovingAverage(), clamp="relu", gradient=estimator(name)
    )
    made.build((None, 50))
    x = tf.Variable(normal((4, 50)))
    with tf.GradientTape() as tape:
        y = made(x + 0.0, training=True)
    got = tape.gradient(y, x, np.ones((4, 50), np.float32)).numpy()
    assert np.all(got[x.numpy() < 0] == 0) and np.all(got[x.numpy() > 0] != 0)


@pytest.mark.parametrize("name", NAMES)
def test_dict_comes_back(name: str) -> None:
    one = estimator(name)
    assert gradient_from_dict(gradient_to_dict(one)) == one
    config = kqat.QuantizeConfig(weight_gradient=one, activation_gradient=one)
    assert kqat.QuantizeConfig.from_dict(config.to_dict()) == config
    hash(config)


def test_older_configs_have_none() -> None:
    config = kqat.QuantizeConfig().to_dict()
    del config["weight_gradient"], config["activation_gradient"]
    assert kqat.QuantizeConfig.from_dict(config) == kqat.QuantizeConfig()
    assert gradient_to_dict(None) is None and gradient_from_dict(None) is None


def test_what_is_none_is_refused() -> None:
    match = r"weight_gradient: Expected one of \['clipped', .* Received: 'clip'. Did you mean 'clip"
    with pytest.raises(PolicyError, match=match):
        kqat.QuantizeConfig(weight_gradient="clip")
    with pytest.raises(PolicyError, match=r"Received: 'STE'. Did you mean 'identity'"):
        kqat.QuantizeConfig(activation_gradient="STE")
    with pytest.raises(PolicyError, match=r"Received: 'zzz'.$"):
        kqat.QuantizeConfig(activation_gradient="zzz")
    with pytest.raises(PolicyError, match=r"a function or None as gradient method. Received: 3"):
        kqat.QuantizeConfig(weight_gradient=3)
    with pytest.raises(PolicyError, match=r"registered function .* Decorate it with @keras"):
        kqat.QuantizeConfig(weight_gradient=lambda *_: 0.0)
    with pytest.raises(PolicyError, match=r"equal steps for noise .* Use weight_gradient='cl"):
        kqat.QuantizeConfig(weights=grid(2), weight_step="ternary", weight_gradient="noise")
    with pytest.raises(SpecError, match=r"Expected a delta of 0 or more. Received: delta=-1"):
        kqat.ElementWiseScaling(-1.0)
    with pytest.raises(SpecError, match=r"the gradient function 'tests>gone' to be registered"):
        gradient_from_dict({"function": "tests>gone"})
