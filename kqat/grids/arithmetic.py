"""Fake quantization of activations and weights: floats in, floats on an integer grid out.

The TensorFlow backend uses the fused `FakeQuantWithMinMaxVars` kernels. Other backends compute
the same formula with `keras.ops`. Both equal the NumPy code of `tests/kqat/reference.py` bit for
bit. For a range `[low, high]` that contains zero, all in float32:

    scale      = (high - low) / (qmax - qmin)
    zero_point = clip(round(qmin - low / scale), qmin, qmax)
    q          = floor((clip(x, nudged_low, nudged_high) - nudged_low) / scale + 0.5) + qmin
    output     = (q - zero_point) * scale

Zero is always on the grid. The gradient is a straight-through estimator: one inside the range, zero
outside (Krishnamoorthi 2018, section 2.4, equation 15, https://arxiv.org/abs/1806.08342).
Scheme: Jacob et al. 2018, sections 2.1 and 3 (https://arxiv.org/abs/1712.05877).
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.grids.clamp import Bounds, Clamp
from kqat.grids.spec import QuantSpec

# TensorFlow's kernels flush subnormal floats to zero, and NumPy does not. For a range of at least
# this width a step is at least 2**-116, so no intermediate result that matters is subnormal.
SMALLEST_RANGE = 2.0**-100
# The width of a range for which no value but zero was seen: zero is exact on a grid of any width.
UNSEEN_WIDTH = 1.0
# Weights that are all zero have no scale of their own. Their bias counts in steps of it, so it is
# fine; the exporter coarsens it to what int32 holds.
EMPTY_SCALE = 2.0**-40
# With bounds of at most this magnitude `high - low` does not overflow.
LARGEST_BOUND = 2.0**126
# The bias that an integer attention mask adds to a masked score. It is larger than the spread of
# scores. It may not be much larger: XNNPACK's ADD takes operands whose scale is at most 256 times
# that of the output.
HIDDEN = -1024.0
# The most steps of ADD's output that one step of that bias may be. LiteRT's own kernel runs where
# XNNPACK takes no ADD, as of scores whose scale is below the 1024th part of the output's; from 256
# steps on, its sum wraps at 16 bits. This is half of that.
_MOST_OUTPUT_STEPS = 128.0
# The value of a masked score in a float model; float16 holds it too.
LOWEST = -30000.0
# Tolerance for the error of float32 logarithms, so that a power of two stays what it is.
_ALMOST = 1e-5


def widen(low: Any, high: Any) -> tuple[Any, Any]:
    """Makes a range usable: it contains zero, is not empty and does not overflow.

    A range narrower than `SMALLEST_RANGE`, such as that of an activation that is always zero, gets
    `high = UNSEEN_WIDTH`; zero is exact on that grid too. Bounds beyond `LARGEST_BOUND` are clipped
    to it. NaN stays NaN.
    """
    low = ops.maximum(ops.minimum(low, 0.0), -LARGEST_BOUND)
    high = ops.minimum(ops.maximum(high, 0.0), LARGEST_BOUND)
    return low, ops.where(high - low < SMALLEST_RANGE, ops.full_like(high, UNSEEN_WIDTH), high)


def no_narrower(low: Any, high: Any, width: Any) -> tuple[Any, Any]:
    """The range, widened to `width` at least.

    It grows alike on both sides of zero where it has both, otherwise on the one that it has. An
    empty range stays empty, as `widen` gives it a width of its own; if that is too narrow, it grows
    above zero.

    Args:
        low, high: float32, `low <= 0 <= high`.
        width: float32, of a shape that broadcasts with them.
    """
    lacks = ops.relu(width - (high - low))
    lacks = ops.where(ops.logical_or(high > low, width > UNSEEN_WIDTH), lacks, 0.0)
    below = ops.where(low < 0.0, ops.where(high > 0.0, 0.5, 1.0), 0.0)
    return low - lacks * below, high + lacks * (1.0 - below)


def no_narrower_number(low: float, high: float, width: float) -> tuple[float, float]:
    """`no_narrower` of a range of Python's numbers, without a dozen operators: the same float32."""
    grows = high > low or width > UNSEEN_WIDTH
    lacks = np.float32(max(width - (high - low), 0.0) if grows else 0.0)
    below = np.float32(0.0 if low >= 0.0 else 0.5 if high > 0.0 else 1.0)
    wider = np.float32(low) - lacks * below, np.float32(high) + lacks * (np.float32(1.0) - below)
    return float(wider[0]), float(wider[1])


