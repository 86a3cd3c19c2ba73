"""Rewrites functions that reduce axes: `mean`, `sum`, `max`, `var`, `argmax`, `cumsum`, `norm`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import layers, ops

from kqat.base import UnsupportedLayerError
from kqat.parts import IndexKind, IndexOperation, Reduce, ReduceKind, total
from kqat.rewrites.layers import matrix_products, whole_numbers
from kqat.rewrites.layers.one_hot import truth
from kqat.rewrites.operations.binary import Row


def axes_of(axis: Any, rank: int, name: str) -> list[int]:
    """Axes as positive numbers, sorted; `None` means all axes.

    Raises:
        UnsupportedLayerError: if the batch is among them.
    """
    given = np.arange(rank) if axis is None else np.reshape(axis, -1)
    axes = sorted(int(a) % rank for a in given)
    if 0 in axes:
        raise UnsupportedLayerError(
            f"Expected operation '{name}' to leave the batch axis alone. Received: axis={axis} of "
            f"a tensor of rank {rank}. Name the other axes."
        )
    return axes


def axis_of(axis: Any, rank: int, name: str) -> int:
    """The one axis that an operation works along, as a positive number.

    Raises:
        UnsupportedLayerError: if it is the batch axis, or if there is not exactly one.
    """
    axes = axes_of(axis, rank, name)
    if len(axes) != 1:
        raise UnsupportedLayerError(
            f"Expected one axis in operation '{name}'. Received: axis={axis}. Name one, or reshape "
            "so that there is only one."
        )
    return axes[0]


def along_last(of_last: Callable[[Any, str], Any]) -> Row:
    """A row for a function of one axis, which is moved to the end and back.

    Args:
        of_last: computes the function along the last axis, in layers under a name.
    """

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


# Kind and rank of the input -> the Keras layer that reduces all axes between batch and channels.
_POOLS: dict[tuple[ReduceKind, int], type] = {
    (ReduceKind.MEAN, 3): layers.GlobalAveragePooling1D,
    (ReduceKind.MEAN, 4): layers.GlobalAveragePooling2D,
    (ReduceKind.MEAN, 5): layers.GlobalAveragePooling3D,
    (ReduceKind.MAX, 3): layers.GlobalMaxPooling1D,
    (ReduceKind.MAX, 4): layers.GlobalMaxPooling2D,
    (ReduceKind.MAX, 5): layers.GlobalMaxPooling3D,
}


def reduction(kind: ReduceKind | None) -> Row:
    """A row for `mean`, `max`, `min` or `prod`, or (`None`) for `sum`."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            rank = len(x.shape)
            axes, keepdims = axes_of(operation.axis, rank, name), operation.keepdims
            if (whole := _FOLDS.get(kind)) and whole_numbers.is_whole(x):
                _check_plain(operation, ("initial",), name)
                _check_integers(operation, name)
                return whole_numbers.folded(whole, x, axes, keepdims, name)
            _check_plain(operation, ("initial", "dtype"), name)
            if kind is None:
                return total(x, axes, keepdims, name)
            if (kind, rank) in _POOLS and axes == [*range(1, rank - 1)]:
                return _POOLS[kind, rank](keepdims=keepdims, name=name)(x)
            return Reduce(kind, axes, keepdims, name=name)(x)

        return call

    return row


# What reduces integers, two by two.
_FOLDS = {
    None: IndexKind.ADD,
    ReduceKind.MAX: IndexKind.MAXIMUM,
    ReduceKind.MIN: IndexKind.MINIMUM,
}


def _check_integers(operation: Any, name: str) -> None:
    asked = getattr(operation, "dtype", None)
    if asked is not None and not str(asked).startswith("int"):
        raise UnsupportedLayerError(
            f"Expected operation '{name}' of integers to make integers. Received: dtype={asked}. "
            "Cast its result (keras.ops.cast)."
        )


def _count(operation: Any, name: str) -> Callable[..., Any]:
    """`count_nonzero`: the sum of truth values."""

    def call(x: Any) -> Any:
        axes = axes_of(operation.axis, len(x.shape), name)
        if x.dtype != "bool":
            x = ops.not_equal(x, 0)
        return whole_numbers.folded(IndexKind.ADD, x, axes, False, name)

    return call


def _check_plain(operation: Any, options: tuple[str, ...], name: str) -> None:
    given = {o: getattr(operation, o, None) for o in options}
    asked = {option: value for option, value in given.items() if value is not None}
    if asked:
        raise UnsupportedLayerError(
            f"Expected operation '{name}' without {' or '.join(asked)}. Received: {asked}. Leave "
            "that out."
        )


