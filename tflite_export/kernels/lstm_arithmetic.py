"""UNIDIRECTIONAL_SEQUENCE_LSTM on int8 in NumPy, bit for bit as each runtime has it.

Gates are sums of two products in Q3.12; sigmoid and tanh give Q0.15; the carry is int16 with a
scale that is a power of two, the output int8. TFLite Micro looks sigmoid and tanh up in one table
and rounds products twice; LiteRT computes both in 16-bit fixed point and rounds products by a
shift. Their outputs are a step apart now and then, which comes back in every later step, so that
no third arithmetic could tell a wrong file from a right one.

Facts: `lite/micro/kernels/lstm_eval.h` and `lite/kernels/lstm_eval.cc` of TensorFlow, 2026-08.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from kqat.freezing import GATES

# Q3.12, of the sums that a gate is a function of.
SUM_SCALE = np.float32(2.0**-12)
_INT16 = (-(2**15), 2**15 - 1)
_INT8 = (-128, 127)
# The micro kernels' table of sigmoid(i / 24) lies one above the rounded value at these i (a bit
# each): what their LOGISTIC and TANH give at all inputs allows no other bits.
_RAISED = int("800000000000000000000000000000800011009020440005c0467baefa7bd110", 16)

Integers = np.ndarray


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What one fused LSTM computes with.

    `kernels`, `recurrent_kernels` hold int8 of shape `(units, features)` and `(units, units)` by
    gate, `biases` int32 of shape `(units,)`, `kernel_scales` and `recurrent_scales` one number.
    `carry_power` is the binary logarithm of the carry's scale.
    """

    kernels: Mapping[str, Integers]
    kernel_scales: Mapping[str, np.float32]
    recurrent_kernels: Mapping[str, Integers]
    recurrent_scales: Mapping[str, np.float32]
    biases: Mapping[str, Integers]
    input_scale: np.float32
    input_zero_point: int
    output_scale: np.float32
    output_zero_point: int
    carry_power: int


@dataclasses.dataclass(frozen=True)
class _Arithmetic:
    """Where runtimes differ. `joins` adds the two products of a gate."""

    sigmoid: Callable[[Integers], Integers]
    tanh: Callable[[Integers, int], Integers]
    joins: Callable[[Integers, Integers], Integers]
    shifted: Callable[[Integers, int], Integers]
    output_factor: Callable[[np.float32], float]


def run_lstm(numbers: Numbers, x: Integers, runtime: str) -> Integers:
    """The outputs of all steps, int8 `(samples, steps, units)`, of int8 `x` from zero states.

    Args:
        numbers: weights and grids.
        x: shape `(samples, steps, features)`.
        runtime: a name in `tflite_export.runtimes.execution.RUNTIMES`.
    """
    arithmetic = _MICRO if runtime == "tflite_micro" else _LITERT
    factor = _fixed_point(arithmetic.output_factor(numbers.output_scale))
    units = len(numbers.biases["input"])
    h = np.full((len(x), units), numbers.output_zero_point, np.int64)
    c = np.zeros((len(x), units), np.int64)
    outputs = np.empty((*x.shape[:2], units), np.int8)
    shifted = arithmetic.shifted
    for step in range(x.shape[1]):
        sums = {gate: _sum(numbers, gate, x[:, step], h, arithmetic) for gate in GATES}
        i, f, o = (arithmetic.sigmoid(sums[gate]) for gate in ("input", "forget", "output"))
        g = arithmetic.tanh(sums["candidate"], -12)
        kept, new = shifted(f * c, 15), shifted(i * g, 30 + numbers.carry_power)
        c = np.clip(np.clip(kept, *_INT16) + np.clip(new, *_INT16), *_INT16)
        squashed = arithmetic.tanh(c, numbers.carry_power)
        h = np.clip(_rescaled(o * squashed, factor) + numbers.output_zero_point, *_INT8)
        outputs[:, step] = h
    return outputs


