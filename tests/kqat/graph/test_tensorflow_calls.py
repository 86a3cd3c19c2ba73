"""Functions of TensorFlow inside a traced `call`, by the table."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import kqat
from kqat.base import UnsupportedLayerError
from kqat.graph.tensorflow_graphs import computed
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


def of_rows(own: Any, x: Any) -> Any:
    """A row of as many numbers as there are steps, which Keras's `add` takes for their bias."""
    return tf.add(tf.reduce_sum(x, axis=-1, keepdims=True), np.arange(6, dtype=np.float32))


def of_a_table(own: Any, x: Any) -> Any:
    """Functions that have no row: of weights, and of sizes that TensorFlow computes."""
    token = tf.repeat(own.bias[tf.newaxis, tf.newaxis], tf.shape(x)[0], axis=0)
    y = tf.tensordot(tf.concat([token, x], 1), tf.eye(8), 1)
    y = tf.nn.bias_add(y, np.ones(8, np.float32)) * tf.broadcast_to(
        tf.math.sigmoid(x[:, :1]), tf.shape(y)
    )
    mean, variance = tf.nn.moments(y, [2], keepdims=True)
    y = (y - mean) * tf.math.rsqrt(variance + 1e-3)
    return tf.reshape(y, tf.concat([tf.shape(x)[:1], [7 * 8]], 0))


def of_images(own: Any, x: Any) -> Any:
    """Functions of images, which are made of others."""
    image = tf.reshape(x, tf.stack([tf.shape(x)[0], 4, 4, 3]))
    image = tf.image.resize(tf.image.per_image_standardization(image), tf.shape(image)[1:3] * 2)
    gray = tf.image.adjust_contrast(tf.image.rgb_to_grayscale(image), 1.5)
    image = image + tf.image.grayscale_to_rgb(gray)
    image = tf.nn.conv2d(image, np.ones((3, 3, 3, 2), np.float32), 1, "SAME")
    image = tf.image.crop_to_bounding_box(tf.image.flip_left_right(image), 1, 2, 6, 4)
    edges = tf.image.sobel_edges(tf.nn.max_pool2d(image, 2, 2, "VALID"))
    return tf.reduce_max(edges, axis=-1) + own.scale


def of_each_number(own: Any, x: Any) -> Any:
    """A `tf.custom_gradient`, constants, and a shape as TensorFlow tells it."""
    assert x.get_shape().rank == 3
    y = tf.nn.l2_normalize(x, -1) + tf.cast(tf.linspace(0.0, 1.0, 8), tf.float32)
    return tf.nn.log_softmax(tf.math.squared_difference(y, tf.nn.swish(x)))


def of_patches(own: Any, x: Any) -> Any:
    """What image models call, of which only TensorFlow's graph tells what it computes."""
    image = tf.tile(x[:, :, :, tf.newaxis], [1, 1, 1, 2])
    patches = tf.image.extract_patches(image, [1, 2, 2, 1], [1, 2, 2, 1], [1, 1, 1, 1], "SAME")
    mixed = tf.nn.conv2d(image, tf.ones((3, 3, 2, 4)) / 9, 2, [[0, 0], [1, 1], [0, 1], [0, 0]])
    pooled = tf.nn.max_pool2d(mixed, 2, 1, "SAME") - tf.nn.avg_pool2d(mixed, 2, 1, "SAME")
    large = tf.image.resize(pooled, [6, 8])
    cut = tf.image.crop_to_bounding_box(tf.image.flip_left_right(large), 0, 2, 3, 4)
    normal = tf.nn.local_response_normalization(cut, depth_radius=1)
    return tf.concat([normal, patches, tf.repeat(patches, 2, axis=-1)], -1)


