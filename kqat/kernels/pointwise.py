"""Two values, element by element: ADD, SUB, MUL, PRELU, SQUARED_DIFFERENCE, comparisons."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kqat.kernels.arrays import Arrays
from kqat.kernels.grids import Grid, onto
from kqat.kernels.rounding import fixed_point, once_rounded, twice_rounded


def add(
    xp: Arrays,
    a: Any,
    b: Any,
    given: tuple[Grid, Grid],
    result: Grid,
    sign: int = 1,
    activation: str = "none",
) -> Any:
    """`a + sign * b` on LiteRT's own and the micro kernels: both lifted by many bits first."""
    lift = 15 if result.wide else 20
    most = np.float64(2 * max(given[0].scale, given[1].scale))
    parts = []
    for x, grid in zip((a, b), given, strict=True):
        lifted = (xp.cast(x, "int64") - grid.zero_point) * (1 << lift)
        parts.append(twice_rounded(xp, lifted, fixed_point(np.float64(grid.scale) / most)))
    factor = fixed_point(most / np.float64(np.float32(1 << lift) * result.scale))
    total = parts[0] + parts[1] if sign > 0 else parts[0] - parts[1]
    return onto(xp, twice_rounded(xp, total, factor), result, activation)


def add_by_xnnpack(
    xp: Arrays,
    a: Any,
    b: Any,
    given: tuple[Grid, Grid],
    result: Grid,
    sign: int = 1,
    activation: str = "none",
) -> Any:
    """The same on XNNPACK: two products with 21 bits, one shift, halves up."""
    ratios = [grid.scale / result.scale for grid in given]
    shift = 20 - (int(np.frexp(max(ratios))[1]) - 1)
    x, y = (int(np.rint(np.float64(ratio) * 2.0**shift)) for ratio in ratios)
    total = (xp.cast(a, "int32") - given[0].zero_point) * x
    total = total + (xp.cast(b, "int32") - given[1].zero_point) * (sign * y)
    steps = xp.right_shift(total + (1 << (shift - 1)), shift)
    return onto(xp, steps, result, activation)


def multiply(
    xp: Arrays,
    a: Any,
    b: Any,
    given: tuple[Grid, Grid],
    result: Grid,
    once: bool,
    activation: str = "none",
    in_double: bool = False,
) -> Any:
    """`a * b`; `once` as XNNPACK rounds it.

    Scales are multiplied and divided in float32 (LiteRT's kernels/mul.cc), or `in_double`
    (TFLite Micro's kernels/mul_common.cc).
    """
    product = (xp.cast(a, "int32") - given[0].zero_point) * (
        xp.cast(b, "int32") - given[1].zero_point
    )
    factor = _factor(given, result, in_double)
    if once:
        steps = xp.cast(once_rounded(xp, product, factor), "int32")
    else:
        steps = twice_rounded(xp, product, fixed_point(np.float64(factor)))
    return onto(xp, steps, result, activation)


def _factor(given: Sequence[Grid], result: Grid, in_double: bool) -> Any:
    """The product of the scales that are read, divided by that of the result."""
    dtype: Any = np.float64 if in_double else np.float32
    return np.prod([grid.scale for grid in given], dtype=dtype) / dtype(result.scale)


def prelu(
    xp: Arrays,
    x: Any,
    slopes: Any,
    given: tuple[Grid, Grid],
    result: Grid,
    in_double: bool = False,
) -> Any:
    """PRELU: a factor above zero, another for products with the slope.

    `in_double` is as for `multiply`: kernels/activations.cc of LiteRT, prelu_common.cc of TFLite
    Micro.
    """
    x = xp.cast(x, "int32") - given[0].zero_point
    above = fixed_point(np.float64(_factor(given[:1], result, in_double)))
    below = fixed_point(np.float64(_factor(given, result, in_double)))
    tilted = x * (xp.cast(slopes, "int32") - given[1].zero_point)
    steps = xp.where(x >= 0, twice_rounded(xp, x, above), twice_rounded(xp, tilted, below))
    return onto(xp, steps, result)


def squared_difference(xp: Arrays, a: Any, b: Any, given: tuple[Grid, Grid], result: Grid) -> Any:
    """SQUARED_DIFFERENCE: both lifted by 7 bits, the difference squared."""
    most = np.float64(2 * max(given[0].scale, given[1].scale))
    parts = []
    for x, grid in zip((a, b), given, strict=True):
        lifted = (xp.cast(x, "int64") - grid.zero_point) * (1 << 7)
        parts.append(twice_rounded(xp, lifted, fixed_point(np.float64(grid.scale) / most)))
    difference = parts[0] - parts[1]
    factor = fixed_point(most * most / np.float64(np.float32(1 << 14) * result.scale))
    return onto(xp, twice_rounded(xp, difference * difference, factor), result)


def lifted_for_comparison(xp: Arrays, x: Any, grid: Grid) -> Any:
    """What comparisons compare in the place of an integer: 8 bits more, times its scale."""
    lifted = (xp.cast(x, "int64") - grid.zero_point) * (1 << 8)
    return twice_rounded(xp, lifted, fixed_point(np.float64(grid.scale)))
