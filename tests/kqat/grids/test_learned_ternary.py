"""TTQ against a reading of its equations in NumPy."""

import numpy as np
import pytest
import tensorflow as tf

import kqat
from kqat.base.errors import SpecError
from kqat.grids.weight_steps.learned_ternary import LearnedTernary
from kqat.grids.weight_steps.ternary import Ternary
from tests.kqat.step_cases import grid, normal

THRESHOLD = 0.3
RULES = (THRESHOLD, None)


def limits(weight: np.ndarray, threshold: float | None) -> np.ndarray:
    """`D` of each column: by the largest weight, or by Li et al. 2016."""
    magnitude = np.abs(weight)
    if threshold is None:
        return np.float32(0.7) * magnitude.mean(0, keepdims=True)
    return threshold * magnitude.max(0, keepdims=True)


def papers(
    weight: np.ndarray,
    limit: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
    upstream: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Zhu et al. 2017, in float64: output, d/dWp, d/dWn, d/dw.

    Equation 8 is of weights in units of their size, here the mean of those that are kept.
    """
    up, down = weight > limit, weight < -limit
    value = np.where(up, positive, np.where(down, -negative, 0.0))
    unit = [
        np.abs(column[kept]).mean() for column, kept in zip(weight.T, (up | down).T, strict=True)
    ]
    slope = np.where(up, positive / unit, np.where(down, negative / unit, 1.0))
    sums = [np.sum(upstream * up, 0, keepdims=True), -np.sum(upstream * down, 0, keepdims=True)]
    return value, *sums, upstream * slope


@pytest.mark.parametrize("threshold", RULES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_and_gradients_are_the_papers(bits: int, threshold: float | None) -> None:
    weight, upstream, spec = normal((40, 3)), normal((40, 3), 1), grid(bits)
    method, qmax = LearnedTernary(threshold), 2 ** (bits - 1) - 1
    given = np.float32([[[0.9, 0.5, 1.3]], [[0.4, 0.7, 1.2]]])[: 1 if bits == 2 else 2]
    w, variable = tf.Variable(weight), tf.Variable(given)
    with tf.GradientTape() as tape:
        step = method.scale(variable + 0.0, spec)
        rounded = method.fake_quantize(w + 0.0, step, spec)
    got = tape.gradient(rounded, [w, variable], upstream)
    scale = given.max(axis=0) / np.float32(qmax)
    np.testing.assert_array_equal(method.grid_scale(step, spec), scale)
    held = np.maximum(np.rint(given / scale), 1) * scale
    limit = limits(weight, threshold)
    value, up, down, passed = papers(weight, limit, held[0], held[-1], upstream)
    np.testing.assert_array_equal(rounded, value.astype(np.float32))
    np.testing.assert_allclose(got[0], passed, rtol=1e-6)
    expected = np.stack([up, down]) if bits > 2 else np.stack([up + down])
    np.testing.assert_allclose(got[1], expected, rtol=1e-4, atol=1e-5)
    # What it becomes lies on the grid, with at most three values in a channel.
    integers = np.asarray(rounded) / scale
    np.testing.assert_allclose(integers, np.rint(integers), atol=1e-5)
    assert all(len(np.unique(integers[:, c])) == 3 for c in range(3))
    assert np.abs(np.rint(integers)).max() == qmax


@pytest.mark.parametrize("threshold", RULES)
def test_it_starts_at_the_mean_magnitudes(threshold: float | None) -> None:
    weight = normal((60, 2))
    limit = limits(weight, threshold)
    up = [weight[weight[:, c] > limit[0, c], c].mean() for c in range(2)]
    down = [-weight[weight[:, c] < -limit[0, c], c].mean() for c in range(2)]
    got = LearnedTernary(threshold).initial(tf.constant(weight), grid(4))
    np.testing.assert_allclose(got, np.float32([[up], [down]]), rtol=1e-5)


def test_small_weights_learn_as_large_ones_do() -> None:
    """With Adam all gradients count by their ratios: those must not hang on the size of weights."""
    weight, spec, method = normal((200, 4)), grid(2), LearnedTernary()
    found = []
    for size in (1.0, 0.05):
        w = tf.Variable(weight * np.float32(size))
        with tf.GradientTape() as tape:
            rounded = method.fake_quantize(w + 0.0, method.step(w, spec), spec)
        found.append(tape.gradient(rounded, w, normal((200, 4), 1)))
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 16, 5), (200, 4)])
def test_it_starts_with_the_values_of_ternary_weight_networks(shape: tuple[int, ...]) -> None:
    """Else a method that learns more starts behind one that learns less."""
    weight, spec = tf.constant(normal(shape)), grid(2)
    ours, theirs = LearnedTernary(), Ternary()
    start = ours.fake_quantize(weight, ours.step(weight, spec), spec)
    np.testing.assert_array_equal(
        start, theirs.fake_quantize(weight, theirs.step(weight, spec), spec)
    )


def test_weights_of_one_sign_have_both_magnitudes() -> None:
    start = LearnedTernary().initial(tf.constant(np.abs(normal((60, 2)))), grid(4))
    np.testing.assert_array_equal(start[0], start[1])


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(SpecError, match=r"Expected a threshold inside \[0, 1\), or None. Received"):
        LearnedTernary(threshold)


def test_one_bit_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"Expected a grid of 2 to 8 bits .* Use bits=2, or"):
        kqat.QuantizeConfig(weights=grid(1), weight_step="ttq")