def symmetrize(low: Any, high: Any, spec: QuantSpec) -> tuple[Any, Any]:
    """The smallest range around `[low, high]` on whose grid real zero is integer zero.

    The result has `low / qmin == high / qmax`. It is not `[-m, m]`: on 256 integers that range has
    its zero half a step from an integer, and `m` itself is clipped. With `spec.power_of_two` the
    scale is the smallest power of two that holds the range.
    """
    ratio = spec.qmin / spec.qmax
    high = ops.maximum(high, low * (1.0 / ratio))
    if spec.power_of_two:
        power = ops.ceil(log2(high / spec.qmax) - _ALMOST)
        if spec.bits == 16:
            power = ops.clip(power, 1.0 - spec.bits, 7.0 - spec.bits)
        high = exp2(power) * spec.qmax
    return high * ratio, high


def log2(x: Any) -> Any:
    """The binary logarithm of a positive tensor, to float32's precision."""
    return ops.log(x) * (1.0 / math.log(2.0))


def exp2(power: Any) -> Any:
    """Two to the power of whole numbers (float32, −126 to 127), exact."""
    return ops.power(2.0, ops.clip(power, -126.0, 127.0))


def next_power_of_two(scale: Any) -> Any:
    """The least power of two that is not below `scale`, up to float32's logarithms."""
    return exp2(ops.ceil(log2(scale) - _ALMOST))


def near_power_of_two(scale: Any) -> Any:
    """The power of two nearest to `scale` in logarithms, with the gradient of `scale`."""
    return straight_through(exp2(ops.round(log2(scale))), scale)


def bounds(x: Any, clamp: Clamp | Bounds | None) -> tuple[Any, Any]:
    """Minimum and maximum of `x` and zero after the clamp; float32 scalars without a gradient."""
    least, most = (-math.inf, math.inf) if clamp is None else (clamp.low, clamp.high)
    low = ops.minimum(ops.min(x), 0.0) if least else ops.zeros((), "float32")
    high = ops.maximum(ops.max(x), 0.0)
    if math.isfinite(least) and least:
        low = ops.maximum(low, least)
    if math.isfinite(most):
        high = ops.minimum(high, most)
    return ops.stop_gradient(low), ops.stop_gradient(high)


def shown_bounds(x: Any, spec: QuantSpec) -> tuple[Any, Any]:
    """`bounds` of the unmasked attention scores, with the lower one moved down for masked scores.

    Masked scores are clipped to the lower bound. It lies so far below the smallest unmasked score
    that softmax over the last axis gives all masked keys together less than half a step of its
    output: `exp(-room) * keys < 2**-(bits + 1)`.
    """
    low, high = bounds(ops.where(x == LOWEST, 0.0, x), None)
    return low - hidden_room(spec, x.shape[-1]), high


def hidden_room(spec: QuantSpec, keys: int) -> float:
    """The room below the scores of `keys` keys; see `shown_bounds`.

    It also keeps the output's scale within what ADD can compute from the bias.
    """
    weightless = float(np.log(2.0 ** (spec.bits + 1) * keys))
    return max(weightless, -HIDDEN / _MOST_OUTPUT_STEPS)


def nudge(low: Any, high: Any, spec: QuantSpec) -> tuple[Any, Any]:
    """Scale (float32) and zero point (int32) of the grid over `[low, high]`.

    The rounding is that of TensorFlow's fake-quant kernels, so these are exactly the parameters
    that training used. `low`, `high` and both results have the same shape.
    """
    low, high = (np.asarray(v, np.float32) for v in (low, high))
    levels = np.float32(spec.qmax - spec.qmin)
    scale = (high - low) / levels
    # TensorFlow's integers start at 0 (1 if narrow). Computing with these and shifting at the end
    # gives the same float roundings.
    first = np.float32(spec.narrow_range)
    from_low = first - low / scale
    # Not floor(from_low + 0.5): for the largest float32 below 0.5 that sum rounds up to 1.
    down = np.floor(from_low)
    zero = np.minimum(down + (from_low - down >= np.float32(0.5)), first + levels)
    return scale, (zero - first).astype(np.int32) + np.int32(spec.qmin)


