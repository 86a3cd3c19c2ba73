"""BatchNormalization in training, computed by TensorFlow's fused kernel where it gives the same.

Keras computes it with about ten operators, each of which reads and writes the whole activation.
"""

from typing import Any

import keras

# The fused kernel silently replaces a smaller epsilon by this one.
LEAST_EPSILON = 1.001e-5


def normalize(norm: keras.layers.Layer, x: Any, training: bool | None) -> Any:
    """`norm(x, training=training)` for any shape, by the fused kernel if possible.

    The moving statistics are updated as Keras does. The fused kernel sums in another order, so the
    last bits of a float32 may differ.
    """
    if training and norm.trainable and _fuses(norm, x):
        return _fused(norm, x)
    return norm(x, training=training)


def _fuses(norm: Any, x: Any) -> bool:
    if keras.backend.backend() != "tensorflow" or type(norm) is not keras.layers.BatchNormalization:
        return False
    if norm.synchronized or norm.activity_regularizer is not None or norm.epsilon < LEAST_EPSILON:
        return False
    images = len(x.shape) == 4 and norm.axis in (-1, 3)
    return images and x.dtype == norm.compute_dtype == "float32"


def _fused(norm: Any, x: Any) -> Any:
    import tensorflow as tf

    variance = norm.moving_variance.value
    y, mean, sample_variance = tf.compat.v1.nn.fused_batch_norm(
        x,
        norm.gamma.value if norm.scale else tf.ones_like(variance),
        norm.beta.value if norm.center else tf.zeros_like(variance),
        epsilon=norm.epsilon,
        is_training=True,
    )
    # The kernel's variance divides by n - 1, Keras's by n.
    n = tf.cast(tf.size(x) // x.shape[3], tf.float32)
    biased = sample_variance * ((n - 1.0) / n)
    for moving, now in ((norm.moving_mean, mean), (norm.moving_variance, biased)):
        moving.assign(moving.value * norm.momentum + now * (1.0 - norm.momentum))
    return y
