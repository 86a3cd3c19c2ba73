"""`TiedWeight`: one weight that several kernels read, each in its own way."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.base import TextEnum
from kqat.graph import added


class WeightUse(TextEnum):
    """What a call of a `TiedWeight` computes of its matrix `w`, of shape `(rows, columns)`."""

    ROWS = "rows"  # w[x], for indexes x
    PRODUCT = "product"  # x @ w
    TRANSPOSED = "transposed"  # x @ w^T
    SUM = "sum"  # x + w
    FACTOR = "factor"  # x * w


@keras.saving.register_keras_serializable("kqat")
class TiedWeight(layers.Layer):
    """A weight that several kernels read: one variable, and in the file one grid for all of them.

    It is a layer that is called once for each use. Its one scale serves rows and products alike;
    scales for channels of a product would be those of no row. Where all calls are the same product,
    each of its columns may have a scale.

    Args:
        shape: of the weight; a matrix, where rows of it are read or products computed.
        biases: the sizes of biases, which calls add by their number.
        products: whether all calls are products with the matrix as it stands.
        kernel_regularizer: of the weight.
        kernel_constraint: of the weight.
    """

    def __init__(
        self,
        shape: Sequence[int],
        biases: Sequence[int] = (),
        products: bool = False,
        kernel_regularizer: Any = None,
        kernel_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.shape, self.biases = [int(n) for n in shape], [int(n) for n in biases]
        self.products = bool(products)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)

    @property
    def input_dim(self) -> int:
        """The number of its rows, as an `Embedding` has it."""
        return self.shape[0]

    def build(self, input_shape: Any) -> None:
        """Creates the weight and the biases, zero."""
        self.kernel = self.add_weight(
            name="kernel",
            shape=self.shape,
            initializer="zeros",
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        self.bias_list = [
            self.add_weight(name=f"bias_{i}", shape=(size,), initializer="zeros")
            for i, size in enumerate(self.biases)
        ]

    def call(self, x: Any, use: str, bias: int | None = None) -> Any:
        """What `WeightUse` says, plus the bias of that number.

        Args:
            x: indexes of any shape for rows, else quantities `(batch, …)`.
            use: a `WeightUse`.
            bias: the number of a bias of a product, or `None` for none.
        """
        if use == WeightUse.ROWS:
            return ops.take(self.kernel, ops.cast(x, "int32"), axis=0)
        if use == WeightUse.SUM:
            return added(x, self.kernel)
        if use == WeightUse.FACTOR:
            return ops.multiply(self.kernel, x)
        kernel = self.kernel if use == WeightUse.PRODUCT else ops.transpose(self.kernel)
        y = ops.matmul(x, kernel)
        return y if bias is None else ops.add(y, self.bias_list[bias])

    def compute_output_spec(self, x: Any, use: str, bias: int | None = None) -> Any:
        """Rows and products end with the axis of the weight that is left."""
        if use == WeightUse.ROWS:
            shape = (*x.shape, *self.shape[1:])
        elif use in (WeightUse.PRODUCT, WeightUse.TRANSPOSED):
            shape = (*x.shape[:-1], self.shape[1 if use == WeightUse.PRODUCT else 0])
        else:
            shape = (x.shape[0], *np.broadcast_shapes(x.shape[1:], self.shape))
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with the arguments above."""
        return {
            **super().get_config(),
            "shape": self.shape,
            "biases": self.biases,
            "products": self.products,
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
        }


def reads_rows(layer: Any, options: Any) -> bool:
    """Whether a call of a layer looks rows up at indexes.

    Args:
        layer: the layer, without a wrapper.
        options: the keyword arguments of the call.
    """
    if isinstance(layer, TiedWeight):
        return bool(options.get("use") == WeightUse.ROWS)
    return isinstance(layer, layers.Embedding)
