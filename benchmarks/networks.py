"""The networks that are measured, in Keras 3 and, for tfmot, in Keras 2."""

import dataclasses
from collections.abc import Callable
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

    inputs = keras.Input((32, 32, 3))
    x = relu(layers.BatchNormalization()(conv(inputs, 16)))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        y = relu(layers.BatchNormalization()(conv(x, filters, strides=strides)))
        y = layers.BatchNormalization()(conv(y, filters))
        if strides > 1:
            x = conv(x, filters, kernel_size=1, strides=strides)
        x = relu(layers.Add()([x, y]))
    x = layers.Flatten()(layers.AveragePooling2D(8)(x))
    outputs = layers.Dense(CLASSES, activation="softmax", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, outputs, name="resnet8")


def mobilenet_v2(keras: ModuleType) -> Any:
    """Keras's own MobileNetV2, 0.35 wide, without pretrained weights."""
    return keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classes=CLASSES)


NETWORKS = {
    "resnet8": Network(resnet8, (32, 32, 3), 64),
    "mobilenet_v2": Network(mobilenet_v2, (96, 96, 3), 32),
}
