"""Affine quantization arithmetic: float in, float on the integer grid out.

On the TensorFlow backend the fused `FakeQuantWithMinMaxVars` kernels do the work; elsewhere
the same formula is spelled in `keras.ops`. Both equal `tests/kqat/reference.py`, plain NumPy,
bit for bit. In words, for a range `[low, high]` that contains zero (all in float32):

    scale      = (high - low) / (qmax - qmin)
    zero_point = clip(round(qmin - low / scale), qmin, qmax)
    q          = floor((clip(x, nudged_low, nudged_high) - nudged_low) / scale + 0.5) + qmin
    output     = (q - zero_point) * scale

so zero is always exactly representable. The gradient is the straight-through estimator
(Bengio et al. 2013, https://arxiv.org/abs/1308.3432): one inside the range, zero outside.
Scheme: Jacob et al. 2018, sections 2.1 and 3 (https://arxiv.org/abs/1712.05877).
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.grids.clamp import Clamp
from kqat.grids.spec import QuantSpec

# TensorFlow's kernels flush subnormal floats to zero and NumPy does not. Above this bound no
# intermediate result that matters is subnormal: a step is 2**-116 at least.
SMALLEST_RANGE = 2.0**-100
# Below this bound `high - low` does not overflow.
LARGEST_BOUND = 2.0**126
# What an attention mask adds to a score that it hides, on integers: more than scores may spread,
# and XNNPACK's ADD takes operands of up to 256 times its output's scale.
HIDDEN = -1024.0
# What such a score is in floats, in float16 too.
LOWEST = -30000.0
# What float32 logarithms are off by: a range that is a power of two keeps it.
_ALMOST = 1e-5


def widen(low: Any, high: Any) -> tuple[Any, Any]:
    """Makes a range usable: `low <= 0 <= high`, and one unit wide where it is only zero.

    A constant zero activation has no range; on a grid of one unit it stays exactly zero. "Only
    zero" is what is narrower than `SMALLEST_RANGE`; bounds beyond `LARGEST_BOUND` are cut. NaN
    stays NaN.
    """
    low = ops.maximum(ops.minimum(low, 0.0), -LARGEST_BOUND)
    high = ops.minimum(ops.maximum(high, 0.0), LARGEST_BOUND)
    return low, ops.where(high - low < SMALLEST_RANGE, ops.ones_like(high), high)


def symmetrize(low: Any, high: Any, spec: QuantSpec) -> tuple[Any, Any]:
    """The least range around `[low, high]` on whose grid real zero is integer zero.

    Not `[-m, m]` but `low / qmin == high / qmax`: between 256 integers `[-m, m]` has its zero at
    half a step, which rounds either way, and `m` itself is cut off. Where the scale is to be a
    power of two, the least that is.
    """
    ratio = spec.qmin / spec.qmax
    high = ops.maximum(high, low * (1.0 / ratio))
    if spec.power_of_two:
        power = ops.ceil(ops.log(high / spec.qmax) / math.log(2.0) - _ALMOST)
        high = ops.power(2.0, ops.clip(power, 1.0 - spec.bits, 7.0 - spec.bits)) * spec.qmax
    return high * ratio, high


def bounds(x: Any, clamp: Clamp | None) -> tuple[Any, Any]:
    """Least and greatest of `x` and zero, after the clamp; float32 scalars without a gradient."""
    low = ops.zeros((), "float32") if clamp else ops.minimum(ops.min(x), 0.0)
    high = ops.maximum(ops.max(x), 0.0)
    if clamp is Clamp.RELU6:
        high = ops.minimum(high, 6.0)
    return ops.stop_gradient(low), ops.stop_gradient(high)


def shown_bounds(x: Any, spec: QuantSpec) -> tuple[Any, Any]:
    """`bounds` of the scores that no mask hides, the lower one with room for the hidden ones.

    The room is such that softmax over the last axis gives all hidden keys together less than half
    a step of its output, be they as many as they can: `exp(-room) * keys < 2**-(bits + 1)`.
    """
    low, high = bounds(ops.where(x == LOWEST, 0.0, x), None)
    return low - hidden_room(spec, x.shape[-1]), high


def hidden_room(spec: QuantSpec, keys: int) -> float:
    """The room below the scores of `keys` keys; see `shown_bounds`."""
    return float(np.log(2.0 ** (spec.bits + 1) * keys))


def nudge(low: Any, high: Any, spec: QuantSpec) -> tuple[Any, Any]:
    """Scale (float32) and zero point (int32) of the grid over `[low, high]`.

    The rounding is that of TensorFlow's fake-quant kernels, so these are the very parameters
    that training used. Shapes: `low`, `high` and both results alike.
    """
    low, high = (np.asarray(v, np.float32) for v in (low, high))
    levels = np.float32(spec.qmax - spec.qmin)
    scale = (high - low) / levels
    # TensorFlow counts from 0 (1 if narrow); shifting keeps its float rounding identical.
    first = np.float32(spec.narrow_range)
    from_low = first - low / scale
    # Not floor(from_low + 0.5), a sum that float32 rounds up to 1 for the number below 0.5.
    down = np.floor(from_low)
    zero = np.minimum(down + (from_low - down >= np.float32(0.5)), first + levels)
    return scale, (zero - first).astype(np.int32) + np.int32(spec.qmin)


def fake_quantize(x: Any, low: Any, high: Any, spec: QuantSpec) -> Any:
    """Rounds `x` to the per-tensor grid over `[low, high]`, straight-through inside it.

    Outside the range the gradient goes to the bound that cut `x`.

    XLA, by which Keras compiles on GPUs, has a formula of its own for the fused kernel: outputs
    are off the grid by float roundings, and ties can fall the other way.

    Args:
        x: float32 tensor of any shape.
        low, high: float32 scalars as `widen` leaves them.
        spec: the grid; its `axis` must be `None`.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.quantization.fake_quant_with_min_max_vars(
            x, low, high, num_bits=spec.bits, narrow_range=spec.narrow_range
        )
    return _fake_quantize_ops(x, low, high, spec)


