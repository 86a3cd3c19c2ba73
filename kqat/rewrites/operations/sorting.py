"""Rewrites functions that sort an axis: `top_k`, `sort` and `argsort`.

All are the one operator that picks the largest values, with as many as are wanted.
"""

from collections.abc import Callable
from typing import Any

from kqat.parts import IndexKind, IndexOperation, Take, TopK
from kqat.rewrites.operations.binary import Row
from kqat.rewrites.operations.reductions import along_last


def _top_k(operation: Any, name: str) -> Callable[..., Any]:
    """Sorted in any case: where that was not asked for, any order will do."""
    return lambda x: tuple(TopK(operation.k, name=name)(x))


def _reversed(x: Any, name: str) -> Any:
    size, axis = x.shape[-1], len(x.shape) - 1
    return Take([*range(size - 1, -1, -1)], axis, name=name)(x)


def _rising(x: Any, name: str) -> Any:
    """`sort`: the largest come last."""
    falling, _ = TopK(x.shape[-1], name=f"{name}_falling")(x)
    return _reversed(falling, name)


def _places(x: Any, name: str) -> Any:
    """`argsort`: of equal numbers the first comes first, so what is sorted is the reverse."""
    size = x.shape[-1]
    _, falling = TopK(size, name=f"{name}_falling")(_reversed(x, f"{name}_reversed"))
    from_behind = _reversed(falling, f"{name}_from_behind")
    return IndexOperation(IndexKind.SUBTRACT, {"x1": size - 1}, name=name)(from_behind)


SORTING: dict[str, Row] = {
    "TopK": _top_k,
    "Sort": along_last(_rising),
    "Argsort": along_last(_places),
}
