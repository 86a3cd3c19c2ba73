"""Elementwise functions: how they are recognized, kept in a model, and saved with it.

The exporter turns any elementwise function into a lookup table of 256 entries or, where activations
have 16 bits, into straight pieces that are at most one output step off
(`tflite_export.integer_pass`). So it is enough to know that each output depends on one input alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.graph import tensorflow_traced

# Where a function has a pole or ends, inputs stop this close to it: a rounded value may lie on
# the pole, and its gradient must stay finite.
MARGIN = 1e-7


@keras.saving.register_keras_serializable("kqat")
class Elementwise(keras.layers.Layer):
    """A function of each number alone, made of `keras.ops`; any shape.

    Args:
        function: a functional model of one input `(batch, 1)` and one output of that shape, or
            its serialized form. It is saved with the layer, so loading needs no custom objects.
    """

    def __init__(self, function: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(function, keras.Model):
            function = keras.saving.deserialize_keras_object(function)
        self.function = function

    @classmethod
    def of(cls, function: Callable[[Any], Any], **kwargs: Any) -> "Elementwise":
        """The layer of a Python function of one tensor, made of `keras.ops`.

        Raises:
            ValueError: if it is none of one number, as where a constant has one for each channel.
        """
        x = keras.Input((1,), name="x")
        with tensorflow_traced():
            y = function(x)
        if not isinstance(y, keras.KerasTensor) or tuple(y.shape) != (None, 1):
            raise ValueError(f"Expected one number for each number. Received: {y!r}.")
        return cls(keras.Model(x, y, name="function"), **kwargs)

    def call(self, x: Any) -> Any:
        """The function's value for each element."""
        return ops.reshape(self.function(ops.reshape(x, (-1, 1))), ops.shape(x))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with the function serialized."""
        function = keras.saving.serialize_keras_object(self.function)
        return {**super().get_config(), "function": function}


@keras.saving.register_keras_serializable("kqat")
class LearnedPower(keras.layers.Layer):
    """`x ** exponent` of each number, as generalized mean pooling has it; any shape.

    The exponent is one number, which trains. Ships as a lookup table.
    """

    def build(self, input_shape: Any) -> None:
        """Creates the exponent, 1."""
        self.exponent = self.add_weight(name="exponent", shape=(), initializer="ones")

    def call(self, x: Any) -> Any:
        """The power of each element."""
        return power(x, ops.cast(self.exponent, x.dtype))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape


def power(x: Any, exponent: Any) -> Any:
    """`x ** exponent` for one exponent, finite with its gradients: 0 where it has no real value.

    A clip behind which a model takes a root, as `maximum(x, 1e-6)`, may round to zero, where the
    gradient of the root is infinite.
    """
    size = ops.absolute(x)
    value = ops.power(ops.maximum(size, MARGIN), exponent)
    whole = ops.equal(exponent, ops.round(exponent))
    sign = ops.where(whole, 1.0 - 2.0 * ops.mod(exponent, 2.0), 0.0)
    value = ops.where(ops.less(x, 0.0), ops.cast(sign, value.dtype) * value, value)
    vanishes = ops.logical_and(ops.less(size, MARGIN), ops.greater(exponent, 0.0))
    return ops.where(vanishes, ops.zeros_like(value), value)


def is_elementwise(function: Callable[[Any], Any], shape: tuple[int | None, ...]) -> bool:
    """Whether `function` of a tensor of `shape` computes each output from one input, by trial.

    It must keep the shape, give equal values twice, follow a permutation of all elements, and
    leave an output alone when other inputs change.

    Args:
        function: of one tensor.
        shape: with the batch size first; `None` stands for any.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(scale=3, size=[size or 2 for size in shape]).astype(np.float32)
    order = rng.permutation(x.size)
    y, again, moved = (_value(function, v) for v in (x, x, x.reshape(-1)[order].reshape(x.shape)))
    if y is None or y.shape != x.shape or again is None or moved is None:
        return False
    if not (_equal(y, again) and _equal(y.reshape(-1)[order], moved.reshape(-1))):
        return False
    half = rng.random(x.shape) < 0.5
    extremes = (1e3, -1e3, 0.0)
    if not _keeps(function, x, half, (x, rng.normal(size=x.shape), *extremes)):
        return False
    # A branch on a sum, or on the smallest or largest value, shows only where one number stands
    # against all others.
    numbers = np.arange(x.size).reshape(x.shape)
    return all(
        _keeps(function, scale * x, numbers == position, extremes)
        for position in (np.argmin(x), np.argmax(x))
        for scale in (1e-3, 1e3)
    )


def _keeps(
    function: Callable[[Any], Any], x: np.ndarray, kept: np.ndarray, others: Sequence[Any]
) -> bool:
    """Whether outputs where `kept` is true are the same whatever the other inputs are."""
    first: np.ndarray | None = None
    for other in others:
        value = _value(function, np.where(kept, x, other).astype(np.float32))
        if value is None or (first is not None and not _equal(first, value[kept])):
            return False
        first = value[kept]
    return True


def _value(function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray | None:
    """The function's value, or `None` where that is no float tensor."""
    value = function(ops.convert_to_tensor(x))
    if not ops.is_tensor(value) or not keras.backend.is_float_dtype(value.dtype):
        return None
    return np.asarray(value, np.float32)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    # Vector instructions may round the last bit differently from one position to another.
    return np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def _above(low: float) -> Callable[[Any], Any]:
    return lambda x: ops.maximum(x, low + MARGIN)


def _inside_one(x: Any) -> Any:
    return ops.clip(x, MARGIN - 1.0, 1.0 - MARGIN)


def _off_zero(x: Any) -> Any:
    return ops.where(ops.less(ops.absolute(x), MARGIN), MARGIN, x)


# Where functions of `keras.ops` are finite, with their gradients.
DOMAINS: dict[str, Callable[[Any], Any]] = {
    "Arccos": _inside_one,
    "Arccosh": _above(1.0),
    "Arcsin": _inside_one,
    "Arctanh": _inside_one,
    "Erfinv": _inside_one,
    "Log": _above(0.0),
    "Log10": _above(0.0),
    "Log1p": _above(-1.0),
    "Log2": _above(0.0),
    "Reciprocal": _off_zero,
    "Rsqrt": _above(0.0),
    "Sqrt": _above(0.0),
}


def within_domain(operation: Any, x: Any) -> Any:
    """`x` where the function `operation` of one number, and its gradient, is finite."""
    guard = DOMAINS.get(type(operation).__name__)
    return guard(x) if guard else x


def inverts(functions: Sequence[Callable[[Any], Any]]) -> bool:
    """Whether functions of each number, one after another, make a multiple of its inverse."""
    numbers = np.geomspace(0.05, 500.0, 30, dtype=np.float32)
    values = numbers[:, None]
    for function in functions:
        values = np.asarray(function(values))
    products = values[:, 0] * numbers
    spread = np.ptp(products)
    return bool(functions) and bool(np.isfinite(spread) and spread < 1e-3 * abs(products[0]))
