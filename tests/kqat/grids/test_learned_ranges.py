"""LSQ+ and PACT in the quantizer, against readings of their equations in NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import kqat
from kqat.base.errors import SpecError
from kqat.grids import arithmetic
from kqat.grids.ranges.learned_clip import LearnedClip
from kqat.grids.ranges.learned_range import LearnedRange
from kqat.grids.spec import INT16_ACTIVATION, QuantSpec
from tests.kqat.step_cases import normal

X = (normal((4, 50)) * 2).astype(np.float32)
UPSTREAM = normal((4, 50), 1)


def quantizer(method: Any, low: float, high: float, **options: Any) -> kqat.ActivationQuantizer:
    """One whose range was found to be `[low, high]`, for 50 values of a sample."""
    made = kqat.ActivationQuantizer(options.pop("spec", QuantSpec()), method, **options)
    made.build((None, 50))
    made.site_low.assign([low])
    made.site_high.assign([high])
    made.count.assign([1.0])
    return made


def trained(layer: kqat.ActivationQuantizer, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the layer makes of `x` in training, and the gradients of `x` and of its numbers."""
    v = tf.Variable(x)
    with tf.GradientTape() as tape:
        rounded = layer(v + 0.0, training=True)
    got = tape.gradient(rounded, [v, layer.moved.value], UPSTREAM)
    return np.asarray(rounded), np.asarray(got[0]), np.asarray(got[1])


