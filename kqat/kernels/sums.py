"""Sums of products: convolutions, matrix products; exact, and in floats where those are exact.

A float32 holds every integer below 2**24, a float64 below 2**53: sums of products whose terms add
up to less are right in any order. The weights, which are known, tell how large a sum can be.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import numpy as np

from kqat.kernels.arrays import Arrays
from kqat.kernels.grids import Grid, onto
from kqat.kernels.rounding import (
    fixed_point,
    of_wide_sum,
    once_rounded,
    twice_rounded,
    twice_rounded_up,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """How a kernel moves over an image: rows first. `padding` is before and after each."""

    strides: tuple[int, int]
    dilations: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]


def same_padding(
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int] = (1, 1),
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The zeros before and after that give `ceil(size / stride)` results."""
    pads = []
    for length, taps, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        needed = (-(-length // stride) - 1) * stride + (taps - 1) * dilation + 1 - length
        pads.append((max(needed, 0) // 2, max(needed, 0) - max(needed, 0) // 2))
    return pads[0], pads[1]


def exact_dtype(weights: np.ndarray, axes: Sequence[int], largest: int) -> str:
    """The float in which sums over `axes` of `weights` times at most `largest` are exact."""
    total = np.abs(weights.astype(np.int64)).sum(axis=tuple(axes)).max(initial=0) * largest
    return "float32" if total < 2**24 else "float64"


def largest_magnitude(grid: Grid) -> int:
    """Of an integer of the grid without its zero point."""
    low, high = grid.limits
    return max(high - grid.zero_point, grid.zero_point - low)


def convolve(
    xp: Arrays, x: Any, kernel: Any, window: Window, *, dtype: str, depthwise: bool
) -> Any:
    """Exact sums of a convolution, in float `dtype`.

    Args:
        xp: the array functions.
        x: integers without their zero point, `(samples, rows, columns, channels)`.
        kernel: as Keras has it, in `dtype`.
        window: how it moves.
        dtype: a float in which the sums are exact.
        depthwise: each channel on its own.
    """
    x = xp.cast(x, dtype)
    if any(map(any, window.padding)):
        x = xp.pad(x, ((0, 0), *window.padding, (0, 0)))
    found = xp.conv(x, kernel, window.strides, window.dilations, depthwise)
    if found is not None:
        return found
    total: Any = None
    taps = kernel.shape[:2]
    spans = [(t - 1) * d + 1 for t, d in zip(taps, window.dilations, strict=True)]
    counts = [
        (n - span) // s + 1 for n, span, s in zip(x.shape[1:3], spans, window.strides, strict=True)
    ]
    channels = kernel.shape[2] * kernel.shape[3]
    for row in range(taps[0]):
        for column in range(taps[1]):
            (top, down), (left, right) = (
                (i * d, (n - 1) * s + 1 + i * d)
                for i, d, n, s in zip(
                    (row, column), window.dilations, counts, window.strides, strict=True
                )
            )
            part = x[:, top : down : window.strides[0], left : right : window.strides[1], :]
            if depthwise:
                product = xp.expand_dims(part, -1) * kernel[row, column]
                product = xp.reshape(product, (-1, *counts, channels))
            else:
                product = xp.matmul(part, kernel[row, column])
            total = product if total is None else total + product
    return total


def spread(xp: Arrays, x: Any, strides: tuple[int, int]) -> Any:
    """`x` with zeros put between its rows and columns, as a transposed convolution reads it."""
    rows, columns, channels = x.shape[1:]
    (down, right) = strides
    if down > 1:
        x = xp.reshape(x, (-1, rows, 1, columns, channels))
        x = xp.pad(x, ((0, 0), (0, 0), (0, down - 1), (0, 0), (0, 0)))
        rows *= down
        x = xp.reshape(x, (-1, rows, columns, channels))
    if right > 1:
        x = xp.reshape(x, (-1, rows, columns, 1, channels))
        x = xp.pad(x, ((0, 0), (0, 0), (0, 0), (0, right - 1), (0, 0)))
        x = xp.reshape(x, (-1, rows, columns * right, channels))
    return x[:, : rows - down + 1, : x.shape[2] - right + 1, :]


class Rounding(enum.Enum):
    """How exact sums become the output's integers."""

    ONCE = enum.auto()  # XNNPACK: times a float32, halves to even
    TWICE = enum.auto()  # reference and micro kernels on int32 sums: halves away from zero
    TWICE_UP = enum.auto()  # matrix products of LiteRT's optimized kernels: the last halves go up
    # LiteRT's optimized DEPTHWISE_CONV_2D: eight channels at a time as TWICE_UP, the rest as TWICE.
    TWICE_BY_EIGHT = enum.auto()
    WIDE = enum.auto()  # int64 sums: times 15 bits, halves up
    DOUBLE = enum.auto()  # LiteRT's reference FULLY_CONNECTED: times a float64, halves away


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requantize:
    """From exact sums to the output's grid.

    Args:
        given: grid of the input.
        weights: grid of the weights.
        result: grid of the output.
        rounding: of the kernel.
        activation: fused, or `"none"`.
        in_double: whether the kernel multiplies the two scales in float64, as in `pointwise`.
            LiteRT's BATCH_MATMUL does so in float32 (`GetQuantizedConvolutionMultipler` in
            kernels/kernel_util.cc), which may move the last of the 15 bits that a wide sum is
            multiplied by.
    """

    given: Grid
    weights: Grid
    result: Grid
    rounding: Rounding
    activation: str = "none"
    in_double: bool = True

    def __call__(self, xp: Arrays, sums: Any, bias: Any | None) -> Any:
        """The output's integers of exact `sums`, whose last axis is the channels'."""
        wide = "int64" if self.given.wide else "int32"
        sums = xp.cast(sums, wide)
        if bias is not None:
            sums = sums + xp.cast(bias, wide)
        return onto(xp, self._steps(xp, sums), self.result, self.activation)

    def _steps(self, xp: Arrays, sums: Any) -> Any:
        scales = np.asarray(self.weights.scales, np.float32)
        scales = scales[0] if len(scales) == 1 else scales
        if self.rounding is Rounding.ONCE:
            steps = once_rounded(xp, sums, self.given.scale * scales / self.result.scale)
            # A float beyond int32 has no integer; it is clipped anyway.
            return xp.cast(xp.clip(steps, -(2.0**24), 2.0**24), "int32")
        dtype = np.float64 if self.in_double else np.float32
        product = np.asarray(self.given.scale, dtype) * np.asarray(scales, dtype)
        real = np.asarray(product, np.float64) / np.float64(self.result.scale)
        if self.rounding is Rounding.DOUBLE:
            value = xp.cast(sums, "float64") * real
            return xp.cast(xp.sign(value) * xp.floor(xp.abs(value) + 0.5), "int64")
        if self.rounding is Rounding.TWICE_BY_EIGHT:
            channels, factor = sums.shape[-1], fixed_point(real)
            in_eights = np.arange(channels) < channels - channels % 8
            up, away = (f(xp, sums, factor) for f in (twice_rounded_up, twice_rounded))
            return xp.where(in_eights, up, away)
        rescale = {
            Rounding.TWICE: twice_rounded,
            Rounding.TWICE_UP: twice_rounded_up,
            Rounding.WIDE: of_wide_sum,
        }[self.rounding]
        return rescale(xp, sums, fixed_point(real))
