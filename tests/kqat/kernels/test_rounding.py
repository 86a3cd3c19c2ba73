"""Integers times factors: against exact rational arithmetic, and NumPy against Keras."""

from fractions import Fraction
from typing import Any

import keras
import numpy as np
import pytest

from kqat.kernels.arrays import KERAS, NUMPY
from kqat.kernels.rounding import (
    Factor,
    divided,
    fixed_point,
    of_wide_sum,
    once_rounded,
    twice_rounded,
    twice_rounded_up,
)

VALUES = np.array([-(2**30), -9999, -758, -3, -2, -1, 0, 1, 2, 3, 6, 758, 9999, 2**30])


def half_away(x: Fraction) -> int:
    size = abs(x) + Fraction(1, 2)
    return (1 if x >= 0 else -1) * (size.numerator // size.denominator)


def half_up(x: Fraction) -> int:
    moved = x + Fraction(1, 2)
    return moved.numerator // moved.denominator


@pytest.mark.parametrize("real", [0.75, 0.1, 2.0**-9, 3.7, 1.0])
def test_factors_are_rounded_as_they_are_said_to_be(real: float) -> None:
    factor = fixed_point(real)
    assert 2**30 <= factor.mantissa < 2**31
    assert abs(factor.mantissa * 2.0 ** (factor.shift - 31) / real - 1) < 2.0**-30
    left, right = 2 ** max(factor.shift, 0), 2 ** max(-factor.shift, 0)
    for ending, function in ((half_away, twice_rounded), (half_up, twice_rounded_up)):
        expected = [
            ending(Fraction(half_up(Fraction(int(v) * left * factor.mantissa, 2**31)), right))
            for v in VALUES
        ]
        assert function(NUMPY, VALUES, factor).tolist() == expected


def test_both_ways_to_round_twice_differ_in_halves_below_zero() -> None:
    half = Factor(2**30, 0)  # 0.5, of one rounding
    quarter = Factor(2**30, -1)
    assert twice_rounded(NUMPY, np.array([-1]), half).tolist() == [0]
    assert twice_rounded(NUMPY, np.array([-2, 2]), quarter).tolist() == [-1, 1]
    assert twice_rounded_up(NUMPY, np.array([-2, 2]), quarter).tolist() == [0, 1]


def test_wide_sums_are_multiplied_by_15_bits() -> None:
    factor = fixed_point(0.3)
    reduced = (factor.mantissa + 2**15) >> 16
    values = np.array([-(2**40), -7, 0, 7, 2**40])
    expected = [half_up(Fraction(int(v) * reduced, 2 ** (15 - factor.shift))) for v in values]
    assert of_wide_sum(NUMPY, values, factor).tolist() == expected


def test_division_leaves_zero_bits_alone() -> None:
    values = np.array([-3, -2, -1, 0, 1, 2, 3])
    assert divided(NUMPY, values, 0).tolist() == values.tolist()
    assert divided(NUMPY, values, 1).tolist() == [-2, -1, -1, 0, 1, 1, 2]


def test_tiny_factors_are_zero() -> None:
    assert fixed_point(2.0**-40) == Factor(0, 0)


def test_once_is_float32_and_halves_go_to_even() -> None:
    assert once_rounded(NUMPY, np.array([1, 3, 5]), 0.5).tolist() == [0.0, 2.0, 2.0]
    # 2**24 + 1 has no float32.
    assert once_rounded(NUMPY, np.array([2**24 + 1]), 1.0).tolist() == [2.0**24]


@pytest.mark.parametrize("function", [twice_rounded, twice_rounded_up, of_wide_sum])
def test_keras_computes_the_same(function: Any) -> None:
    values = np.random.default_rng(0).integers(-(2**30), 2**30, (500, 3))
    factor = fixed_point(np.array([0.3, 2.0**-8, 1.7]))
    found = function(KERAS, keras.ops.convert_to_tensor(values, "int64"), factor)
    np.testing.assert_array_equal(np.asarray(found), function(NUMPY, values, factor))
