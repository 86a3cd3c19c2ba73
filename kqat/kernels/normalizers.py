"""Over the last axis: SOFTMAX, LOG_SOFTMAX, L2_NORMALIZATION; LOGISTIC and TANH in fixed point."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kqat.kernels import fixed_point
from kqat.kernels.arrays import NUMPY, Arrays
from kqat.kernels.grids import Grid, onto
from kqat.kernels.lstm_arithmetic import interpolated_sigmoid, interpolated_tanh
from kqat.kernels.rounding import Factor, divided, halved_up, twice_rounded
from kqat.kernels.rounding import fixed_point as as_factor
from kqat.kernels.tables import integers_of

_BITS = 31
# Before the point, of what exp is taken of and of a sum of exps.
_DIFFERENCE_BITS, _SUM_BITS = 5, 12


def squashed(given: Grid, result: Grid, kind: str) -> np.ndarray:
    """LOGISTIC or TANH of int8 on the micro kernels, as a table."""
    x = integers_of(given) - given.zero_point
    bits = 4
    factor = as_factor(np.float64(given.scale) * 2.0 ** (_BITS - bits))
    radius = _radius(bits, factor.shift)
    low, high = result.limits
    inner = np.clip(x, -radius, radius)
    rescaled = twice_rounded(NUMPY, inner, factor)
    function, behind = (fixed_point.sigmoid, 8) if kind == "LOGISTIC" else (fixed_point.tanh, 7)
    steps = onto(NUMPY, divided(NUMPY, function(rescaled, bits, _BITS), _BITS - behind), result)
    return np.where(x <= -radius, low, np.where(x >= radius, high, steps)).astype(np.int32)


def squashed_of_int16(given: Grid, kind: str) -> np.ndarray:
    """LOGISTIC or TANH of int16: interpolated between 256 values of sigmoid, as a table."""
    x = integers_of(given)
    power = math.log2(float(given.scale))
    rounded = round(power)
    # log2 of what is not quite a power of two, as the kernels test it.
    exact = abs(power - rounded) < 1e-3
    shift = 12 + rounded
    if exact and (shift == 0 if kind == "LOGISTIC" else shift in (0, 1)):
        multiplier, shift = 3 << shift, 0
    else:
        real, shift = float(given.scale) * 4096.0 * 3.0, 0
        while real <= 32767.0 / 2.0 and shift <= 30:
            real, shift = real * 2.0, shift + 1
        multiplier = int(real)
    half = (1 << shift) >> 1
    scaled = (x * multiplier + half) >> shift
    return (interpolated_sigmoid if kind == "LOGISTIC" else interpolated_tanh)(scaled)


def _radius(bits: int, shift: int) -> int:
    """The largest integer that, rescaled, still has so many bits before the point."""
    return math.floor(((1 << bits) - 1) * 2.0 ** (_BITS - bits) / 2.0**shift)


def _exps(given: Grid, beta: float) -> tuple[np.ndarray, Factor, int]:
    """exp of each difference from 0 to -255, the factor before it, and the least difference."""
    real = min(beta * np.float64(given.scale) * 2.0 ** (_BITS - _DIFFERENCE_BITS), 2.0**31 - 1)
    factor = as_factor(real)
    least = -_radius(_DIFFERENCE_BITS, factor.shift)
    differences = -np.arange(256, dtype=np.int64)
    usable = np.maximum(differences, least)
    table = fixed_point.exp_of_negative(
        twice_rounded(NUMPY, usable, factor), _DIFFERENCE_BITS, _BITS
    )
    return np.where(differences >= least, table, 0), factor, least


def softmax(xp: Arrays, x: Any, given: Grid, result: Grid, beta: float) -> Any:
    """SOFTMAX of int8 in fixed point, on the reference and micro kernels."""
    table, _, _ = _exps(given, beta)
    x = xp.cast(x, "int32")
    below = xp.max(x, axis=-1, keepdims=True) - x
    exps = xp.take(table, below, axis=0)
    parts = xp.take(divided(NUMPY, table, _SUM_BITS), below, axis=0)
    total = xp.sum(parts, axis=-1, keepdims=True)
    reciprocal, over = _reciprocal(xp, total)
    output_bits = 16 if result.wide else 8
    exponent = over + (31 - output_bits)
    scaled = halved_up(xp, exps * reciprocal, 31)
    half = xp.right_shift(xp.left_shift(xp.ones_like(exponent), exponent), 1)
    steps = xp.right_shift(scaled + half, exponent)
    low, high = result.limits
    return xp.cast(xp.clip(steps + low, low, high), "int32")


def _reciprocal(xp: Arrays, total: Any) -> tuple[Any, Any]:
    """1 / total as a fraction, and the bits that `total` has above one; total has 12 there."""
    headroom = 32 - _bits(xp, total)
    shifted = xp.left_shift(total, headroom) - (1 << 31)
    half = xp.right_shift(shifted + (1 << 31), 1)
    return _newton(xp, half), _SUM_BITS - headroom


def _bits(xp: Arrays, x: Any) -> Any:
    """How many bits each of `x`, int64 from 0 to 2**32 - 1, has."""
    found = xp.zeros_like(x)
    for power in range(32):
        found = found + xp.cast(x >= (1 << power), "int64")
    return found


def _newton(xp: Arrays, half: Any) -> Any:
    """`fixed_point.reciprocal` on arrays of either kind, from half the denominator."""

    def constant(value: float) -> int:
        return fixed_point.constant(value, 2, _BITS)

    def times(a: Any, b: Any) -> Any:
        return halved_up(xp, a * b, 31)

    low, high = fixed_point.limits(_BITS)
    x = times(half, constant(-32 / 17)) + constant(48 / 17)
    for _ in range(3):
        missing = (1 << (_BITS - 2)) - times(half, x)
        x = x + xp.clip(times(x, missing) * 4, low, high)
    return xp.clip(x * 2, low, high)


def softmax_in_float32(xp: Arrays, x: Any, given: Grid, result: Grid, beta: float) -> Any:
    """SOFTMAX of int8 on LiteRT's optimized kernels: exps from a table, added in turn."""
    x = xp.cast(x, "int32")
    table = _float_exps(given, beta)
    exps = xp.take(table, xp.max(x, axis=-1, keepdims=True) - x, axis=0)
    inverse = np.float32(1) / (_in_turn(exps) * result.scale)
    scaled = exps * xp.expand_dims(inverse, -1)
    whole = xp.floor(scaled)
    steps = whole + xp.cast(scaled - whole >= 0.5, "float32")
    low, high = result.limits
    return xp.cast(xp.clip(steps + result.zero_point, low, high), "int32")


