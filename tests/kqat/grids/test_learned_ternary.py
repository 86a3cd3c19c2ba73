"""TTQ against a reading of its equations in NumPy."""

import numpy as np
import pytest
import tensorflow as tf

import kqat
from kqat.base.errors import SpecError
from kqat.grids.weight_steps.learned_ternary import LearnedTernary
from tests.kqat.step_cases import grid, normal

THRESHOLD = 0.3


def papers(
    weight: np.ndarray, positive: np.ndarray, negative: np.ndarray, upstream: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Zhu et al. 2017, equations 6 to 8, in float64: output, d/dWp, d/dWn, d/dw."""
    limit = THRESHOLD * np.abs(weight).max(axis=0, keepdims=True)
    up, down = weight > limit, weight < -limit
    value = np.where(up, positive, np.where(down, -negative, 0.0))
    slope = np.where(up, positive, np.where(down, negative, 1.0))
    sums = [np.sum(upstream * up, 0, keepdims=True), -np.sum(upstream * down, 0, keepdims=True)]
    return value, *sums, upstream * slope


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_and_gradients_are_the_papers(bits: int) -> None:
    weight, upstream, spec = normal((40, 3)), normal((40, 3), 1), grid(bits)
    method, qmax = LearnedTernary(THRESHOLD), 2 ** (bits - 1) - 1
    given = np.float32([[[0.9, 0.5, 1.3]], [[0.4, 0.7, 1.2]]])[: 1 if bits == 2 else 2]
    w, variable = tf.Variable(weight), tf.Variable(given)
    with tf.GradientTape() as tape:
        step = method.scale(variable + 0.0, spec)
        rounded = method.fake_quantize(w + 0.0, step, spec)
    got = tape.gradient(rounded, [w, variable], upstream)
    scale = given.max(axis=0) / np.float32(qmax)
    np.testing.assert_array_equal(method.grid_scale(step, spec), scale)
    held = np.maximum(np.rint(given / scale), 1) * scale
    value, up, down, passed = papers(weight, held[0], held[-1], upstream)
    np.testing.assert_array_equal(rounded, value.astype(np.float32))
    np.testing.assert_allclose(got[0], passed, rtol=1e-6)
    expected = np.stack([up, down]) if bits > 2 else np.stack([up + down])
    np.testing.assert_allclose(got[1], expected, rtol=1e-4, atol=1e-5)
    # What it becomes lies on the grid, with at most three values in a channel.
    integers = np.asarray(rounded) / scale
    np.testing.assert_allclose(integers, np.rint(integers), atol=1e-5)
    assert all(len(np.unique(integers[:, c])) == 3 for c in range(3))
    assert np.abs(np.rint(integers)).max() == qmax


def test_it_starts_at_the_mean_magnitudes() -> None:
    weight = normal((60, 2))
    limit = THRESHOLD * np.abs(weight).max(0, keepdims=True)
    up = [weight[weight[:, c] > limit[0, c], c].mean() for c in range(2)]
    down = [-weight[weight[:, c] < -limit[0, c], c].mean() for c in range(2)]
    got = LearnedTernary(THRESHOLD).initial(tf.constant(weight), grid(4))
    np.testing.assert_allclose(got, np.float32([[up], [down]]), rtol=1e-5)


def test_weights_of_one_sign_have_both_magnitudes() -> None:
    start = LearnedTernary().initial(tf.constant(np.abs(normal((60, 2)))), grid(4))
    np.testing.assert_array_equal(start[0], start[1])


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(SpecError, match=r"Expected a threshold inside \[0, 1\). Received"):
        LearnedTernary(threshold)


def test_one_bit_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"Expected a grid of 2 to 8 bits .* Use bits=2, or"):
        kqat.QuantizeConfig(weights=grid(1), weight_step="ttq")
