"""MLPerf Tiny's image classification network: a ResNet of eight weighted layers for 32x32 images.

Banbury et al. 2021, "MLPerf Tiny Benchmark", section 4 (https://arxiv.org/abs/2106.07597).
"""

import keras
from keras import layers

FILTERS = (16, 32, 64)
L2 = 1e-4


def resnet8(input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10) -> keras.Model:
    """The reference ResNet-8; the pretrained weights `mlperf_tiny/ic` fit it in order.

    Pixels go in as 0..255 and class probabilities come out. Three stacks of two convolutions have
    16, 32 and 64 channels; the second and third halve height and width.
    """
    inputs = keras.Input(input_shape)
    x = _conv(inputs, FILTERS[0])
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    for stack, filters in enumerate(FILTERS):
        x = _stack(x, filters, strides=1 if stack == 0 else 2)
    x = layers.AveragePooling2D(pool_size=x.shape[1:3])(x)
    x = layers.Flatten()(x)
    outputs = layers.Dense(classes, activation="softmax", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, outputs, name="resnet8")


def _stack(x: keras.KerasTensor, filters: int, *, strides: int) -> keras.KerasTensor:
    y = _conv(x, filters, strides=strides)
    y = layers.Activation("relu")(layers.BatchNormalization()(y))
    y = layers.BatchNormalization()(_conv(y, filters))
    if strides > 1:
        x = _conv(x, filters, kernel_size=1, strides=strides)
    return layers.Activation("relu")(layers.Add()([x, y]))


def _conv(
    x: keras.KerasTensor, filters: int, *, kernel_size: int = 3, strides: int = 1
) -> keras.KerasTensor:
    return layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="same",
        kernel_initializer="he_normal",
        kernel_regularizer=keras.regularizers.L2(L2),
    )(x)