def _fake_quantize_ops(x: Any, low: Any, high: Any, spec: QuantSpec) -> Any:
    """The formula of the fused kernel in `keras.ops`; the float operations keep its order."""

    def hidden(constant: float) -> Any:
        # A compiler that knows a constant divides by it by multiplying with its reciprocal, and
        # adds it in another order: both round differently.
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


def weight_scale(weight: Any, spec: QuantSpec) -> Any:
    """Scale of a symmetric grid that just holds the largest magnitude of `weight`.

    Shape: `weight.shape` with every axis that is not in `spec.axis` reduced to 1. An all-zero
    channel has scale 1, on which zero is exact; so has one whose step would be below
    `SMALLEST_RANGE`. NaN and infinity show in the scale.
    """
    largest = ops.max(ops.abs(weight), axis=shared_axes(weight, spec), keepdims=True)
    # A compiler that knows the divisor multiplies by its reciprocal, which rounds differently:
    # training would use other scales than freezing. So it is hidden; NaN stays NaN.
    qmax = ops.where(largest >= 0.0, float(spec.qmax), 0.0)
    return usable_scale(largest / qmax)


def usable_scale(scale: Any) -> Any:
    """`scale`, but 1 where it is below `SMALLEST_RANGE`: there is nothing there but zero."""
    return ops.where(scale < SMALLEST_RANGE, ops.ones_like(scale), scale)


def mean_magnitude(weight: Any, spec: QuantSpec) -> Any:
    """Mean of `|weight|` over the weights that share a scale; shape as `weight_scale`."""
    return ops.mean(ops.abs(weight), axis=shared_axes(weight, spec), keepdims=True)


def fake_quantize_weight(weight: Any, scale: Any, spec: QuantSpec) -> Any:
    """Rounds `weight` to the symmetric grid of step `scale`; the gradient passes unchanged.

    Rounds half away from zero, as the TensorFlow converter does. Nothing lies outside a
    max-abs range but by a float rounding, so no gradient is cut: the fused kernels would stop
    the largest weight of many a channel.

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
    """`value` to the bit, with the gradient of `source`."""
    # The difference is exactly zero; it carries the gradient.
    return ops.stop_gradient(value) + (source - ops.stop_gradient(source))


def shared_axes(weight: Any, spec: QuantSpec) -> tuple[int, ...]:
    """The axes of `weight` along which all weights share a scale."""
    rank = len(weight.shape)
    axes = () if spec.axis is None else spec.axis
    kept = {int(a) % rank for a in ((axes,) if isinstance(axes, int) else axes)}
    return tuple(a for a in range(rank) if a not in kept)
