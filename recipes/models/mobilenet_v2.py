"""MobileNetV2 for small images: the paper's blocks, with two of its five halvings left out.

Sandler et al. 2018, table 2 (https://arxiv.org/abs/1801.04381). At 32x32 the paper's strides would
leave 1x1; with `STRIDES` the stem and the second stage keep the resolution, with `FAST_STRIDES`,
for a quarter of the work, the second and the sixth. In both 4x4 reaches the pooling.
"""

from types import ModuleType
from typing import Any

import keras

# One row per stage: expansion, output channels, blocks.
STAGES = (
    (1, 16, 1),
    (6, 24, 2),
    (6, 32, 3),
    (6, 64, 4),
    (6, 96, 3),
    (6, 160, 3),
    (6, 320, 1),
)
# Of the stem, and of the first block of each stage.
STRIDES = (1, 1, 1, 2, 2, 1, 2, 1)
FAST_STRIDES = (2, 1, 1, 2, 2, 1, 1, 1)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


def mobilenet_v2(
    input_shape: tuple[int, int, int] = (32, 32, 3),
    classes: int = 10,
    *,
    width: float = 0.35,
    strides: tuple[int, ...] = STRIDES,
    stages: tuple[tuple[int, int, int], ...] = STAGES,
    framework: ModuleType = keras,
) -> Any:
    """MobileNetV2 with `width` times the paper's channels, rounded to multiples of eight.

    The head keeps 1,280 channels when `width` is below one, as in the paper. `framework` is the
    Keras that builds it: `keras`, or `tf_keras`, whose weights then come in the same order.
    """
    build = _Builder(framework)
    inputs = framework.Input(input_shape)
    x = build.conv_bn(inputs, _channels(STEM_CHANNELS, width), kernel_size=3, strides=strides[0])
    x = build.relu6(x)
    for (expansion, filters, blocks), stride in zip(stages, strides[1:], strict=True):
        for block in range(blocks):
            x = build.inverted_residual(
                x, _channels(filters, width), expansion, strides=stride if block == 0 else 1
            )
    x = build.relu6(build.conv_bn(x, _channels(HEAD_CHANNELS, max(width, 1.0))))
    x = framework.layers.GlobalAveragePooling2D()(x)
    outputs = framework.layers.Dense(classes, activation="softmax")(x)
    return framework.Model(inputs, outputs, name="mobilenet_v2")


class _Builder:
    """The network's blocks, of the layers of one Keras."""

    def __init__(self, framework: ModuleType):
        self.layers = framework.layers

    def relu6(self, x: Any) -> Any:
        return self.layers.ReLU(max_value=6.0)(x)

    def conv_bn(self, x: Any, filters: int, *, kernel_size: int = 1, strides: int = 1) -> Any:
        conv = self.layers.Conv2D(
            filters, kernel_size, strides=strides, padding="same", use_bias=False
        )
        return self.layers.BatchNormalization()(conv(x))

    def inverted_residual(self, x: Any, filters: int, expansion: int, *, strides: int) -> Any:
        y = x
        if expansion > 1:
            y = self.relu6(self.conv_bn(y, expansion * x.shape[-1]))
        depthwise = self.layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False)
        y = self.relu6(self.layers.BatchNormalization()(depthwise(y)))
        y = self.conv_bn(y, filters)
        if strides == 1 and x.shape[-1] == filters:
            y = self.layers.Add()([x, y])
        return y


def _channels(filters: int, width: float) -> int:
    """The multiple of eight nearest to `filters * width`, never more than a tenth below it."""
    wanted = filters * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8
