"""gemmlowp's fixed-point functions in NumPy, on 15 or 31 bits (`fixedpoint/fixedpoint.h`).

Numbers are integers with so many `bits` behind the sign, `integer_bits` of them before the point.
"""

import numpy as np

from kqat.kernels.arrays import NUMPY
from kqat.kernels.rounding import divided, halved_up

Integers = np.ndarray


def limits(bits: int) -> tuple[int, int]:
    """The least and the greatest."""
    return -(1 << bits), (1 << bits) - 1


def product(a: Integers | int, b: Integers | int, bits: int) -> Integers:
    """The upper half of twice the product, rounded."""
    wide = np.asarray(a, np.int64) * np.asarray(b, np.int64)
    return np.minimum(halved_up(NUMPY, wide, bits), limits(bits)[1])


def left(values: Integers, by: int, bits: int) -> Integers:
    """`values * 2**by`, saturating."""
    return np.clip(values << by, *limits(bits))


def constant(value: float, integer_bits: int, bits: int) -> int:
    """A real number in fixed point."""
    return int(np.clip(np.rint(value * 2.0 ** (bits - integer_bits)), *limits(bits)))


def exp_of_negative(a: Integers, integer_bits: int, bits: int) -> Integers:
    """exp(a) without integer bits, of `a <= 0` with so many."""
    fraction_bits = bits - integer_bits
    quarter = 1 << fraction_bits >> 2
    rest = (a & (quarter - 1)) - quarter
    x = left(rest, integer_bits, bits) + (1 << (bits - 3))  # a Taylor series around -1/8
    x2 = product(x, x, bits)
    x3, x4 = product(x2, x, bits), product(x2, x2, bits)
    third = product(divided(NUMPY, x4, 2) + x3, constant(1 / 3, 0, bits), bits)
    series = divided(NUMPY, third + x2, 1)
    middle = constant(np.exp(-1 / 8), 0, bits)
    result = np.clip(middle + product(middle, x + series, bits), *limits(bits))
    remainder = rest - a
    for exponent in range(-2, integer_bits):
        bit = remainder & (1 << (fraction_bits + exponent))
        factor = constant(np.exp(-(2.0**exponent)), 0, bits)
        result = np.where(bit, product(result, factor, bits), result)
    if integer_bits > 5:
        result = np.where(a < -(1 << (36 - integer_bits - 31 + bits)), 0, result)
    return np.where(a == 0, limits(bits)[1], result)


def reciprocal(a: Integers, bits: int) -> Integers:
    """2 / (1 + a) with two integer bits, of `a` between 0 and 1, by three steps of Newton."""
    half = (a + limits(bits)[1] + 1) // 2
    x = constant(48 / 17, 2, bits) + product(half, constant(-32 / 17, 2, bits), bits)
    for _ in range(3):
        missing = (1 << (bits - 2)) - product(half, x, bits)
        x = x + left(product(x, missing, bits), 2, bits)
    return x


def sigmoid(x: Integers, integer_bits: int, bits: int) -> Integers:
    """The logistic function, without integer bits."""
    most = limits(bits)[1]
    positive = left(reciprocal(exp_of_negative(-np.abs(x), integer_bits, bits), bits), 1, bits)
    return np.where(x == 0, 1 << (bits - 1), np.where(x > 0, positive, most - positive))


def tanh(x: Integers, integer_bits: int, bits: int) -> Integers:
    """The hyperbolic tangent, without integer bits."""
    doubled = reciprocal(exp_of_negative(-np.abs(x), integer_bits + 1, bits), bits)
    positive = left(doubled - (1 << (bits - 2)), 2, bits)
    return np.where(x == 0, 0, np.sign(x) * positive)
