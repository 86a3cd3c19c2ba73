"""Biases and weights in the file's layout, against exact arithmetic on fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kqat.freezing.frozen_weight import FrozenWeight
from kqat.grids.bias import LARGEST_BIAS
from tflite_export.kernels.weight_layout import Weights, fit_bias

# From dead channels, far below one step of anything, to scales far above the usual.
SCALES = st.floats(2.0**-60, 2.0**4, width=32)
BIASES = st.floats(-(2.0**12), 2.0**12, width=32)
INTEGERS = st.integers(-127, 127)
# The quotient of bias and scales is rounded to float64 before it is rounded to an integer of at
# most 30 bits: 2**30 * 2**-53.
QUOTIENT = Fraction(1, 2**23)
# A scale that was enlarged is rounded to float32 (half a unit of 24 bits), so the bias may end
# that much above its limit.
BIAS_LIMIT = LARGEST_BIAS[8]
LARGEST = Fraction(BIAS_LIMIT) * (1 + Fraction(1, 2**24)) + 1


def f32(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Weights, np.ndarray, np.float32]:
    """Weights of shape (channels, inputs), one scale per channel or one, bias, input scale."""
    channels, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    scales = draw(st.sampled_from([1, channels]))
    integers = draw(hnp.arrays(np.int8, (channels, inputs), elements=INTEGERS))
    scale = draw(hnp.arrays(np.float32, scales, elements=SCALES))
    bias = draw(hnp.arrays(np.float32, channels, elements=BIASES))
    input_scale = np.float32(draw(st.floats(2.0**-20, 1.0, width=32)))
    return Weights(integers, scale, 0), bias, input_scale


def exact(array: np.ndarray, size: int) -> list[Fraction]:
    """The values as fractions; one value serves all."""
    return [Fraction(float(v)) for v in np.broadcast_to(array, size)]


@given(layers())
def test_the_bias_is_the_nearest_integer(layer: tuple[Weights, np.ndarray, np.float32]) -> None:
    weights, bias = fit_bias(*layer)
    count = len(layer[1])
    products = [s * Fraction(float(layer[2])) for s in exact(weights.scale, count)]
    for integer, real, product in zip(bias.integers, exact(layer[1], count), products, strict=True):
        assert abs(int(integer) - real / product) <= Fraction(1, 2) + QUOTIENT
        assert abs(int(integer)) <= LARGEST
    expected = weights.scale.astype(np.float64) * np.float64(layer[2])
    np.testing.assert_array_equal(bias.scale, expected.astype(np.float32))
    assert bias.integers.dtype == np.int32


@given(layers())
def test_weights_move_by_half_a_step_and_only_where_the_bias_would_overflow(
    layer: tuple[Weights, np.ndarray, np.float32],
) -> None:
    before, real, input_scale = layer
    after, _ = fit_bias(*layer)
    products = [s * Fraction(float(input_scale)) for s in exact(before.scale, len(real))]
    overflows = [
        abs(b) > BIAS_LIMIT * p for b, p in zip(exact(real, len(real)), products, strict=True)
    ]
    if len(before.scale) == 1:
        overflows = [any(overflows)] * len(real)
    scales = zip(exact(before.scale, len(real)), exact(after.scale, len(real)), strict=True)
    for channel, (old, new) in enumerate(scales):
        if not overflows[channel]:
            assert new == old
            np.testing.assert_array_equal(after.integers[channel], before.integers[channel])
        for a, b in zip(before.integers[channel], after.integers[channel], strict=True):
            # The ratio of the scales is rounded to float64: 127 * 2**-53, below 2**-46.
            assert abs(int(a) * old - int(b) * new) <= new * (Fraction(1, 2) + Fraction(1, 2**46))
            assert abs(int(b)) <= 127


def test_a_channel_that_would_overflow_gets_a_coarser_grid() -> None:
    weights = Weights(np.array([[100], [100]], np.int8), f32([2**-40, 2**-8]), 0)
    fitted, bias = fit_bias(weights, f32([1.0, 1.0]), np.float32(2**-8))
    # 2**-30 is the finest product on which a bias of 1 fits; 100 * 2**-40 is 0.02 of 2**-22.
    np.testing.assert_array_equal(fitted.scale, f32([2**-22, 2**-8]))
    np.testing.assert_array_equal(fitted.integers, [[0], [100]])
    np.testing.assert_array_equal(bias.integers, [2**30, 2**16])
    np.testing.assert_array_equal(bias.scale, f32([2**-30, 2**-16]))
    np.testing.assert_array_equal(weights.scale, f32([2**-40, 2**-8]))  # left alone


def test_one_scale_for_all_is_coarse_enough_for_the_largest_bias() -> None:
    weights = Weights(np.array([[64], [-128 + 1]], np.int8), f32([2**-30]), 0)
    fitted, bias = fit_bias(weights, f32([0.25, -1.0]), np.float32(2**-2))
    np.testing.assert_array_equal(fitted.scale, f32([2**-28]))
    np.testing.assert_array_equal(fitted.integers, [[16], [-32]])  # -31.75
    np.testing.assert_array_equal(bias.integers, [2**28, -(2**30)])


def test_zero_weights_keep_their_zeros() -> None:
    weights = Weights(np.zeros((2, 3), np.int8), f32([1.0, 2**-60]), 0)
    fitted, bias = fit_bias(weights, f32([3.0, 0.0]), np.float32(0.5))
    np.testing.assert_array_equal(fitted.integers, np.zeros((2, 3)))
    np.testing.assert_array_equal(bias.integers, [6, 0])


@pytest.mark.parametrize("integer", [-3, -2, 2, 3])
def test_ties_go_to_the_even_integer(integer: int) -> None:
    weights = Weights(np.ones((1, 1), np.int8), f32([1.0]), 0)
    _, bias = fit_bias(weights, f32([integer + 0.5]), np.float32(1.0))
    assert bias.integers[0] == np.rint(integer + 0.5)


def frozen(*shape: int) -> FrozenWeight:
    count = int(np.prod(shape))
    integers = (np.arange(count) % 255 - 127).astype(np.int8).reshape(shape)
    return FrozenWeight("w", integers, np.ones((1, 1, 1, shape[-1]), np.float32), 8, True)


def test_conv_weights_have_their_channels_first() -> None:
    kernel = frozen(3, 2, 4, 5)
    weights = Weights.in_file(kernel, (5, 3, 2, 4), (1, 2, 3, 0), 0)
    for channel in range(5):
        np.testing.assert_array_equal(weights.integers[channel], kernel.integers[..., channel])
    assert weights.scale.shape == (5,)
    assert weights.integers.flags.c_contiguous


def test_depthwise_weights_have_their_multipliers_next_to_each_other() -> None:
    kernel = frozen(3, 3, 4, 2)
    weights = Weights.in_file(kernel, (1, 3, 3, 8), (0, 1, 2, 3), 3)
    for channel in range(4):
        for multiple in range(2):
            np.testing.assert_array_equal(
                weights.integers[0, ..., 2 * channel + multiple],
                kernel.integers[..., channel, multiple],
            )
