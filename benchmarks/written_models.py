"""Small models in the style in which users write them: own layers without configs, `tf.*`, lambdas.

They are of our own words, after the ideas of well-known papers and tutorials.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

Layer = layers.Layer


class Patches(Layer):
    """Patches of an image by TensorFlow, and a position for each."""

    def __init__(self, size: int, count: int, features: int) -> None:
        super().__init__()
        self.size, self.count = size, count
        self.projection = layers.Dense(features)
        self.positions = layers.Embedding(count, features)

    def call(self, images: Any) -> Any:
        """(batch, patches, features)."""
        window = [1, self.size, self.size, 1]
        found = tf.image.extract_patches(images, window, window, [1, 1, 1, 1], "VALID")
        found = tf.reshape(found, [tf.shape(images)[0], -1, found.shape[-1]])
        return self.projection(found) + self.positions(tf.range(self.count))


class ClassToken(Layer):
    """A learnt token before all others."""

    def build(self, shape: Any) -> None:
        """Makes the token."""
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="random_normal")

    def call(self, x: Any) -> Any:
        """(batch, 1 + steps, features)."""
        return tf.concat([tf.broadcast_to(self.token, [tf.shape(x)[0], 1, x.shape[-1]]), x], 1)


def _attended(x: Any, activation: Any = "gelu") -> Any:
    """A transformer block, the normalization before each part."""
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 16)(y, y)
    y = layers.Dense(64, activation=activation)(layers.LayerNormalization()(x))
    return x + layers.Dense(x.shape[-1])(y)


def vit() -> keras.Model:
    """A vision transformer over functions of TensorFlow (Dosovitskiy et al. 2021)."""
    images = keras.Input((32, 32, 3))
    x = ClassToken()(Patches(8, 16, 32)(images))
    x = _attended(_attended(x, tf.nn.gelu), tf.nn.gelu)
    x = layers.Lambda(lambda t: t[:, 0])(x)
    return keras.Model(images, layers.Dense(10)(x))


class Mixer(Layer):
    """Mixes steps, then features (Tolstikhin et al. 2021)."""

    def __init__(self, steps: int, features: int) -> None:
        super().__init__()
        self.over_steps = keras.Sequential([layers.Dense(steps, "gelu"), layers.Dense(steps)])
        self.over_features = keras.Sequential(
            [layers.Dense(features, "gelu"), layers.Dense(features)]
        )
        self.normalize = layers.LayerNormalization()

    def call(self, x: Any) -> Any:
        """The shape of `x`."""
        turned = ops.transpose(self.normalize(x), (0, 2, 1))
        x = ops.transpose(self.over_steps(turned), (0, 2, 1)) + x
        return x + self.over_features(self.normalize(x))


def mixer() -> keras.Model:
    """An MLP-Mixer."""
    images = keras.Input((32, 32, 3))
    x = Patches(8, 16, 32)(images)
    x = Mixer(16, 32)(Mixer(16, 32)(x))
    return keras.Model(images, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def windows() -> keras.Model:
    """Attention inside of windows, which are merged into the batch outside of any layer."""
    images = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 2, 2)(images)
    y = ops.transpose(ops.reshape(x, (-1, 2, 4, 2, 4, 16)), (0, 1, 3, 2, 4, 5))
    y = layers.LayerNormalization()(ops.reshape(y, (-1, 16, 16)))
    q, k, v = ops.split(layers.Dense(48)(y), 3, axis=-1)
    y = ops.matmul(ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1))) / 4.0), v)
    y = ops.transpose(ops.reshape(y, (-1, 2, 2, 4, 4, 16)), (0, 1, 3, 2, 4, 5))
    x = x + ops.reshape(y, (-1, 8, 8, 16))
    return keras.Model(images, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def mobilevit_block() -> keras.Model:
    """Attention over inputs of rank 4, as unfolded by Reshape (Mehta and Rastegari 2022)."""
    images = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 3, 2, padding="same", activation="swish")(images)
    y = _attended(layers.Reshape((4, 16, 16))(x), "swish")
    x = layers.Concatenate()([x, layers.Reshape((8, 8, 16))(y)])
    x = layers.Conv2D(16, 3, padding="same", activation="swish")(x)
    return keras.Model(images, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


class Cbam(Layer):
    """Attention to channels, then to places (Woo et al. 2018), over functions of TensorFlow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = layers.Dense(channels // 4, activation="relu")
        self.wide = layers.Dense(channels)
        self.place = layers.Conv2D(1, 7, padding="same", activation="sigmoid")

    def call(self, x: Any) -> Any:
        """The shape of `x`."""
        mean = self.wide(self.narrow(tf.reduce_mean(x, axis=[1, 2])))
        most = self.wide(self.narrow(tf.reduce_max(x, axis=[1, 2])))
        x = x * tf.reshape(tf.sigmoid(mean + most), (-1, 1, 1, x.shape[-1]))
        found = [f(x, axis=-1, keepdims=True) for f in (tf.reduce_mean, tf.reduce_max)]
        return x * self.place(tf.concat(found, axis=-1))


class Shuffle(Layer):
    """Channels of two groups in turns (Ma et al. 2018), with sizes in tensors."""

    def call(self, x: Any) -> Any:
        """The shape of `x`."""
        size, (h, w, c) = tf.shape(x)[0], x.shape[1:]
        x = tf.transpose(tf.reshape(x, tf.stack([size, h, w, 2, c // 2])), [0, 1, 2, 4, 3])
        return tf.reshape(x, tf.stack([size, h, w, c]))


def _convolutional(block: Callable[[Any], Any]) -> keras.Model:
    images = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, 2, padding="same", activation="relu")(images)
    return keras.Model(images, layers.Dense(10)(layers.GlobalAveragePooling2D()(block(x))))


def cbam() -> keras.Model:
    """A CNN with CBAM."""
    return _convolutional(Cbam(16))


def shufflenet() -> keras.Model:
    """A CNN with two units of ShuffleNetV2."""

    def unit(x: Any) -> Any:
        left, right = layers.Lambda(lambda t: tf.split(t, 2, axis=-1))(x)
        right = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 1)(right)))
        right = layers.DepthwiseConv2D(3, padding="same")(right)
        right = layers.ReLU()(layers.Conv2D(8, 1)(layers.BatchNormalization()(right)))
        return Shuffle()(layers.Concatenate()([left, right]))

    return _convolutional(lambda x: unit(unit(x)))


class Normalized(Layer):
    """Normalization over the places of each image, by `tf.nn.moments` (Ulyanov et al. 2016)."""

    def call(self, x: Any) -> Any:
        """The shape of `x`."""
        mean, variance = tf.nn.moments(x, axes=[1, 2], keepdims=True)
        return (x - mean) * tf.math.rsqrt(variance + 1e-3)


def style() -> keras.Model:
    """A network for style transfer: reflected borders and instance normalization."""
    images = keras.Input((16, 16, 3))
    x = layers.Lambda(lambda t: ops.pad(t, [[0, 0], [1, 1], [1, 1], [0, 0]], "REFLECT"))(images)
    x = layers.Activation("relu")(Normalized()(layers.Conv2D(8, 3)(x)))
    x = layers.Lambda(lambda t: tf.image.resize(t, [32, 32], method="nearest"))(x)
    return keras.Model(images, layers.Conv2D(3, 3, padding="same", activation="tanh")(x))


def mish() -> keras.Model:
    """A CNN whose activation is a function of each number in TensorFlow (Misra 2020)."""
    act = layers.Lambda(lambda x: x * tf.math.tanh(tf.math.softplus(x)))
    return _convolutional(lambda x: act(layers.BatchNormalization()(layers.Conv2D(16, 3)(x))))


class Factors(Layer):
    """Products of all pairs of features by learnt factors (Rendle 2010)."""

    def build(self, shape: Any) -> None:
        """Makes the weights."""
        self.linear = self.add_weight(shape=(shape[-1], 1))
        self.factors = self.add_weight(shape=(shape[-1], 4))

    def call(self, x: Any) -> Any:
        """(batch, 1)."""
        squares = tf.matmul(tf.pow(x, 2), np.ones((20, 4), np.float32))
        pairs = tf.pow(tf.matmul(x, self.factors), 2) - squares
        return tf.matmul(x, self.linear) + 0.5 * tf.reduce_sum(pairs, 1, keepdims=True)


def deepfm() -> keras.Model:
    """A factorization machine beside a Dense network (Guo et al. 2017)."""
    features = keras.Input((20,))
    deep = layers.Dense(1)(layers.Dense(16, activation="relu")(features))
    return keras.Model(features, layers.add([Factors()(features), deep]))


def wavenet() -> keras.Model:
    """Gated causal convolutions (van den Oord et al. 2016)."""
    waves = keras.Input((64, 1))
    x, kept = layers.Conv1D(16, 1)(waves), []
    for rate in (1, 2, 4, 8):
        options = {"dilation_rate": rate, "padding": "causal"}
        value = layers.Conv1D(16, 2, activation="tanh", **options)(x)
        gate = layers.Conv1D(16, 2, activation="sigmoid", **options)(x)
        kept.append(layers.Conv1D(16, 1)(value * gate))
        x = layers.Add()([kept[-1], x])
    x = layers.Conv1D(16, 1, activation="relu")(layers.ReLU()(layers.Add()(kept)))
    return keras.Model(waves, layers.Conv1D(8, 1)(x))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "ViT, tf.*": vit,
    "MLP-Mixer": mixer,
    "windows outside": windows,
    "MobileViT block": mobilevit_block,
    "CBAM, tf.*": cbam,
    "ShuffleNetV2, tf.*": shufflenet,
    "style transfer, tf.*": style,
    "Mish, tf.*": mish,
    "DeepFM, tf.*": deepfm,
    "WaveNet": wavenet,
}