def of_statistics(own: Any, x: Any) -> Any:
    """Functions of many operations, and those that a table by name would have to list."""
    mean, variance = tf.nn.moments(x, [1], keepdims=True)
    y = tf.math.l2_normalize(x - mean, axis=-1) / tf.sqrt(variance + 1.0)
    y += tf.nn.swish(x) + tf.nn.log_softmax(x) + tf.math.squared_difference(x, tf.pow(x, 2))
    y = tf.tensordot(y, tf.ones((8, 8)) / 8, axes=1) + tf.slice(x, [0, 0, 0], [-1, 6, 8])
    y = tf.where(tf.greater(y, 0.1), y, -tf.ones_like(y)) + tf.linalg.matrix_transpose(
        tf.linalg.matrix_transpose(x)
    )
    framed = tf.signal.frame(y, 4, 2, axis=-1)
    return framed + tf.norm(framed, axis=-1, keepdims=True)


def in_sizes_that_are_tensors(own: Any, x: Any) -> Any:
    """Sizes as TensorFlow's own code hands them on: in tensors."""
    size = tf.shape(x)[0]
    y = tf.transpose(tf.reshape(x, tf.stack([size, 6, 2, 4])), tf.constant([0, 1, 3, 2]))
    return tf.tile(tf.reshape(y, tf.stack([size, 6, 8])), tf.constant([1, 2, 1]))


def hard_swish(own: Any, x: Any) -> Any:
    """A function of each number, which becomes one table."""
    return x * tf.nn.relu6(x + 3.0) / 6.0


def mish(own: Any, x: Any) -> Any:
    return x * tf.math.tanh(tf.math.softplus(x))


@pytest.mark.parametrize("call", [hard_swish, mish])
def test_a_function_of_each_number_is_one_part(call: Any) -> None:
    layer = layers.Lambda(lambda x: call(None, x), name="act")
    parts = _parts(_model(layer))
    assert [part.name for part in parts.layers] == ["x", "act", "head"]


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


CALLS = (
    in_sizes_that_are_tensors, attention, of_a_weight, of_rows, of_a_table, of_images,
    of_each_number, of_patches, of_statistics, shapes, counts,
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_parts_compute_what_tensorflow_computes(call: Any) -> None:
    model = _model(Own(call))
    np.testing.assert_allclose(_parts(model)(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)


def test_sums_of_a_graph_are_added_as_they_broadcast() -> None:
    x, row = keras.Input((6, 1)), np.arange(6, dtype=np.float32)
    model = keras.Model(x, computed(lambda x: x + row, (x,), {}))
    column = np.random.default_rng(0).normal(size=(2, 6, 1)).astype(np.float32)
    np.testing.assert_array_equal(model(column), column + row)


def test_what_the_table_lacks_is_named() -> None:
    def call(own: Any, x: Any) -> Any:
        filters = np.zeros((2, 2, 8), np.float32)
        ones = [1, 1, 1, 1]
        return tf.nn.erosion2d(x[:, None], filters, ones, "SAME", "NHWC", ones)

    model = _model(Own(call))
    with pytest.raises(
        UnsupportedLayerError, match=r"tf's erosion2d.* operation Dilation2D, which"
    ):
        _parts(model)


def test_tensorflow_takes_no_symbolic_tensor_elsewhere() -> None:
    _parts(_model(Own(of_a_weight)))
    with pytest.raises(ValueError, match="KerasTensor cannot be used"):
        tf.nn.relu(keras.Input((3,)))
    assert type(keras.Input((3,)).shape) is tuple
    assert keras.ops.is_tensor(keras.ops.ndim(np.ones(3))) is False
    assert isinstance(keras.ops.ndim(keras.Input((3,))), keras.KerasTensor)


def test_what_no_operation_of_keras_computes_is_named() -> None:
    def spectrum(own: Any, x: Any) -> Any:
        return tf.abs(tf.signal.stft(x[:, 0], 4, 2))

    with pytest.raises(kqat.UnsupportedLayerError, match=r"stft takes TensorFlow.s operation RFFT"):
        kqat.plan(_model(Own(spectrum)))
