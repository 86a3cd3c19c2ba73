"""`Learned`: a weight as a value of its own, where no kernel holds it."""

from typing import Any

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("kqat")
class Learned(layers.Layer):
    """A weight of the given shape as a value, the same for each sample of the layer's input.

    Of its input it reads the batch size alone. Ships as a constant.

    Args:
        shape: of the value, without the batch axis.
        batched: whether the weight that it holds had a batch axis, of size 1.
        value_regularizer: of the weight.
    """

    def __init__(
        self,
        shape: list[int],
        batched: bool = True,
        value_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.shape, self.batched = list(shape), batched
        self.value_regularizer = keras.regularizers.get(value_regularizer)

    def build(self, input_shape: Any) -> None:
        """Creates the value, zero."""
        self.value = self.add_weight(
            name="value",
            shape=self.shape,
            initializer="zeros",
            regularizer=self.value_regularizer,
        )

    def call(self, x: Any) -> Any:
        """The value, of shape `(batch, *shape)`."""
        return ops.broadcast_to(
            ops.expand_dims(ops.cast(self.value, self.compute_dtype), 0),
            (ops.shape(x)[0], *self.shape),
        )

    def compute_output_spec(self, x: Any) -> Any:
        """`(batch, *shape)`, of the layer's type: the input may hold indexes."""
        return keras.KerasTensor((x.shape[0], *self.shape), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Shape, batch axis and regularizer, beside what every layer has."""
        config = super().get_config()
        config.pop("autocast", None)
        penalty = keras.regularizers.serialize(self.value_regularizer)
        own = {"shape": self.shape, "batched": self.batched, "value_regularizer": penalty}
        return {**config, **own}
