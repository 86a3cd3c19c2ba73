"""MLPerf Tiny's keyword spotting network: depthwise-separable convolutions over MFCC frames.

Zhang et al. 2017, "Hello Edge", section 4.4 (https://arxiv.org/abs/1711.07128), size S; the stem
and the dropout are those of MLPerf Tiny (https://arxiv.org/abs/2106.07597).
"""

import keras
from keras import layers

FILTERS = 64
BLOCKS = 4
L2 = 1e-4


def ds_cnn(input_shape: tuple[int, int, int] = (49, 10, 1), classes: int = 12) -> keras.Model:
    """The reference DS-CNN; the pretrained weights `mlperf_tiny/kws` fit it in order.

    MFCC features (frames, coefficients, 1) go in and class probabilities come out.
    """
    inputs = keras.Input(input_shape)
    x = _conv(inputs, (10, 4), strides=2)
    x = layers.Dropout(0.2)(_normalized_relu(x))
    for _ in range(BLOCKS):
        x = layers.DepthwiseConv2D(
            3, padding="same", depthwise_regularizer=keras.regularizers.L2(L2)
        )(x)
        x = _conv(_normalized_relu(x), (1, 1))
        x = _normalized_relu(x)
    x = layers.Dropout(0.4)(x)
    x = layers.AveragePooling2D(pool_size=x.shape[1:3])(x)
    x = layers.Flatten()(x)
    outputs = layers.Dense(classes, activation="softmax")(x)
    return keras.Model(inputs, outputs, name="ds_cnn")


def _normalized_relu(x: keras.KerasTensor) -> keras.KerasTensor:
    return layers.Activation("relu")(layers.BatchNormalization()(x))


def _conv(
    x: keras.KerasTensor, kernel_size: tuple[int, int], *, strides: int = 1
) -> keras.KerasTensor:
    return layers.Conv2D(
        FILTERS,
        kernel_size,
        strides=strides,
        padding="same",
        kernel_regularizer=keras.regularizers.L2(L2),
    )(x)
