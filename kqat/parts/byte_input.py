"""`ByteInput`: the bytes of a `uint8` input, as a camera gives them, as quantities."""

from typing import Any

import keras
from keras import layers, ops

HIGHEST_BYTE = 255


@keras.saving.register_keras_serializable("kqat")
class ByteInput(layers.Layer):
    """`(x - zero_point) * scale` of bytes: they are on the integer grid of that scale already.

    Stands behind a model's `uint8` input. In the file it is nothing: the input's tensor has this
    scale and zero point.

    Args:
        scale: what one step of a byte means, above 0.
        zero_point: the byte that means 0.
    """

    def __init__(self, scale: float = 1.0, zero_point: int = 0, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.scale, self.zero_point = float(scale), int(zero_point)

    @property
    def range(self) -> tuple[float, float]:
        """What the bytes 0 and 255 mean."""
        low, high = -self.zero_point, HIGHEST_BYTE - self.zero_point
        return low * self.scale, high * self.scale

    def call(self, x: Any) -> Any:
        """The quantities, of the input's shape and the layer's type."""
        steps = ops.cast(x, "float32") - float(self.zero_point)
        return ops.cast(steps * self.scale, self.compute_dtype)

    def compute_output_spec(self, x: Any) -> Any:
        """The input's shape, of the layer's type."""
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with scale and zero point."""
        config = super().get_config()
        config.pop("autocast", None)
        return {**config, "scale": self.scale, "zero_point": self.zero_point}