def fake_quantize(x: Any, low: Any, high: Any, spec: QuantSpec) -> Any:
    """Rounds `x` to the per-tensor grid over `[low, high]`.

    Inside the range the gradient passes straight through to `x`. Outside it goes to the bound that
    clipped `x`.

    XLA, with which Keras compiles on GPUs, computes the fused kernel by another formula. There the
    outputs are off the grid by float roundings, and ties can round the other way.

    Args:
        x: float32 tensor of any shape.
        low, high: float32 scalars from `widen`.
        spec: the grid; its `axis` must be `None`.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.quantization.fake_quant_with_min_max_vars(
            x, low, high, num_bits=spec.bits, narrow_range=spec.narrow_range
        )
    return _fake_quantize_ops(x, low, high, spec)


def fake_quantize_moving(x: Any, low: Any, high: Any, step: Any, spec: QuantSpec) -> Any:
    """`fake_quantize`, with a gradient of the step too: inside the range, of the rounding error.

        d out/d step = (out - x) / step inside the range, else 0

    To `low` and `high` gradients go as in `fake_quantize`, so those of all values outside.

    Args:
        x, low, high, spec: as for `fake_quantize`.
        step: float32 scalar, the scale of the grid over `[low, high]`.
    """
    rounded = fake_quantize(x, low, high, spec)
    fixed = ops.stop_gradient(step)
    levels = float(spec.qmax - spec.qmin)
    first = ops.stop_gradient(-ops.floor(0.5 - low / fixed) * fixed)
    clipped = ops.minimum(ops.maximum(x, first), first + levels * fixed)
    error = ops.stop_gradient((rounded - clipped) / fixed)
    return rounded + error * (step - fixed)


def _fake_quantize_ops(x: Any, low: Any, high: Any, spec: QuantSpec) -> Any:
    """The formula of the fused kernel in `keras.ops`, with its order of float operations."""

    def hidden(constant: float) -> Any:
        # A compiler that sees a constant replaces a division by a multiplication with its
        # reciprocal, and reorders additions. Both round differently, so the constant is hidden.
        return ops.where(high > low, constant, 0.0)

    first = float(spec.narrow_range)
    levels, half = hidden(float(spec.qmax - spec.qmin)), hidden(0.5)
    scale = (high - low) / levels
    from_low = first - low / scale
    down = ops.floor(from_low)
    zero = ops.where(from_low - down >= half, down + 1.0, down)
    zero = ops.minimum(zero, first + levels)
    nudged_low, nudged_high = (first - zero) * scale, (first + levels - zero) * scale
    clipped = ops.maximum(ops.minimum(x, nudged_high), nudged_low)
    steps = ops.floor((clipped - nudged_low) / scale - (zero - first) + half)
    passed = ops.where(x >= nudged_low, ops.where(x <= nudged_high, x, high), low)
    # The difference is exactly zero; it carries the gradient.
    return ops.stop_gradient(steps * scale) + (passed - ops.stop_gradient(passed))


def weight_scale(weight: Any, spec: QuantSpec, empty: float = 1.0) -> Any:
    """Scale of the symmetric grid whose largest integer is the largest magnitude of `weight`.

    Shape: `weight.shape` with every axis that is not in `spec.axis` reduced to 1. A channel whose
    scale would be below `SMALLEST_RANGE`, such as one of zeros only, has the scale `empty`. NaN or
    infinity in the weights gives NaN or infinity as scale. With `spec.power_of_two` the scale is
    the next power of two.
    """
    largest = ops.max(ops.abs(weight), axis=shared_axes(weight, spec), keepdims=True)
    # A compiler that sees a constant divisor multiplies by its reciprocal, which rounds
    # differently: training would use other scales than freezing. So the divisor is hidden behind a
    # `where`; NaN stays NaN.
    qmax = ops.where(largest >= 0.0, float(spec.qmax), 0.0)
    scale = usable_scale(largest / qmax, empty)
    return next_power_of_two(scale) if spec.power_of_two else scale


def usable_scale(scale: Any, empty: float = 1.0) -> Any:
    """`scale`, but `empty` below `SMALLEST_RANGE`: such weights are all as good as zero."""
    return ops.where(scale < SMALLEST_RANGE, ops.full_like(scale, empty), scale)


def mean_magnitude(weight: Any, spec: QuantSpec) -> Any:
    """Mean of `|weight|` over the weights that share a scale; shape as `weight_scale`."""
    return ops.mean(ops.abs(weight), axis=shared_axes(weight, spec), keepdims=True)


def fake_quantize_weight(weight: Any, scale: Any, spec: QuantSpec) -> Any:
    """Rounds `weight` to the symmetric grid of step `scale`; the gradient passes unchanged.

    Rounds half away from zero, as the TensorFlow converter does. A max-abs range contains all
    weights, up to float rounding, so the gradient is not cut anywhere. The fused kernels would cut
    it for the largest weight of many channels.

    `output == q * scale` exactly, with integers `q` in `[-qmax, qmax]`.
    """
    return straight_through(round_weight(weight, scale, spec) * scale, weight)


def round_weight(weight: Any, scale: Any, spec: QuantSpec) -> Any:
    """The integers that `weight` becomes, as floats in `[-qmax, qmax]`; half away from zero."""
    limit = float(spec.qmax)
    ratio = weight / scale
    rounded = ops.sign(ratio) * ops.floor(ops.abs(ratio) + 0.5)
    return ops.clip(rounded, -limit, limit)


def straight_through(value: Any, source: Any) -> Any:
    """`value`, bit for bit, with the gradient of `source`."""
    # The difference is exactly zero; it carries the gradient.
    return ops.stop_gradient(value) + (source - ops.stop_gradient(source))


def shared_axes(weight: Any, spec: QuantSpec) -> tuple[int, ...]:
    """The axes of `weight` along which all weights share a scale."""
    rank = len(weight.shape)
    axes = () if spec.axis is None else spec.axis
    kept = {int(a) % rank for a in ((axes,) if isinstance(axes, int) else axes)}
    return tuple(a for a in range(rank) if a not in kept)
