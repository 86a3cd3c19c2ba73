"""The networks that are measured, in Keras 3 and, for tfmot, in Keras 2."""

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Network:
    """A float network: `build(keras)` makes it of the layers of that module, Keras 3 or 2."""

    build: Callable[[ModuleType], Any]
    input_shape: tuple[int, int, int]
    batch_size: int


def resnet8(keras: ModuleType) -> Any:
    """The network of `recipes.models.resnet8`, of whichever Keras."""
    return _residual(keras, "resnet8", (32, 32, 3), ((16, 1), (32, 2), (64, 2)))


def stem(keras: ModuleType) -> Any:
    """What `resnet8` begins and ends with, without its blocks."""
    return _residual(keras, "stem", (16, 16, 3), ())


def _residual(
    keras: ModuleType, name: str, shape: tuple[int, int, int], stages: Sequence[tuple[int, int]]
) -> Any:
    """A network of residual blocks, each of so many filters and of a stride."""
    layers = keras.layers

    def conv(x: Any, filters: int, kernel_size: int = 3, strides: int = 1) -> Any:
        return layers.Conv2D(
            filters,
            kernel_size,
            strides=strides,
            padding="same",
            kernel_initializer="he_normal",
            kernel_regularizer=keras.regularizers.L2(1e-4),
        )(x)

    def relu(x: Any) -> Any:
        return layers.Activation("relu")(x)

    inputs = keras.Input(shape)
    x = relu(layers.BatchNormalization()(conv(inputs, 16)))
    for filters, strides in stages:
        y = relu(layers.BatchNormalization()(conv(x, filters, strides=strides)))
        y = layers.BatchNormalization()(conv(y, filters))
        if strides > 1:
            x = conv(x, filters, kernel_size=1, strides=strides)
        x = relu(layers.Add()([x, y]))
    x = layers.Flatten()(layers.AveragePooling2D(8)(x))
    outputs = layers.Dense(CLASSES, activation="softmax", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, outputs, name=name)


def mobilenet_v2(keras: ModuleType) -> Any:
    """Keras's own MobileNetV2, 0.35 wide, without pretrained weights."""
    return keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classes=CLASSES)


NETWORKS = {
    "resnet8": Network(resnet8, (32, 32, 3), 64),
    "mobilenet_v2": Network(mobilenet_v2, (96, 96, 3), 32),
}
# What a benchmark runs only to show that it runs: tracing takes the time there, layer by layer.
SMOKE = {"stem": Network(stem, (16, 16, 3), 2)}
