"""How runtimes multiply an integer by a real factor: each rounds in a way of its own.

Twice: LiteRT's own kernels and TFLite Micro, whose arithmetic is that of gemmlowp (Jacob et al.
2018, section 2.2, https://arxiv.org/abs/1712.05877): a product with 31 bits of the factor is
rounded, then shifted right and rounded again. Once: XNNPACK multiplies by a float32.
"""

import dataclasses
from typing import Any

import numpy as np

from kqat.kernels.arrays import Arrays


@dataclasses.dataclass(frozen=True)
class Factor:
    """`mantissa * 2**(shift - 31)`; both are numbers, or int64 arrays with one entry a channel."""

    mantissa: Any
    shift: Any


def fixed_point(real: Any) -> Factor:
    """A factor, or one per channel, as 31 bits and a power of two; 0 below 2**-32.

    `real` is used as float64; the kernels differ in what they divide in float32 before.
    """
    fraction, shift = np.frexp(np.asarray(real, np.float64))
    mantissa = np.sign(fraction) * np.floor(np.abs(fraction) * 2.0**31 + 0.5)
    over = np.abs(mantissa) == 2.0**31
    mantissa = np.where(over, mantissa / 2, mantissa).astype(np.int64)
    shift = np.where(over, shift + 1, shift).astype(np.int64)
    gone = shift < -31
    mantissa, shift = np.where(gone, 0, mantissa), np.where(gone, 0, shift)
    if mantissa.ndim == 0:
        return Factor(int(mantissa), int(shift))
    return Factor(mantissa, shift)


def halved_up(xp: Arrays, product: Any, bits: Any) -> Any:
    """`product / 2**bits`, halves towards positive infinity; int64."""
    return xp.right_shift(product + (1 << (bits - 1)), bits)


def divided(xp: Arrays, values: Any, bits: Any) -> Any:
    """`values / 2**bits`, halves away from zero; `bits` is a number or an array of them."""
    half = np.left_shift(np.int64(1), np.asarray(bits, np.int64)) >> 1
    nudge = xp.where(values < 0, np.maximum(half - 1, 0), half)
    return xp.right_shift(values + nudge, np.asarray(bits, np.int64))


def twice_rounded(xp: Arrays, values: Any, factor: Factor) -> Any:
    """`values * factor` as gemmlowp rounds it, halves away from zero in the end; int64."""
    high, right = _high(xp, values, factor)
    return divided(xp, high, right) if np.any(right) else high


def twice_rounded_up(xp: Arrays, values: Any, factor: Factor) -> Any:
    """The same as LiteRT's optimized matrix products (ruy) round it: halves go up; int64."""
    high, right = _high(xp, values, factor)
    half = np.left_shift(np.int64(1), right) >> 1
    return xp.right_shift(high + half, right) if np.any(right) else high


def _high(xp: Arrays, values: Any, factor: Factor) -> tuple[Any, np.ndarray]:
    """The product's upper half, and how far it is to be shifted to the right."""
    left = np.maximum(np.asarray(factor.shift, np.int64), 0)
    right = np.maximum(-np.asarray(factor.shift, np.int64), 0)
    wide = xp.cast(values, "int64")
    if np.any(left):
        wide = wide * np.left_shift(np.int64(1), left)
    return halved_up(xp, wide * np.asarray(factor.mantissa, np.int64), 31), right


def of_wide_sum(xp: Arrays, values: Any, factor: Factor) -> Any:
    """`values * factor` of int64 sums, by 15 bits of the factor and one rounding; int64."""
    mantissa = np.asarray(factor.mantissa, np.int64)
    reduced = np.where(mantissa < 0x7FFF0000, (mantissa + (1 << 15)) >> 16, 0x7FFF)
    shift = 15 - np.asarray(factor.shift, np.int64)
    half = np.left_shift(np.int64(1), shift - 1)
    return xp.right_shift(xp.cast(values, "int64") * reduced + half, shift)


def once_rounded(xp: Arrays, values: Any, factor: Any) -> Any:
    """`values * factor` in float32, rounded to the nearest, halves to even; float32."""
    return xp.round(xp.cast(values, "float32") * np.asarray(factor, np.float32))