def lsq_plus(
    x: np.ndarray, step: float, offset: float, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bhalgat et al. 2020, equation 3: output, and the slopes of step, offset and x, in float64.

    The offset is a whole number of steps, as a file has it.
    """
    zero = np.floor(-offset / step + 0.5)
    v = np.float64(x) / step + zero
    rounded = np.floor(np.clip(v, 0, most) + 0.5)
    inside = (v >= 0) & (v <= most)
    slope = np.where(inside, rounded - v, np.where(v < 0, 0, most))
    # The step also moves the offset's whole number of steps, which stays.
    return (rounded - zero) * step, slope, 1.0 * ~inside, 1.0 * inside


def test_lsq_plus_is_the_papers() -> None:
    step, offset = np.float32(3.5 / 255), np.float32(-1.5)
    y, dx, numbers = trained(quantizer(LearnedRange(), -1.5, 2.0), X)
    value, by_step, by_offset, passed = lsq_plus(X, step, offset, 255)
    np.testing.assert_allclose(y, value, atol=1e-6)
    np.testing.assert_allclose(dx, UPSTREAM * passed)
    gain = 1.0 / math.sqrt(50 * 255)
    np.testing.assert_allclose(numbers[0], np.sum(UPSTREAM * by_step) * gain, rtol=1e-3)
    np.testing.assert_allclose(numbers[1], np.sum(UPSTREAM * by_offset) * gain, rtol=1e-4)
    assert np.count_nonzero(by_offset) > 10


def test_an_infinite_value_spoils_no_gradient() -> None:
    x = X.copy()
    x[0, :2] = np.inf, -np.inf
    _, dx, numbers = trained(quantizer(LearnedRange(), -1.5, 2.0), x)
    assert np.isfinite(numbers).all()
    assert np.isfinite(dx).all()


def test_lsq_plus_behind_a_relu_learns_the_step_alone() -> None:
    layer = quantizer(LearnedRange(), 0.0, 1.5, clamp="relu")
    x = np.maximum(X, 0)
    y, dx, numbers = trained(layer, x)
    value, by_step, _, passed = lsq_plus(x, np.float32(1.5 / 255), 0.0, 255)
    np.testing.assert_allclose(y, value, atol=1e-6)
    np.testing.assert_allclose(dx, UPSTREAM * passed)
    expected = np.sum(UPSTREAM * by_step) / math.sqrt(50 * 255)
    np.testing.assert_allclose(numbers, [expected], rtol=1e-3)


def test_lsq_of_16_bits_is_symmetric() -> None:
    layer = quantizer(LearnedRange(), -1.0, 1.0, spec=INT16_ACTIVATION)
    _, dx, numbers = trained(layer, X)
    step = 2.0 * 32768 / 32767 / 65535
    v = X / step
    inside = (v >= -32768) & (v <= 32767)
    slope = np.where(inside, np.floor(v + 0.5) - v, np.clip(v, -32768, 32767))
    np.testing.assert_allclose(dx, UPSTREAM * inside)
    expected = np.sum(UPSTREAM * slope) / math.sqrt(50 * 32767)
    np.testing.assert_allclose(numbers, [expected], rtol=1e-3)
    assert arithmetic.nudge(*layer.range(), layer.spec)[1] == 0


def test_pact_is_the_papers() -> None:
    """Choi et al. 2018, equations 1 to 3."""
    layer = quantizer(LearnedClip(0.25), 0.0, 1.5, clamp="relu")
    x = np.maximum(X, 0)
    y, dx, numbers = trained(layer, x)
    s = np.float32(1.5) / np.float32(255)
    np.testing.assert_allclose(y, np.floor(np.clip(x, 0, 1.5) / s + 0.5) * s, atol=1e-6)
    np.testing.assert_array_equal(dx, UPSTREAM * (x <= 1.5))
    np.testing.assert_allclose(numbers, [np.sum(UPSTREAM * (x > 1.5))], rtol=1e-4)
    assert layer.losses[0].numpy() == pytest.approx(0.25 * 1.5**2)
    assert not quantizer(LearnedClip(0.0), 0.0, 1.0).losses


def test_pact_of_both_signs_learns_both_bounds() -> None:
    layer = quantizer(LearnedClip(), -0.75, 1.5)
    _, dx, numbers = trained(layer, X)
    (low, high), levels = layer.range(), 255
    scale, zero = arithmetic.nudge(low, high, layer.spec)
    first, last = (-128 - zero) * scale, (levels - 128 - zero) * scale
    np.testing.assert_array_equal(dx, UPSTREAM * ((first <= X) & (last >= X)))
    expected = [np.sum(UPSTREAM * (last < X)), np.sum(UPSTREAM * (first > X))]
    np.testing.assert_allclose(numbers, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [LearnedRange(), LearnedClip(), kqat.TrainedThreshold()], ids=str
)
@pytest.mark.parametrize("clamp", [None, "relu"])
def test_the_first_batch_is_where_a_range_starts(method: Any, clamp: Any) -> None:
    layer = kqat.ActivationQuantizer(QuantSpec(), method, clamp=clamp)
    layer.build((None, 50))
    x = np.maximum(X, 0) if clamp else X
    layer(tf.constant(x), training=True)
    first = layer.range()
    layer(tf.constant(x * 3), training=True)
    assert layer.range() == first
    assert float(layer.count[0]) == 1.0
    if not isinstance(method, kqat.TrainedThreshold):
        np.testing.assert_allclose(first, [x.min(), x.max()], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("numbers", [[-0.02, 0.5], [0.0, 0.0], [0.01, 3.0], [1e9, -1e9]])
def test_a_range_that_no_grid_has_still_rounds_and_has_gradients(numbers: list[float]) -> None:
    """Zero stays inside, and the numbers can come back."""
    layer = quantizer(LearnedRange(), -1.0, 1.0)
    layer.moved.assign(np.float32(numbers) - np.float32([2 / 255, -1.0]))
    y, _, by_numbers = trained(layer, X)
    low, high = layer.range()
    assert low <= 0.0 <= high and low < high
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(by_numbers))


def test_compiled_training_has_the_range_that_ships() -> None:
    for method in (LearnedRange(), LearnedClip(), kqat.TrainedThreshold()):
        layer = quantizer(method, -1.23, 2.34)
        layer.moved.assign(np.float32([0.0123, -0.0456])[: layer.moved.shape[0]])
        compiled = tf.function(lambda layer=layer: layer(tf.constant(X), training=True))()
        scale, zero = arithmetic.nudge(*layer.range(), layer.spec)
        integers = np.rint(compiled / scale)
        np.testing.assert_array_equal(integers.astype(np.float32) * scale, compiled)
        assert integers.min() >= -128 - zero and integers.max() <= 127 - zero


def test_calibration_starts_anew() -> None:
    layer = quantizer(LearnedRange(), -1.0, 1.0)
    layer.moved.assign([0.5, 0.5])
    layer.reset()
    np.testing.assert_array_equal(layer.moved, [0.0, 0.0])
    assert not layer.is_calibrated()


def test_a_negative_decay_is_refused() -> None:
    with pytest.raises(SpecError, match=r"Expected a decay of 0 or more. Received: decay=-1"):
        LearnedClip(-1.0)
