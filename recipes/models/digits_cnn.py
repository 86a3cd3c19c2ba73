"""A small network for scikit-learn's 8x8 digits, built of what microcontrollers run every day."""

import keras
from keras import layers

# An epoch has only 42 batches of 32: at Keras's 0.99 the moving statistics would still trail the
# weights after ten epochs.
BN_MOMENTUM = 0.9


def digits_cnn(input_shape: tuple[int, int, int] = (8, 8, 1), classes: int = 10) -> keras.Model:
    """Depthwise-separable blocks with BatchNormalization, ReLU and ReLU6, and one residual Add.

    Pixels go in as 0..1 and class probabilities come out.
    """
    inputs = keras.Input(input_shape, name="image")
    x = layers.Conv2D(24, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = layers.BatchNormalization(momentum=BN_MOMENTUM, name="stem_bn")(x)
    x = layers.ReLU(name="stem_relu")(x)
    x = _separable(x, 48, strides=1, name="block_1")
    y = _separable(x, 48, strides=1, name="block_2")
    x = layers.Add(name="add")([x, y])
    x = _separable(x, 96, strides=2, name="block_3")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = layers.Dense(classes, activation="softmax", name="probabilities")(x)
    return keras.Model(inputs, outputs, name="digits_cnn")


def _separable(x: keras.KerasTensor, filters: int, *, strides: int, name: str) -> keras.KerasTensor:
    x = layers.DepthwiseConv2D(
        3, strides=strides, padding="same", use_bias=False, name=f"{name}_depthwise"
    )(x)
    x = layers.BatchNormalization(momentum=BN_MOMENTUM, name=f"{name}_depthwise_bn")(x)
    x = layers.ReLU(max_value=6.0, name=f"{name}_depthwise_relu6")(x)
    x = layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_pointwise")(x)
    x = layers.BatchNormalization(momentum=BN_MOMENTUM, name=f"{name}_pointwise_bn")(x)
    return layers.ReLU(name=f"{name}_pointwise_relu")(x)
