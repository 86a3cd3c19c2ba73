"""Rewrites functions that sort an axis: `top_k`, `sort` and `argsort`.

All are the one operator that picks the largest values, with as many as are wanted.
"""

from collections.abc import Callable
from typing import Any

from keras import layers

from kqat.parts import IndexKind, IndexOperation, Take, TopK
from kqat.rewrites.operations.binary import Row
from kqat.rewrites.operations.reductions import axis_of


def _top_k(operation: Any, name: str) -> Callable[..., Any]:
    """Sorted in any case: where that was not asked for, any order will do."""
    return lambda x: tuple(TopK(operation.k, name=name)(x))


def _along_last(of_last: Callable[[Any, str], Any]) -> Row:
    """A row for a function of one axis, which is moved to the end and back."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            rank = len(x.shape)
            axis = axis_of(operation.axis, rank, name)
            if axis == rank - 1:
                return of_last(x, name)
            order = [*range(1, rank)]
            order[axis - 1], order[-1] = order[-1], order[axis - 1]
            moved = layers.Permute(order, name=f"{name}_moved")(x)
            return layers.Permute(order, name=name)(of_last(moved, f"{name}_values"))

        return call

    return row


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
    "Sort": _along_last(_rising),
    "Argsort": _along_last(_places),
}
