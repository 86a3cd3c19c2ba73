"""What a value in a call is: a symbolic tensor or a constant, quantities or indexes."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops


def is_tensor(value: Any) -> bool:
    """Whether a value depends on the model's inputs."""
    return isinstance(value, keras.KerasTensor)


def holds_indexes(x: Any) -> bool:
    """Whether a tensor holds indexes or truth values, which have no scale; not quantities."""
    return not keras.backend.is_float_dtype(x.dtype)


def broadcast_sum(x: Any, y: Any) -> Any:
    """`x + y` of tensors, weights or constants, some of them symbolic, as NumPy broadcasts them."""
    if is_taken_for_bias(x, y):
        return Add()(x, y)
    return ops.add(x, y)


def is_taken_for_bias(x: Any, y: Any) -> bool:
    """Whether Keras's `add` may take `y` for a bias, and add it along another axis than NumPy.

    It may where one axis alone of `y` is not 1 (see `added`). It is right about the last axis.
    """
    first, second = (tuple(getattr(value, "shape", ())) for value in (x, y))
    if len(first) < 2 or sum(size != 1 for size in second) != 1:
        return False
    return second[-1] == 1 or second[-1] != first[-1]


def added(x: Any, y: Any) -> Any:
    """`x + y` of a tensor and a tensor, variable or constant, as NumPy broadcasts them.

    Keras's `add` takes a second operand of which one axis alone is not 1 for a bias of the
    channels, if the first has as many channels, or rows. So it takes one sample of a column, and
    a column of as many samples as there are channels, and adds them along another axis, without a
    word. Of indexes it makes an operator that TFLite does not convert.
    """
    if isinstance(y, list | tuple):
        y = ops.convert_to_tensor(y)
    dtype = keras.backend.result_type(x.dtype, getattr(y, "dtype", type(y)))
    return ops.cast(x, dtype) + ops.cast(y, dtype)


@keras.saving.register_keras_serializable("kqat")
class Add(keras.Operation):
    """`x + y` as NumPy broadcasts them, which Keras's operation of that name may not: see `added`.

    The table of operations finds it by the same name.
    """

    def call(self, x1: Any, x2: Any) -> Any:
        """The sum."""
        return added(ops.convert_to_tensor(x1), ops.convert_to_tensor(x2))

    def compute_output_spec(self, x1: Any, x2: Any) -> Any:
        """The shape and type of Keras's own sum, which tells them right."""
        one, two = (keras.KerasTensor(x.shape, dtype=x.dtype) for x in (x1, x2))
        made = ops.add(one, two)
        return keras.KerasTensor(made.shape, dtype=made.dtype)


def is_half(dtype: Any) -> bool:
    """Whether a type is a float of 16 bits, in which layers compute under mixed precision."""
    return keras.backend.standardize_dtype(dtype) in ("float16", "bfloat16")


def fingerprint(weight: Any) -> tuple[int, int]:
    """A number that weights of the same numbers have in common, in whatever order they stand."""
    bits = np.asarray(weight, np.float32).reshape(-1).view(np.uint32).astype(np.uint64)
    bits = (bits + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits.size, int((bits ^ (bits >> np.uint64(31))).sum(dtype=np.uint64))


def varies(weight: Any) -> bool:
    """Whether a weight is told from others by its numbers."""
    array = np.asarray(weight)
    return array.size > 1 and bool(array.min() != array.max())


def made_of(sources: Iterable[Any], variable: Any) -> Any:
    """A variable that holds what a call computes of others; see `sources_of`."""
    variable.kqat_sources = [source for v in sources for source in sources_of(v)]
    return variable


def sources_of(variable: Any) -> list[Any]:
    """The user's variables of which the value of one was computed: for one of his, itself."""
    return list(getattr(variable, "kqat_sources", [variable]))


def complements(variable: Any, other: Any, operation: Any) -> None:
    """Notes that a variable was computed as one less `other`, by an operation that subtracts."""
    variable.kqat_complement = other, operation


def complement_of(variable: Any) -> tuple[Any, Any] | None:
    """The weight of which a variable is one less it, and the operation that subtracts."""
    found: tuple[Any, Any] | None = getattr(variable, "kqat_complement", None)
    return found
