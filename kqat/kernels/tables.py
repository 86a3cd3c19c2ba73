"""Functions of one integer, as tables of every input: what a kernel computes, it computes there."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kqat.kernels.arrays import NUMPY, Arrays
from kqat.kernels.grids import Grid, onto
from kqat.kernels.rounding import Factor, fixed_point, twice_rounded


def integers_of(grid: Grid) -> np.ndarray:
    """Every integer of the grid, int64, ascending."""
    low, high = grid.limits
    return np.arange(low, high + 1, dtype=np.int64)


def look_up(xp: Arrays, table: Any, x: Any, grid: Grid) -> Any:
    """The table's entries at the integers `x` of `grid`."""
    return xp.take(table, x - grid.limits[0], axis=0)


def rescaled(given: Grid, result: Grid) -> np.ndarray:
    """QUANTIZE from integers to integers on LiteRT's own and the micro kernels."""
    factor = fixed_point(np.float64(given.scale) / np.float64(result.scale))
    steps = twice_rounded(NUMPY, integers_of(given) - given.zero_point, factor)
    return onto(NUMPY, steps, result)


def rescaled_by_xnnpack(given: Grid, result: Grid) -> np.ndarray:
    """The same on XNNPACK: the factor has 8 bits behind the point."""
    factor = _eight_bits(given.scale / result.scale)
    return onto(NUMPY, ((integers_of(given) - given.zero_point) * factor + 128) >> 8, result)


def relu(given: Grid, result: Grid, activation: str) -> np.ndarray:
    """RELU and RELU6 as operators of their own: rescaled, then clipped."""
    factor = fixed_point(np.float64(given.scale / result.scale))
    steps = twice_rounded(NUMPY, integers_of(given) - given.zero_point, factor)
    return onto(NUMPY, steps, result, activation)


def leaky_relu(given: Grid, result: Grid, slope: float) -> np.ndarray:
    """LEAKY_RELU: two factors, each divided in float32."""
    x = integers_of(given) - given.zero_point
    ratio = given.scale / result.scale
    tilt = given.scale * np.float32(slope) / result.scale
    above = twice_rounded(NUMPY, x, fixed_point(ratio))
    # The factor is kept positive: its sign comes back after the rounding.
    below = twice_rounded(NUMPY, x, fixed_point(abs(tilt))) * int(np.sign(tilt))
    return onto(NUMPY, np.where(x >= 0, above, below), result)


def leaky_relu_by_xnnpack(given: Grid, result: Grid, slope: float) -> np.ndarray:
    """The same with 8 bits behind the point."""
    x = integers_of(given) - given.zero_point
    ratio = given.scale / result.scale
    factor = np.where(x >= 0, _eight_bits(ratio), _eight_bits(ratio * np.float32(slope)))
    return onto(NUMPY, (x * factor + 128) >> 8, result)


def _eight_bits(factor: np.float32) -> int:
    return int(np.rint(np.float32(256.0) * factor))


Function = Callable[[np.ndarray], np.ndarray]


def sampled(given: Grid, result: Grid, function: Function) -> np.ndarray:
    """The function at each input in float32, as LiteRT fills its own tables.

    `function` takes float64 and is rounded to float32, as the C library's is.
    """
    x = given.scale * (integers_of(given) - given.zero_point).astype(np.float32)
    value = _in_float32(function, x) * (np.float32(1) / result.scale)
    return onto(NUMPY, _half_away(value).astype(np.int64), result)


def sampled_by_xnnpack(given: Grid, result: Grid, function: Function) -> np.ndarray:
    """The same as XNNPACK does, which adds the zero point before it rounds to even."""
    x = (integers_of(given) - given.zero_point).astype(np.float32) * given.scale
    value = _in_float32(function, x) * (np.float32(1) / result.scale)
    steps = np.rint(value + np.float32(result.zero_point)).astype(np.int64)
    return np.clip(steps, *result.limits).astype(np.int32)


def _in_float32(function: Function, x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return function(x.astype(np.float64)).astype(np.float32)


def _half_away(value: np.ndarray) -> np.ndarray:
    return np.sign(value) * np.floor(np.abs(value).astype(np.float64) + 0.5)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Of floats, without overflow."""
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), 1 - 1 / (1 + np.exp(-np.abs(x))))


def elu(x: np.ndarray) -> np.ndarray:
    """Of floats."""
    return np.where(x < 0, np.expm1(np.minimum(x, 0)), x)


def elu_by_micro(x: np.ndarray) -> np.ndarray:
    """Of floats, as TFLite Micro computes it: of tiny ones, exp is one or the float32 below it."""
    exp = np.exp(np.minimum(x, 0)).astype(np.float32)
    return np.where(x < 0, exp.astype(np.float64) - 1, x)


def _high(a: Any, b: Any) -> np.ndarray:
    """The upper 16 bits of twice the product, rounded; saturating."""
    return np.minimum((np.asarray(a) * np.asarray(b) + (1 << 14)) >> 15, 2**15 - 1)


def _sixteen(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -(2**15), 2**15 - 1)


def hard_swish(given: Grid, result: Grid) -> np.ndarray:
    """HARD_SWISH in 16-bit fixed point."""
    x = (integers_of(given) - given.zero_point) << 7
    fine = given.scale * np.float32(1 / 128)
    output = fixed_point(fine / result.scale)
    relu_like = fixed_point(fine / np.float32(3 / 32768))
    scaled = _high(x, _short(output))
    part = x
    if relu_like.shift > 0:
        part = _sixteen(part << (relu_like.shift - 1))
    part = _high(part, _short(relu_like))
    if relu_like.shift > 0:
        part = _sixteen(part << 1)
    if relu_like.shift < 0:
        part = twice_halved(part, -relu_like.shift)
    part = (part + 2**15) >> 1
    # Multiplied like `_high`, but cut off towards zero.
    product = part * scaled
    product = np.sign(product) * (np.abs(product) >> 15)
    return onto(NUMPY, twice_halved(product, -output.shift), result)


def twice_halved(values: np.ndarray, bits: int) -> np.ndarray:
    """`values / 2**bits`, halves away from zero."""
    half = (1 << bits) >> 1
    return np.sign(values) * ((np.abs(values) + half) >> bits)


def _short(factor: Factor) -> int:
    """A mantissa of 16 bits."""
    return int(min((factor.mantissa + (1 << 15)) >> 16, 2**15 - 1))


def gelu(x: np.ndarray) -> np.ndarray:
    """Of floats, by the error function."""
    return 0.5 * x * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x.ravel()]))