def _float_exps(given: Grid, beta: float) -> np.ndarray:
    """exp of each difference from 0 to -255 in float32."""
    scale = np.float32(-given.scale * np.float32(beta))
    arguments = (scale * np.arange(256, dtype=np.float32)).astype(np.float64)
    return np.exp(arguments).astype(np.float32)


def _in_turn(x: Any) -> Any:
    """The sum over the last axis, first to last: floats in another order round differently."""
    total = x[..., 0]
    for index in range(1, x.shape[-1]):
        total = total + x[..., index]
    return total


def l2_normalize(xp: Arrays, x: Any, given: Grid, result: Grid) -> Any:
    """L2_NORMALIZATION of int8: the reciprocal root by five steps of Newton."""
    x = xp.cast(x, "int64") - given.zero_point
    total = xp.sum(x * x, axis=-1, keepdims=True)
    root, shift = _reciprocal_root(xp, total)
    # The output's scale is 2**-7; a positive shift goes to the right.
    right = shift - 7
    left_by = xp.maximum(-right, 0)
    high = halved_up(xp, xp.left_shift(x, left_by) * root, 31)
    right = xp.maximum(right, 0)
    half = xp.right_shift(xp.left_shift(xp.ones_like(right), right), 1)
    nudge = xp.where(high < 0, xp.maximum(half - 1, 0), half)
    steps = xp.right_shift(high + nudge, right)
    return xp.cast(xp.clip(steps + result.zero_point, *result.limits), "int32")