def variance(root: bool) -> Row:
    """`var` and `std`: the mean of the squared distance to the mean."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            axes = axes_of(operation.axis, len(x.shape), name)
            mean = Reduce(ReduceKind.MEAN, axes, name=f"{name}_mean")(x)
            centered = layers.Subtract(name=f"{name}_centered")([x, mean])
            square = layers.Multiply(name=f"{name}_square")([centered, centered])
            last = f"{name}_variance" if root else name
            result = Reduce(ReduceKind.MEAN, axes, operation.keepdims, name=last)(square)
            return ops.sqrt(result) if root else result

        return call

    return row


def _moments(operation: Any, name: str) -> Callable[..., Any]:
    """`moments`: the mean, and the mean of the squared distance to it."""

    def call(x: Any) -> Any:
        axes = axes_of(operation.axes, len(x.shape), name)
        mean = Reduce(ReduceKind.MEAN, axes, True, name=f"{name}_mean")(x)
        centered = layers.Subtract(name=f"{name}_centered")([x, mean])
        square = layers.Multiply(name=f"{name}_square")([centered, centered])
        spread = Reduce(ReduceKind.MEAN, axes, operation.keepdims, name=f"{name}_variance")(square)
        return (mean if operation.keepdims else ops.squeeze(mean, axes)), spread

    return call


def index_of(kind: IndexKind) -> Row:
    """`argmax` and `argmin`, over one axis."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            axis = axis_of(operation.axis, len(x.shape), name)
            options = {"axis": axis, "keepdims": operation.keepdims}
            return IndexOperation(kind, options, name=name)(x)

        return call

    return row


def of_truth(kind: ReduceKind) -> Row:
    """`all` and `any`, as the least and the largest of zeros and ones."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            axes = axes_of(operation.axis, len(x.shape), name)
            if x.dtype != "bool":
                x = ops.not_equal(x, 0)
            numbers = truth(x, (0.0, 1.0), x.shape[1:], f"{name}_numbers")
            found = Reduce(kind, axes, operation.keepdims, name=f"{name}_{kind.value}")(numbers)
            return IndexOperation(IndexKind.GREATER, {"x2": 0.5}, name=name)(found)

        return call

    return row


def _average(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any, weights: Any = None) -> Any:
        if weights is not None:
            raise UnsupportedLayerError(
                f"Expected operation '{name}' without weights. Received: some. Multiply and sum."
            )
        return ops.mean(x, axis=operation.axis)

    return call


def _cumsum(operation: Any, name: str) -> Callable[..., Any]:
    """`cumsum` as a product with a triangle of ones: int8 weights hold 0 and 1 exactly."""

    def call(x: Any) -> Any:
        rank = len(x.shape)
        axis = axis_of(operation.axis, rank, name)
        if whole_numbers.is_whole(x):
            _check_integers(operation, name)
            return whole_numbers.running_sum(x, axis, name)
        _check_plain(operation, ("dtype",), name)
        letters = "abcdefgh"[:rank]
        ones = np.triu(np.ones((x.shape[axis],) * 2, np.float32))
        output = letters.replace(letters[axis], "z")
        return matrix_products.einsum(f"{letters},{letters[axis]}z->{output}", x, ones, name)

    return call


def _logsumexp(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        # As Keras does: relative to the largest value, so that no exponential overflows.
        axes, keepdims = axes_of(operation.axis, len(x.shape), name), operation.keepdims
        largest = Reduce(ReduceKind.MAX, axes, name=f"{name}_largest")(x)
        below = layers.Subtract(name=f"{name}_below")([x, largest])
        powers = layers.Activation("exponential", name=f"{name}_powers")(below)
        rest = ops.log(total(powers, axes, True, f"{name}_sum"))
        result = layers.Add(name=name if keepdims else f"{name}_kept")([largest, rest])
        if keepdims:
            return result
        shape = [size for axis, size in enumerate(x.shape) if axis and axis not in axes]
        return layers.Reshape(shape, name=name)(result)

    return call


def _norm(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        axes = axes_of(operation.axis, len(x.shape), name)
        if operation.ord not in (None, "fro", 2) or (operation.ord == 2 and len(axes) > 1):
            raise UnsupportedLayerError(
                f"Expected the Euclidean norm in operation '{name}'. Received: ord="
                f"{operation.ord!r}. Write another norm with sums and powers."
            )
        square = layers.Multiply(name=f"{name}_square")([x, x])
        return ops.sqrt(total(square, axes, operation.keepdims, f"{name}_sum"))

    return call


REDUCING: dict[str, Row] = {
    "Sum": reduction(None),
    "Mean": reduction(ReduceKind.MEAN),
    "Max": reduction(ReduceKind.MAX),
    "Min": reduction(ReduceKind.MIN),
    "Prod": reduction(ReduceKind.PROD),
    "Amax": reduction(ReduceKind.MAX),
    "Amin": reduction(ReduceKind.MIN),
    "Var": variance(False),
    "Std": variance(True),
    "All": of_truth(ReduceKind.MIN),
    "Any": of_truth(ReduceKind.MAX),
    "Argmax": index_of(IndexKind.ARGMAX),
    "Argmin": index_of(IndexKind.ARGMIN),
    "Average": _average,
    "CountNonzero": _count,
    "Cumsum": _cumsum,
    "Logsumexp": _logsumexp,
    "Moments": _moments,
    "Norm": _norm,
}
