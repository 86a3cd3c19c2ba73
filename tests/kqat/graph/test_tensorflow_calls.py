"""Functions of TensorFlow inside a traced `call`, by the table."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from tests.kqat.graph.test_tracing_of_calls import ROWS, Own, _model, _parts


def attention(own: Any, x: Any) -> Any:
    """Attention of relative positions, as some write it for TensorFlow alone."""
    size = tf.shape(x)
    y = tf.transpose(tf.reshape(x, (size[0], 6, 2, 4)), (0, 2, 1, 3))
    scores = tf.nn.softmax(tf.matmul(y, y, transpose_b=True))
    places = np.random.default_rng(0).integers(0, 6, (1, 2, 6, 4))
    scores = tf.gather(scores, tf.broadcast_to(places, (size[0], 2, 6, 4)), batch_dims=3)
    mixed = tf.concat([tf.reduce_mean(scores, axis=-1, keepdims=True), y], axis=-1)
    left, right = tf.split(mixed, [2, 3], axis=-1)
    return tf.einsum("bhsd,bhse->bse", left, right)


def of_a_weight(own: Any, x: Any) -> Any:
    """Functions of each number, beside a weight."""
    y = tf.nn.relu(tf.math.tanh(x) * own.scale) + tf.math.add(own.bias, tf.square(x))
    return tf.pad(tf.expand_dims(tf.reduce_sum(y, axis=1), 1), [[0, 0], [1, 0], [0, 0]])


def shapes(own: Any, x: Any) -> Any:
    """Shapes as TensorFlow's tensors have them."""
    _, steps, features = x.shape.as_list()
    known = x.shape[1:].is_fully_defined() and x.get_shape().dims[-1] == features
    y = x * 2.0 if x.shape.rank == x.shape.ndims == 3 and known else x
    y = tf.reshape(y, [-1, steps * features]) / tf.cast(tf.rank(y), tf.float32)
    return y * tf.cast(tf.size(y[0]), y.dtype) / float(x.shape[1:].num_elements())


def counts(own: Any, x: Any) -> Any:
    """Numbers of axes and of entries as `keras.ops` counts them."""
    y = x * 2.0 if ops.ndim(x) == 3 else x
    return y / ops.cast(ops.size(y[0]), "float32")


@pytest.mark.parametrize("call", [attention, of_a_weight, shapes, counts])
def test_parts_compute_what_tensorflow_computes(call: Any) -> None:
    model = _model(Own(call))
    np.testing.assert_allclose(_parts(model)(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)


def test_tensorflow_takes_no_symbolic_tensor_elsewhere() -> None:
    _parts(_model(Own(of_a_weight)))
    with pytest.raises(ValueError, match="KerasTensor cannot be used"):
        tf.nn.relu(keras.Input((3,)))
    assert type(keras.Input((3,)).shape) is tuple
    assert keras.ops.is_tensor(keras.ops.ndim(np.ones(3))) is False
    assert isinstance(keras.ops.ndim(keras.Input((3,))), keras.KerasTensor)