def _reciprocal_root(xp: Arrays, total: Any) -> tuple[Any, Any]:
    """1 / sqrt(total) as a fraction of 31 bits, and the bits to shift it to the right."""
    value = xp.maximum(total, 2)
    shift = xp.zeros_like(value) + 11
    for _ in range(2):  # 2**33 at the most, as int32 holds it
        large = value >= (1 << 29)
        shift = shift + xp.cast(large, "int64")
        value = xp.where(large, xp.right_shift(value, 2), value)
    pairs = xp.right_shift(31 - _bits(xp, value), 1) - 1
    shift = shift - pairs
    value = xp.left_shift(value, 2 * pairs)

    def times(a: Any, b: Any) -> Any:
        return halved_up(xp, a * b, 31)

    limits = fixed_point.limits(_BITS)
    half = xp.right_shift(xp.right_shift(value, 1) + 1, 1)
    x = xp.zeros_like(value) + (1 << 28)
    for _ in range(5):
        cube = xp.clip(times(times(x, x), x) * 64, *limits)
        x = xp.clip((times((1 << 28) + (1 << 27), x) - times(half, cube)) * 8, *limits)
    x = times(x, 1518500250)
    # Below zero the shift goes into the number.
    x = xp.left_shift(x, xp.maximum(-shift, 0))
    shift = xp.maximum(shift, 0)
    tiny = total <= 1
    return xp.where(tiny, limits[1], x), xp.where(tiny, 0, shift)


