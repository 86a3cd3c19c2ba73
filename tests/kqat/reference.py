"""The arithmetic of `kqat.grids.arithmetic` in plain NumPy, without Keras: the oracle of its tests.

Every float operation is one float32 operation, in the order of TensorFlow 2.21's
`FakeQuantWithMinMaxVars` kernel as measured on an x86-64 CPU: it divides by the scale (older
kernels multiply by the inverse) and subtracts the zero point before it rounds. Zero points are
rounded as exact fractions.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

F = np.float32


def integers(bits: int, narrow: bool = False) -> tuple[int, int]:
    """`qmin` and `qmax` of a grid."""
    return -(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1


def flushed(x: Any) -> np.ndarray:
    """`x` as TensorFlow reads it: subnormal floats are zero."""
    return np.where(np.abs(x) < np.finfo(F).tiny, F(0), F(x))


def widen(low: float, high: float) -> tuple[np.float32, np.float32]:
    """The range cut to `[-2**126, 2**126]` and to hold zero; `[low, 1]` where it has no width."""
    below, above = F(max(min(low, 0.0), -(2.0**126))), F(min(max(high, 0.0), 2.0**126))
    return F(flushed(below)), F(flushed(above)) if above - below >= F(2.0**-100) else F(1)


def nudge(low: np.float32, high: np.float32, bits: int, narrow: bool) -> tuple[np.float32, int]:
    """Scale and zero point of the grid over `[low, high]`."""
    qmin, qmax = integers(bits, narrow)
    scale = F(F(high - low) / F(qmax - qmin))
    # The kernel counts the integers from 0, or from 1 if narrow.
    from_low = Fraction(float(F(F(int(narrow)) - F(low / scale))))
    above_qmin = math.floor(from_low + Fraction(1, 2)) - int(narrow)
    return scale, qmin + min(above_qmin, qmax - qmin)


def quantize(
    x: np.ndarray, low: np.float32, high: np.float32, bits: int, narrow: bool
) -> np.ndarray:
    """The integers that `x` becomes on the grid over `[low, high]`; int64."""
    qmin, qmax = integers(bits, narrow)
    scale, zero_point = nudge(low, high, bits, narrow)
    nudged_low, nudged_high = F(qmin - zero_point) * scale, F(qmax - zero_point) * scale
    clipped = np.maximum(np.minimum(x, nudged_high), nudged_low)
    steps = (clipped - nudged_low) / scale - F(zero_point - qmin) + F(0.5)
    return np.floor(steps).astype(np.int64) + zero_point


def fake_quantize(
    x: np.ndarray, low: np.float32, high: np.float32, bits: int, narrow: bool
) -> np.ndarray:
    """The real values of `quantize(x, …)`; float32."""
    scale, zero_point = nudge(low, high, bits, narrow)
    return (quantize(x, low, high, bits, narrow) - zero_point).astype(F) * scale


def passes_gradient(
    x: np.ndarray, low: np.float32, high: np.float32, bits: int, narrow: bool
) -> np.ndarray:
    """Where the gradient with respect to `x` is one; it is zero elsewhere."""
    x = flushed(x)
    qmin, qmax = integers(bits, narrow)
    scale, zero_point = nudge(low, high, bits, narrow)
    return (x >= F(qmin - zero_point) * scale) & (x <= F(qmax - zero_point) * scale)


def weight_scale(weight: np.ndarray, axes: tuple[int, ...], bits: int) -> np.ndarray:
    """Scale of the symmetric max-abs grid, one for each index along `axes`."""
    kept = {axis % weight.ndim for axis in axes}
    reduced = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    scale = np.max(np.abs(weight), axis=reduced, keepdims=True) / F(integers(bits)[1])
    return np.where(scale < F(2.0**-100), F(1), scale)


def quantize_weight(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The integers that `weight` becomes on the symmetric grid of step `scale`; int64."""
    magnitude = np.floor(np.abs(weight) / scale + F(0.5)).astype(np.int64)
    return np.sign(weight).astype(np.int64) * np.minimum(magnitude, integers(bits)[1])


def fake_quantize_weight(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The real values of `quantize_weight(weight, …)`; float32."""
    return quantize_weight(weight, scale, bits).astype(F) * scale


def shared_axes(weight: np.ndarray, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of `weight` that are not in `axes`."""
    kept = {axis % weight.ndim for axis in axes}
    return tuple(axis for axis in range(weight.ndim) if axis not in kept)


def learned_start(weight: np.ndarray, axes: tuple[int, ...], bits: int) -> np.ndarray:
    """Where LSQ's step starts, in float64; Esser et al. 2020, section 2.1."""
    mean = np.abs(np.float64(weight)).mean(axis=shared_axes(weight, axes), keepdims=True)
    return np.where(mean == 0, 1.0, 2 * mean / math.sqrt(integers(bits)[1]))


def learned_gradients(
    weight: np.ndarray, step: np.ndarray, axes: tuple[int, ...], bits: int, upstream: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """LSQ's gradients with respect to weight and step, in float64: equations 3 and 5 there."""
    qmax = integers(bits)[1]
    ratio = np.float64(weight) / np.float64(step)
    inside = np.abs(ratio) <= qmax
    shared = shared_axes(weight, axes)
    slope = np.where(inside, quantize_weight(weight, step, bits) - ratio, np.sign(ratio) * qmax)
    sharing = math.prod(weight.shape[axis] for axis in shared)
    total = np.sum(slope * upstream, axis=shared, keepdims=True) / math.sqrt(sharing * qmax)
    return upstream * inside, total * np.sign(step)


def squared_error(
    weight: np.ndarray, step: np.ndarray, axes: tuple[int, ...], bits: int
) -> np.ndarray:
    """What rounding to multiples of `step` loses per scale, in float64."""
    lost = np.float64(weight) - quantize_weight(weight, step, bits) * np.float64(step)
    return np.sum(lost**2, axis=shared_axes(weight, axes), keepdims=True)


def ternary(weight: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Step and integers of a ternary weight network, step in float64; Li et al. 2016, section 2."""
    shared = shared_axes(weight, axes)
    magnitude = np.abs(np.float64(weight))
    kept = magnitude > 0.7 * magnitude.mean(axis=shared, keepdims=True)
    count = np.maximum(kept.sum(axis=shared, keepdims=True), 1)
    step = np.sum(magnitude * kept, axis=shared, keepdims=True) / count
    return np.where(step == 0, 1.0, step), np.sign(weight).astype(np.int64) * kept


def binary(weight: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Step and integers of a binary weight network, in float64; Rastegari 2016, section 3.1."""
    mean = np.abs(np.float64(weight)).mean(axis=shared_axes(weight, axes), keepdims=True)
    return np.maximum(mean, 2.0**-100), np.where(weight < 0, -1, 1)