def _sum(
    numbers: Numbers, gate: str, x: Integers, h: Integers, arithmetic: _Arithmetic
) -> Integers:
    """The argument of one gate's function, Q3.12."""
    kernel, recurrent = numbers.kernels[gate], numbers.recurrent_kernels[gate]
    # The runtimes multiply the scales in float32.
    input_factor = np.float32(numbers.input_scale * numbers.kernel_scales[gate])
    state_factor = np.float32(numbers.output_scale * numbers.recurrent_scales[gate])
    fed = (x.astype(np.int64) - numbers.input_zero_point) @ kernel.astype(np.int64).T
    back = (h - numbers.output_zero_point) @ recurrent.astype(np.int64).T
    return arithmetic.joins(
        _rescaled(fed + numbers.biases[gate], _fixed_point(float(input_factor) / SUM_SCALE)),
        _rescaled(back, _fixed_point(float(state_factor) / SUM_SCALE)),
    )


def _fixed_point(factor: float | np.floating) -> tuple[int, int]:
    """A factor as an integer of 31 bits and a power of two: `mantissa * 2**(shift - 31)`."""
    fraction, shift = np.frexp(np.float64(factor))
    mantissa = int(np.floor(fraction * 2.0**31 + 0.5))
    if mantissa == 2**31:
        mantissa, shift = mantissa // 2, shift + 1
    return (mantissa, int(shift)) if shift >= -31 else (0, 0)


def _rescaled(values: Integers, factor: tuple[int, int]) -> Integers:
    """`values * factor`, rounded to 31 bits first and to integers then."""
    mantissa, shift = factor
    product = (values << max(shift, 0)) * mantissa
    return _divided(_halved_up(product, 31), max(-shift, 0))


def _halved_up(product: Integers, bits: int) -> Integers:
    """`product / 2**bits`, halves towards positive infinity, by a division that truncates."""
    half = 1 << (bits - 1)
    nudged = product + np.where(product >= 0, half, 1 - half)
    return np.sign(nudged) * (np.abs(nudged) >> bits)


def _divided(values: Integers, bits: int) -> Integers:
    """`values / 2**bits`, halves away from zero."""
    half = (1 << bits) >> 1
    return np.sign(values) * ((np.abs(values) + half) >> bits)


# TFLite Micro.


@functools.cache
def _sigmoids() -> Integers:
    """sigmoid(i / 24) in Q0.16 for 0 <= i < 256, as the micro kernels have it."""
    i = np.arange(256)
    table = np.floor(2.0**16 / (1.0 + np.exp(-i / 24.0)) + 0.5).astype(np.int64)
    return np.minimum(table + np.array([_RAISED >> int(k) & 1 for k in i]), 2**16 - 1)


def _interpolated(position: Integers, bits: int, most: int) -> Integers:
    """The table between its entries, whose distance is `2**bits`; `most` beyond its end."""
    entry = position >> bits
    table = _sigmoids()
    low, high = (table[np.minimum(entry + k, 255)] for k in (0, 1))
    inside = (low << bits) + (position & ((1 << bits) - 1)) * (high - low)
    return np.where(entry >= 255, most, inside)


def _micro_sigmoid(x: Integers) -> Integers:
    result = _interpolated(np.abs(3 * x), 9, 0x7FFF << 10)
    return np.where(x >= 0, result + (1 << 9), (1 << 25) - result + (1 << 9) - 1) >> 10


def _micro_tanh(x: Integers, power: int) -> Integers:
    """Of Q0.15 `x * 2**(15 + power)`; tanh(x) == 2 sigmoid(2 x) - 1."""
    shift = 12 + power
    scaled = 3 * x << shift if shift >= 0 else (3 * x + (1 << (-shift - 1))) >> -shift
    result = _interpolated(np.abs(scaled), 8, 0xFFFF << 8) - (1 << 23)
    return np.where(scaled >= 0, result + (1 << 7), -result + (1 << 7) - 1) >> 8


