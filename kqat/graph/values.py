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
    """`x + y` of tensors, weights or constants, as NumPy broadcasts them, by Keras's `add`.

    That takes its second operand for a bias of the channels (see `kqat.parts.added`) if only one of
    its axes is not 1. So the one of fewer such axes comes first.
    """
    return ops.add(*sorted((x, y), key=_long_axes))


def _long_axes(x: Any) -> int:
    return sum(size != 1 for size in getattr(x, "shape", ()))


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
