"""UNIDIRECTIONAL_SEQUENCE_LSTM on int8, bit for bit as each runtime has it.

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
from typing import Any

import numpy as np

from kqat.kernels import fixed_point, rounding
from kqat.kernels.arrays import NUMPY, Arrays

# In the order of the operator's inputs, which is that of Keras's columns.
GATES = ("input", "forget", "candidate", "output")
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
    joins: Callable[[Arrays, Any, Any], Any]
    shifted: Callable[[Arrays, Any, int], Any]
    output_factor: Callable[[np.float32], float]


def run_lstm(numbers: Numbers, x: Any, runtime: str, xp: Arrays = NUMPY) -> Any:
    """The outputs of all steps, int8 `(samples, steps, units)`, of int8 `x` from zero states.

    Args:
        numbers: weights and grids.
        x: shape `(samples, steps, features)`.
        runtime: a name in `tflite_export.runtimes.execution.RUNTIMES`.
        xp: the array functions.
    """
    arithmetic = _MICRO if runtime == "tflite_micro" else _LITERT
    factor = rounding.fixed_point(arithmetic.output_factor(numbers.output_scale))
    # Arguments of both functions are int16, so each is a table.
    sixteen = np.arange(_INT16[0], _INT16[1] + 1)
    sigmoid, tanh, tanh_of_carry = (
        arithmetic.sigmoid(sixteen),
        arithmetic.tanh(sixteen, -12),
        arithmetic.tanh(sixteen, numbers.carry_power),
    )

    def at(table: np.ndarray, values: Any) -> Any:
        return xp.take(table.astype(np.int64), values - _INT16[0], axis=0)

    units = len(numbers.biases["input"])
    x = xp.cast(x, "int64") - numbers.input_zero_point
    start = xp.zeros_like(xp.cast(x[:, 0, :1], "int64")) + np.zeros((1, units), np.int64)
    h, c = start + numbers.output_zero_point, start
    outputs = []
    for step in range(x.shape[1]):
        sums = {gate: _sum(xp, numbers, gate, x[:, step], h, arithmetic) for gate in GATES}
        i, f, o = (at(sigmoid, sums[gate]) for gate in ("input", "forget", "output"))
        g = at(tanh, sums["candidate"])
        kept = arithmetic.shifted(xp, f * c, 15)
        new = arithmetic.shifted(xp, i * g, 30 + numbers.carry_power)
        c = xp.clip(xp.clip(kept, *_INT16) + xp.clip(new, *_INT16), *_INT16)
        product = rounding.twice_rounded(xp, o * at(tanh_of_carry, c), factor)
        h = xp.clip(product + numbers.output_zero_point, *_INT8)
        outputs.append(h)
    return xp.cast(xp.stack(outputs, axis=1), "int8")


def _sum(xp: Arrays, numbers: Numbers, gate: str, x: Any, h: Any, arithmetic: _Arithmetic) -> Any:
    """The argument of one gate's function, Q3.12."""
    # The runtimes multiply the scales in float32.
    input_factor = np.float32(numbers.input_scale * numbers.kernel_scales[gate])
    state_factor = np.float32(numbers.output_scale * numbers.recurrent_scales[gate])
    fed = _product(xp, x, numbers.kernels[gate])
    back = _product(xp, h - numbers.output_zero_point, numbers.recurrent_kernels[gate])
    fed = fed + numbers.biases[gate].astype(np.int64)
    return arithmetic.joins(
        xp,
        rounding.twice_rounded(xp, fed, rounding.fixed_point(float(input_factor) / SUM_SCALE)),
        rounding.twice_rounded(xp, back, rounding.fixed_point(float(state_factor) / SUM_SCALE)),
    )


def _product(xp: Arrays, x: Any, weights: Integers) -> Any:
    """The exact sums of `x` times each row of the weights; floats of 64 bits hold them."""
    return xp.cast(xp.matmul(xp.cast(x, "float64"), weights.T.astype(np.float64)), "int64")


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


def interpolated_sigmoid(x: Integers) -> Integers:
    """sigmoid in Q0.15 of `x / (3 * 4096)`."""
    result = _interpolated(np.abs(x), 9, 0x7FFF << 10)
    return np.where(x >= 0, result + (1 << 9), (1 << 25) - result + (1 << 9) - 1) >> 10


def interpolated_tanh(x: Integers) -> Integers:
    """tanh in Q0.15 of `x / (3 * 4096)`; tanh(x) == 2 sigmoid(2 x) - 1."""
    result = _interpolated(np.abs(x), 8, 0xFFFF << 8) - (1 << 23)
    return np.where(x >= 0, result + (1 << 7), -result + (1 << 7) - 1) >> 8


def _micro_sigmoid(x: Integers) -> Integers:
    return interpolated_sigmoid(3 * x)


def _micro_tanh(x: Integers, power: int) -> Integers:
    """Of Q0.15 `x * 2**(15 + power)`."""
    shift = 12 + power
    scaled = 3 * x << shift if shift >= 0 else (3 * x + (1 << (-shift - 1))) >> -shift
    return interpolated_tanh(scaled)


def _micro_joins(xp: Arrays, fed: Any, back: Any) -> Any:
    return xp.clip(xp.clip(fed, *_INT16) + xp.clip(back, *_INT16), *_INT16)


def _micro_shifted(xp: Arrays, product: Any, bits: int) -> Any:
    """Halves twice: by one bit, then by the others."""
    return rounding.twice_rounded(xp, product, rounding.fixed_point(2.0**-bits))


# LiteRT, in gemmlowp's 16-bit fixed point.


def _litert_sigmoid(x: Integers) -> Integers:
    return fixed_point.sigmoid(x, 3, 15)


def _litert_tanh(x: Integers, power: int) -> Integers:
    return fixed_point.tanh(x, 15 + power, 15)


def _litert_joins(xp: Arrays, fed: Any, back: Any) -> Any:
    return xp.clip(xp.clip(fed, *_INT16) + back, *_INT16)


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
    shifted=rounding.divided,
    output_factor=lambda scale: float(np.float32(2.0**-30 / float(scale))),
)
