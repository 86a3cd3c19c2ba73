"""MobileNetV2 for small images: the paper's blocks, with two of its five halvings left out.

Sandler et al. 2018, table 2 (https://arxiv.org/abs/1801.04381). At 32x32 the paper's strides would
leave 1x1; here the stem and the second stage keep the resolution, so 4x4 reaches the pooling.
"""

import keras
from keras import layers

# One row per stage: expansion, output channels, blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


def mobilenet_v2(
    input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10, *, width: float = 0.35
) -> keras.Model:
    """MobileNetV2 with `width` times the paper's channels, rounded to multiples of eight.

    The head keeps 1,280 channels when `width` is below one, as in the paper.
    """
    inputs = keras.Input(input_shape)
    x = _conv_bn(inputs, _channels(STEM_CHANNELS, width), kernel_size=3)
    x = layers.ReLU(max_value=6.0)(x)
    for expansion, filters, blocks, stride in STAGES:
        for block in range(blocks):
            x = _inverted_residual(
                x, _channels(filters, width), expansion, strides=stride if block == 0 else 1
            )
    x = _conv_bn(x, _channels(HEAD_CHANNELS, max(width, 1.0)))
    x = layers.ReLU(max_value=6.0)(x)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(classes, activation="softmax")(x)
    return keras.Model(inputs, outputs, name="mobilenet_v2")


def _inverted_residual(
    x: keras.KerasTensor, filters: int, expansion: int, *, strides: int
) -> keras.KerasTensor:
    y = x
    if expansion > 1:
        y = layers.ReLU(max_value=6.0)(_conv_bn(y, expansion * x.shape[-1]))
    y = layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False)(y)
    y = layers.ReLU(max_value=6.0)(layers.BatchNormalization()(y))
    y = _conv_bn(y, filters)
    if strides == 1 and x.shape[-1] == filters:
        y = layers.Add()([x, y])
    return y


def _conv_bn(x: keras.KerasTensor, filters: int, *, kernel_size: int = 1) -> keras.KerasTensor:
    x = layers.Conv2D(filters, kernel_size, padding="same", use_bias=False)(x)
    return layers.BatchNormalization()(x)


def _channels(filters: int, width: float) -> int:
    """The multiple of eight nearest to `filters * width`, never more than a tenth below it."""
    wanted = filters * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8
