"""`Clamp`: the fused activations with which an integer kernel can clamp its output."""

from kqat.base import TextEnum


class Clamp(TextEnum):
    """A clamp by Keras's name of the activation; TFLite has a fused activation of that name."""

    RELU = "relu"
    RELU6 = "relu6"