def _interpolation_points(
    scale: float, zero_point: int, function: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """A function of int16 at 513 points, in steps of 2 / 65535.

    Each is moved by half the error that lies between it and the next.
    """
    one = np.float32
    step_in, step_out = one(scale), one(2.0 / 65535.0)
    low, high = (step_in * one(end - zero_point) for end in (-(2**15), 2**15 - 1))
    span = step_out * one(2**15 - 1) - step_out * one(-(2**15))
    inverse = one(65536.0) / span
    step = (high - low) / one(512)
    i = np.arange(512, dtype=np.float32)

    def at(x: np.ndarray) -> np.ndarray:
        return function(x.astype(np.float64)).astype(np.float32) * inverse

    here, middle, after = (
        at(low + i * step),
        at(low + i * step + step / 2),
        at(low + (i + 1) * step),
    )
    between = _half_away((after + _half_away(here)) / one(2))
    bias = _half_away((between - _half_away(middle)) / one(2))
    points = np.append(_half_away(here) - bias, _half_away(at(np.asarray([high]))))
    return np.clip(points, -(2**15), 2**15 - 1).astype(np.int64)


def _half_away(x: np.ndarray) -> np.ndarray:
    return (np.sign(x) * np.floor(np.abs(x).astype(np.float64) + 0.5)).astype(np.float32)


def _interpolated(points: np.ndarray) -> np.ndarray:
    """The values at all int16, between the points."""
    x = np.arange(-(2**15), 2**15)
    entry, offset = 256 + (x >> 7), x & 0x7F
    return points[entry] + (((points[entry + 1] - points[entry]) * offset + 64) >> 7)


def softmax_of_int16(xp: Arrays, x: Any, given: Grid, result: Grid, beta: float) -> Any:
    """SOFTMAX of int16: exp over 10 units and 1 / (1 + x), both interpolated."""
    exp = _interpolated(_interpolation_points(10.0 / 65535.0, 2**15 - 1, np.exp))
    inverse = _interpolated(
        _interpolation_points(1.0 / 65535.0, -(2**15), lambda v: 1.0 / (1.0 + v))
    )
    factor = as_factor(np.float64(given.scale) * beta / (10.0 / 65535.0))
    x = xp.cast(x, "int64")
    below = twice_rounded(xp, x - xp.max(x, axis=-1, keepdims=True), factor)
    exps = xp.take(exp, xp.clip(below + 2**16 - 1, 0, 2**16 - 1), axis=0)
    total = xp.sum(exps, axis=-1, keepdims=True)
    headroom = 32 - _bits(xp, total)
    moved = xp.right_shift(xp.left_shift(total, headroom - 1) + (1 << 13), 14)
    place = xp.clip(moved - ((1 << 15) + (1 << 16)), -(2**15), 2**15 - 1)
    scaled = exps * xp.take(inverse, place + 2**15, axis=0)
    right = 31 - headroom
    steps = xp.right_shift(scaled + xp.left_shift(xp.ones_like(right), right - 1), right)
    return xp.cast(xp.clip(steps, 0, result.limits[1]), "int32")


def log_softmax(xp: Arrays, x: Any, given: Grid, result: Grid) -> Any:
    """LOG_SOFTMAX of int8 in fixed point, on the reference and micro kernels."""
    table, factor, least = _exps(given, 1.0)
    back = as_factor((1 << (31 - factor.shift)) / factor.mantissa)
    x = xp.cast(x, "int32")
    below = xp.max(x, axis=-1, keepdims=True) - x
    parts = xp.take(divided(NUMPY, table, _SUM_BITS), below, axis=0)
    log = _log(xp, xp.sum(parts, axis=-1, keepdims=True))
    smallest = xp.maximum(twice_rounded(xp, log - 2**31, back), least - 1)
    fine = twice_rounded(NUMPY, -np.arange(256, dtype=np.int64), factor)
    steps = divided(xp, xp.take(fine, below, axis=0) - log, _BITS - _DIFFERENCE_BITS - 4)
    low, high = result.limits
    steps = xp.clip(steps + result.zero_point, low, high)
    return xp.cast(xp.where(-xp.cast(below, "int64") > smallest, steps, low), "int32")


def _log(xp: Arrays, z: Any) -> Any:
    """log(z) with 5 integer bits, of `z >= 1` with 12."""
    bits, accumulated = _BITS, 6
    low, high = fixed_point.limits(bits)

    def times(a: Any, b: Any) -> Any:
        return halved_up(xp, a * b, 31)

    def fraction(value: float) -> int:
        return fixed_point.constant(value, 0, bits)

    root4 = 2.0**0.25
    quarter = fraction(0.25) >> accumulated
    headroom = 32 - _bits(xp, z)
    a = xp.clip(times(xp.left_shift(z, headroom - 1), fraction(math.sqrt(0.5))) * 2, low, high)
    a_power = (_SUM_BITS - headroom) * (1 << (bits - accumulated)) + quarter
    b_headroom = 31 - _bits(xp, times(z, fraction(math.sqrt(0.5))))
    b = xp.clip(xp.left_shift(z, b_headroom), low, high)
    b_power = (_SUM_BITS - b_headroom) * (1 << (bits - accumulated)) - quarter
    r, power = xp.minimum(a, b), xp.maximum(a_power, b_power)
    middle = fraction(0.5**0.25)
    p, q = xp.right_shift(r + middle + 1, 1), (r - middle) * 2
    square = times(q, q)
    top = times(q, r) + times(times(q, square), fraction(11.0 / 240.0 * root4))
    inner = q + times(square, fraction(root4 / 20.0)) + fraction(2.0 / root4 - root4)
    under = times(p, inner) + times(q, fraction(root4 / 4.0))
    reciprocal = _newton(xp, xp.right_shift(under + (1 << 31), 1))
    total = times(power, fraction(math.log(2.0)))
    total = total + times(divided(xp, top, accumulated), reciprocal)
    return xp.clip(total * 2, low, high)


def log_softmax_in_float32(xp: Arrays, x: Any, given: Grid, result: Grid, scale: Any) -> Any:
    """LOG_SOFTMAX of int8 on LiteRT's optimized kernels; `scale` is the result's, as an array."""
    table = _float_exps(given, 1.0)
    x = xp.cast(x, "int32")
    most = xp.max(x, axis=-1, keepdims=True)
    total = xp.expand_dims(_in_turn(xp.take(table, most - x, axis=0)), -1)
    log = xp.cast(xp.log(xp.cast(total, "float64")), "float32")
    precomputed = (xp.cast(most, "float32") * given.scale + log) / scale
    value = xp.cast(x, "float32") * (given.scale / result.scale) - precomputed
    low, high = result.limits
    return xp.cast(xp.clip(xp.round(value) + result.zero_point, low, high), "int32")
