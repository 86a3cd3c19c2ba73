"""Over axes and windows: MEAN, SUM, REDUCE_PROD, TOPK_V2, pooling."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kqat.kernels.arrays import Arrays
from kqat.kernels.grids import Grid, onto
from kqat.kernels.rounding import Factor, fixed_point, of_wide_sum, twice_rounded
from kqat.kernels.sums import Window


def mean(xp: Arrays, x: Any, axes: Sequence[int], given: Grid, result: Grid) -> Any:
    """MEAN on LiteRT's own and the micro kernels; keeps the axes.

    The number of elements is divided into the factor, its power of two into the shift.
    """
    count = math.prod(x.shape[axis] for axis in axes)
    factor = fixed_point(np.float64(given.scale) / np.float64(result.scale))
    power = min(count.bit_length() - 1, 32, 31 + factor.shift)
    factor = Factor((factor.mantissa << power) // count, factor.shift - power)
    total = _sum(xp, x, axes, given.wide) - given.zero_point * count
    return onto(xp, twice_rounded(xp, total, factor), result)


def mean_by_xnnpack(xp: Arrays, x: Any, axes: Sequence[int], given: Grid, result: Grid) -> Any:
    """MEAN in float32: both zero points are one number that is added before the only rounding.

    Source: `reshape_reduce_nd` in XNNPACK's src/operators/reduce-nd.c, and `quantize` in
    src/xnnpack/reference-utils.h (2026-08). Where a compiler fuses product and sum, as those for
    Arm may, a value next to a half can round the other way.
    """
    count = math.prod(x.shape[axis] for axis in axes)
    factor = given.scale / result.scale * (np.float32(1) / np.float32(count))
    zero_point = np.float32(result.zero_point) - np.float32(count * given.zero_point) * factor
    steps = xp.round(xp.cast(_sum(xp, x, axes, given.wide), "float32") * factor + zero_point)
    return xp.cast(xp.clip(steps, *result.limits), "int32")


def _sum(xp: Arrays, x: Any, axes: Sequence[int], wide: bool) -> Any:
    """Of integers with their zero point; keeps the axes."""
    dtype = "int64" if wide else "int32"
    return xp.cast(xp.sum(xp.cast(x, dtype), axis=tuple(axes), keepdims=True), dtype)


def product(xp: Arrays, x: Any, axes: Sequence[int], given: Grid, result: Grid) -> Any:
    """REDUCE_PROD: rescaled after each factor; the reduced axes are gone."""
    axes = sorted(axis % len(x.shape) for axis in axes)
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    count = math.prod(x.shape[axis] for axis in axes)
    root = np.float64(result.scale) ** (1.0 / count)
    factor = fixed_point(np.float64(given.scale) / root)
    shape = [x.shape[axis] for axis in kept]
    x = xp.reshape(xp.transpose(x, (*kept, *axes)), (-1, *shape[1:], count))
    x = xp.cast(x, "int64") - given.zero_point
    total = x[..., 0]
    for index in range(1, count):
        total = of_wide_sum(xp, total * x[..., index], factor)
    return onto(xp, of_wide_sum(xp, total, factor), result)


def top_k(xp: Arrays, x: Any, k: int) -> list[Any]:
    """TOPK_V2: the largest of the last axis and their indexes, of equal ones the first first."""
    falling = -1 - xp.cast(x, "int32")  # The least integer has no negative.
    indexes = xp.cast(xp.order(falling)[..., :k], "int32")
    return [xp.take_along_axis(x, indexes, axis=-1), indexes]


def windows(x: Any, size: tuple[int, int], window: Window) -> list[Any]:
    """The parts of a padded image that meet each place of a window, all of one shape."""
    counts = [
        (length - taps) // stride + 1
        for length, taps, stride in zip(x.shape[1:3], size, window.strides, strict=True)
    ]
    (down, right), (rows, columns) = window.strides, counts
    return [
        x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right, :]
        for i in range(size[0])
        for j in range(size[1])
    ]


def average_pool(
    xp: Arrays, x: Any, size: tuple[int, int], window: Window, result: Grid, activation: str
) -> Any:
    """AVERAGE_POOL_2D: divided by what of the window lies inside, halves away from zero."""
    padding = ((0, 0), *window.padding, (0, 0))
    parts = windows(xp.pad(xp.cast(x, "int32"), padding), size, window)
    inside = np.pad(np.ones((1, *x.shape[1:3], 1), np.int32), padding)
    count = np.sum(windows(inside, size, window), axis=0).astype(np.int32)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    steps = xp.sign(total) * xp.floor_divide(xp.abs(total) + count // 2, count)
    return xp.clip(xp.cast(steps, "int32"), *result.activation(activation))


def max_pool(
    xp: Arrays, x: Any, size: tuple[int, int], window: Window, result: Grid, activation: str
) -> Any:
    """MAX_POOL_2D."""
    low = result.limits[0]
    padded = xp.pad(xp.cast(x, "int32"), ((0, 0), *window.padding, (0, 0)), constant_values=low)
    parts = windows(padded, size, window)
    most = parts[0]
    for part in parts[1:]:
        most = xp.maximum(most, part)
    return xp.clip(most, *result.activation(activation))
