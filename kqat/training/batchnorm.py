"""BatchNormalization and similar layers: their scale and offset, and training by a fused kernel.

Keras trains it with about ten operators, each of which reads and writes the whole activation. The
fused kernel of TensorFlow is one operator and gives the same values.
"""

from typing import Any

import keras
from keras import layers, ops

from kqat.parts import ChannelAffine

# The fused kernel silently replaces a smaller epsilon by this one.
LEAST_EPSILON = 1.001e-5


def normalize(norm: keras.layers.Layer, x: Any, training: bool | None, moved: Any = None) -> Any:
    """`norm(x, training=training)` for any shape, by the fused kernel if possible.

    The moving statistics are updated as Keras does. The fused kernel sums in another order, so the
    last bits of a float32 may differ.

    Args:
        moved: what is added to the output, `(channels,)`, float32 and without a gradient.
    """
    if training and norm.trainable and _fuses(norm, x):
        return _fused(norm, x, moved)
    y = norm(x, training=training)
    if moved is None:
        return y
    shape = [n if a == norm.axis % len(y.shape) else 1 for a, n in enumerate(y.shape)]
    return y + ops.cast(ops.reshape(moved, shape), y.dtype)


def _fuses(norm: Any, x: Any) -> bool:
    if keras.backend.backend() != "tensorflow" or type(norm) is not keras.layers.BatchNormalization:
        return False
    if norm.synchronized or norm.activity_regularizer is not None or norm.epsilon < LEAST_EPSILON:
        return False
    images = len(x.shape) == 4 and norm.axis in (-1, 3)
    return images and x.dtype == norm.compute_dtype == "float32"


def _fused(norm: Any, x: Any, moved: Any) -> Any:
    import tensorflow as tf

    variance = norm.moving_variance.value
    offset = norm.beta.value if norm.center else tf.zeros_like(variance)
    y, mean, sample_variance = tf.compat.v1.nn.fused_batch_norm(
        x,
        norm.gamma.value if norm.scale else tf.ones_like(variance),
        offset if moved is None else offset + moved,
        epsilon=norm.epsilon,
        is_training=True,
    )
    # The kernel's variance divides by n - 1, Keras's by n.
    n = tf.cast(tf.size(x) // x.shape[3], tf.float32)
    biased = sample_variance * ((n - 1.0) / n)
    for moving, now in ((norm.moving_mean, mean), (norm.moving_variance, biased)):
        moving.assign(moving.value * norm.momentum + now * (1.0 - norm.momentum))
    return y


def normalization_factor(norm: Any) -> Any:
    """`gamma / sqrt(moving_variance + epsilon)` per channel, float32."""
    factor = 1.0 / ops.sqrt(_float32(norm.moving_variance) + norm.epsilon)
    return factor * _float32(norm.gamma) if norm.scale else factor


def _float32(variable: Any) -> Any:
    """A variable's value: where all of a model is in 16 bits, so are its variables."""
    return ops.cast(variable.value, "float32")


def normalization_numbers(norm: Any, bias: Any = None) -> tuple[Any, Any]:
    """Factor and offset per channel, float32, of `norm(y + bias)` with moving statistics."""
    factor = normalization_factor(norm)
    mean = _float32(norm.moving_mean)
    offset = (-mean if bias is None else _float32(bias) - mean) * factor
    return factor, offset + _float32(norm.beta) if norm.center else offset


def affine_numbers(layer: Any) -> tuple[Any, Any]:
    """Factor and offset, float32, of shape `(channels,)` or `(1,)`, of `x * factor + offset`.

    Args:
        layer: a layer whose facts say that it is affine; a BatchNormalization with its moving
            statistics.
    """
    if isinstance(layer, layers.BatchNormalization):
        return normalization_numbers(layer)
    one, zero = ops.ones((1,), "float32"), ops.zeros((1,), "float32")
    if isinstance(layer, layers.Rescaling):
        parts = (ops.cast(ops.convert_to_tensor(v), "float32") for v in (layer.scale, layer.offset))
        scale, offset = (ops.reshape(part, (-1,)) for part in parts)
        return scale, offset
    if isinstance(layer, ChannelAffine):
        factor = one if layer.gamma is None else _float32(layer.gamma)
        return factor, zero if layer.beta is None else _float32(layer.beta)
    mean, variance = (
        ops.reshape(ops.cast(ops.convert_to_tensor(v), "float32"), (-1,))
        for v in (layer.mean, layer.variance)
    )
    deviation = ops.maximum(ops.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return deviation, mean
    return 1.0 / deviation, -mean / deviation