def _micro_joins(fed: Integers, back: Integers) -> Integers:
    return np.clip(np.clip(fed, *_INT16) + np.clip(back, *_INT16), *_INT16)


def _micro_shifted(product: Integers, bits: int) -> Integers:
    """Halves twice: by one bit, then by the others."""
    return _rescaled(product, _fixed_point(2.0**-bits))


# LiteRT, in gemmlowp's 16-bit fixed point (Jacob and Warden, `fixedpoint/fixedpoint.h`).


def _product(a: Integers | int, b: Integers | int) -> Integers:
    return np.minimum(_halved_up(np.asarray(a) * np.asarray(b), 15), _INT16[1])


def _left(values: Integers, bits: int) -> Integers:
    return np.clip(values << bits, *_INT16)


def _constant(value: float, integer_bits: int = 0) -> int:
    return int(np.clip(np.rint(value * 2.0 ** (15 - integer_bits)), *_INT16))


def _exp_of_negative(a: Integers, integer_bits: int) -> Integers:
    """exp(a) in Q0.15, of `a <= 0` with so many integer bits."""
    fraction_bits = 15 - integer_bits
    quarter = 1 << fraction_bits >> 2
    rest = (a & (quarter - 1)) - quarter
    x = _left(rest, integer_bits) + (1 << 12)  # a Taylor series around -1/8
    x2 = _product(x, x)
    x3, x4 = _product(x2, x), _product(x2, x2)
    series = _divided(_product(_divided(x4, 2) + x3, _constant(1 / 3)) + x2, 1)
    middle = _constant(np.exp(-1 / 8))
    result = np.clip(middle + _product(middle, x + series), *_INT16)
    remainder = rest - a
    for exponent in range(-2, integer_bits):
        bit = remainder & (1 << (fraction_bits + exponent))
        result = np.where(bit, _product(result, _constant(np.exp(-(2.0**exponent)))), result)
    if integer_bits > 5:
        result = np.where(a < -(1 << (36 - integer_bits - 16)), 0, result)
    return np.where(a == 0, _INT16[1], result)


def _reciprocal(a: Integers) -> Integers:
    """2 / (1 + a) in Q2.13, of `a` in Q0.15 between 0 and 1, by three steps of Newton."""
    total = a + _INT16[1]
    half = (total + 1) // 2
    x = _constant(48 / 17, 2) + _product(half, _constant(-32 / 17, 2))
    for _ in range(3):
        missing = (1 << 13) - _product(half, x)
        x = x + _left(_product(x, missing), 2)
    return x


def _litert_sigmoid(x: Integers) -> Integers:
    positive = _left(_reciprocal(_exp_of_negative(-np.abs(x), 3)), 1)
    return np.where(x == 0, 1 << 14, np.where(x > 0, positive, _INT16[1] - positive))


def _litert_tanh(x: Integers, power: int) -> Integers:
    doubled = _reciprocal(_exp_of_negative(-np.abs(x), 15 + power + 1))
    positive = _left(doubled - (1 << 13), 2)
    return np.where(x == 0, 0, np.sign(x) * positive)


def _litert_joins(fed: Integers, back: Integers) -> Integers:
    return np.clip(np.clip(fed, *_INT16) + back, *_INT16)


_MICRO = _Arithmetic(
    sigmoid=_micro_sigmoid,
    tanh=_micro_tanh,
    joins=_micro_joins,
    shifted=_micro_shifted,
    output_factor=lambda scale: 2.0**-30 / float(scale),
)
_LITERT = _Arithmetic(
    sigmoid=_litert_sigmoid,
    tanh=_litert_tanh,
    joins=_litert_joins,
    shifted=_divided,
    output_factor=lambda scale: float(np.float32(2.0**-30 / float(scale))),
)
