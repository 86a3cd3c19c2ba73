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

import keras
import numpy as np
from keras import ops

from kqat.spec import QuantSpec


def widen(low, high):
    """Makes a range usable: `low <= 0 <= high`, and one unit wide where it is only zero.

    A constant zero activation has no range; on a grid of one unit it stays exactly zero.
    """
    low = ops.minimum(low, 0.0)
    high = ops.maximum(high, 0.0)
    return low, ops.where(high - low > 0.0, high, ops.ones_like(high))


def nudge(low: np.ndarray, high: np.ndarray, spec: QuantSpec):
    """Scale (float32) and zero point (int32) of the grid over `[low, high]`.

    The rounding is that of TensorFlow's fake-quant kernels, so these are the very parameters
    that training used. Shapes: `low`, `high` and both results alike.
    """
    low, high = (np.asarray(v, np.float32) for v in (low, high))
    levels = np.float32(spec.qmax - spec.qmin)
    scale = (high - low) / levels
    # TensorFlow counts from 0 (1 if narrow); shifting keeps its float rounding identical.
    first = np.float32(int(spec.narrow_range))
    from_low = first - low / scale
    zero = np.clip(np.floor(np.abs(from_low) + np.float32(0.5)) * np.sign(from_low), first, None)
    zero = np.minimum(zero, first + levels)
    return scale, (zero - first).astype(np.int32) + np.int32(spec.qmin)


def fake_quantize(x, low, high, spec: QuantSpec):
    """Rounds `x` to the per-tensor grid over `[low, high]`, straight-through inside it.

    Args:
        x: float32 tensor of any shape.
        low, high: float32 scalars with `low <= 0 <= high`.
        spec: the grid; its `axis` must be `None`.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.quantization.fake_quant_with_min_max_vars(
            x, low, high, num_bits=spec.bits, narrow_range=spec.narrow_range
        )
    return _fake_quantize_ops(x, low, high, spec)


def _fake_quantize_ops(x, low, high, spec: QuantSpec):
    """The formula of the fused kernel in `keras.ops`; the float operations keep its order."""
    levels = float(spec.qmax - spec.qmin)
    first = float(spec.narrow_range)
    scale = (high - low) / levels
    from_low = first - low / scale
    zero = ops.floor(ops.abs(from_low) + 0.5) * ops.sign(from_low)
    zero = ops.clip(zero, first, first + levels)
    nudged_low, nudged_high = (first - zero) * scale, (first + levels - zero) * scale
    inverse = 1.0 / scale
    quant_zero = ops.floor(-nudged_low * inverse + 0.5)
    # Clipping passes the gradient inside the range only; the rounding passes it unchanged.
    clipped = ops.minimum(ops.maximum(x, nudged_low), nudged_high)
    rounded = ops.floor((clipped - nudged_low) * inverse - quant_zero + 0.5) * scale
    return clipped + ops.stop_gradient(rounded - clipped)


def weight_scale(weight, spec: QuantSpec):
    """Scale of a symmetric grid that just holds the largest magnitude of `weight`.

    Shape: `weight.shape` with every axis that is not in `spec.axis` reduced to 1. An all-zero
    channel has scale 1, on which zero is exact.
    """
    kept = _kept_axes(spec, len(weight.shape))
    reduced = tuple(a for a in range(len(weight.shape)) if a not in kept)
    largest = ops.max(ops.abs(weight), axis=reduced, keepdims=True)
    # Twice over twice: the same rounding as the fused kernels' (high - low) / (qmax - qmin).
    scale = (2.0 * largest) / float(2 * spec.qmax)
    return ops.where(scale > 0.0, scale, ops.ones_like(scale))


def fake_quantize_weight(weight, scale, spec: QuantSpec):
    """Rounds `weight` to the symmetric grid of step `scale`; the gradient passes unchanged.

    Rounds half away from zero, as the TensorFlow converter does. Nothing lies outside a
    max-abs range but by a float rounding, so no gradient is cut: the fused kernels would stop
    the largest weight of many a channel.

    `output == q * scale` exactly, with integers `q` in `[-qmax, qmax]`.
    """
    limit = float(spec.qmax)
    ratio = weight / scale
    rounded = ops.sign(ratio) * ops.floor(ops.abs(ratio) + 0.5)
    on_grid = ops.clip(rounded, -limit, limit) * scale
    # The sum is exact: by Sterbenz' lemma on_grid - weight is, on_grid being 0 or within
    # a factor of two of weight.
    return weight + ops.stop_gradient(on_grid - weight)


def _kept_axes(spec: QuantSpec, rank: int) -> tuple[int, ...]:
    axes = () if spec.axis is None else spec.axis
    axes = (axes,) if isinstance(axes, int) else axes
    return tuple(int(a) % rank for a in axes)
