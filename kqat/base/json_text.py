"""`json_text`: JSON that every parser reads, as it has no word for NaN and infinity."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def json_text(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON text; numbers that are NaN or infinite are `null`.

    Args:
        value: mappings, lists and tuples of texts and numbers, of NumPy too.
        indent: as that of `json.dumps`.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return _finite(value.tolist())
    if not isinstance(value, float):
        return value
    return value + 0.0 if math.isfinite(value) else None  # No -0.0, which readers take for less.
