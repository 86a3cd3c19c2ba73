"""What a value in a call is: a symbolic tensor or a constant, quantities or indexes."""

from typing import Any

import keras


def is_tensor(value: Any) -> bool:
    """Whether a value depends on the model's inputs."""
    return isinstance(value, keras.KerasTensor)


def holds_indexes(x: Any) -> bool:
    """Whether a tensor holds indexes or truth values, which have no scale; not quantities."""
    return not keras.backend.is_float_dtype(x.dtype)
