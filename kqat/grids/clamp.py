"""The clamps that integer kernels carry out on their output."""

from kqat.base import TextEnum


class Clamp(TextEnum):
    """A clamp, by Keras's name of the activation: TFLite's fused activation of that name."""

    RELU = "relu"
    RELU6 = "relu6"
