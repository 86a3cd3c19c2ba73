"""Rewrites functions that move or pick values: `reshape`, `transpose`, `split`, `take`, `pad` …"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import layers, ops

from kqat.base import UnsupportedLayerError
from kqat.graph import holds_indexes, is_tensor
from kqat.parts import DepthToSpace, SpaceToDepth, Take, sliced, stacked
from kqat.rewrites.layers.one_hot import multi_hot, one_hot, rows
from kqat.rewrites.operations.binary import Row, is_number
from kqat.rewrites.operations.reductions import axes_of, axis_of


def to_output_shape(operation: Any, name: str) -> Callable[..., Any]:
    """A Reshape to the shape that the operation gives."""

    def call(x: Any) -> Any:
        shape = operation.compute_output_spec(x).shape
        if shape[0] != x.shape[0]:
            raise UnsupportedLayerError(
                f"Expected operation '{name}' to keep the batch axis first. Received: {x.shape} "
                f"-> {shape}."
            )
        return layers.Reshape(shape[1:], name=name)(x)

    return call


def permuted(order: Callable[[Any, int], tuple[int, ...]]) -> Row:
    """A row for a function that reorders axes; `order(operation, rank)` gives the new order."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            axes = order(operation, len(x.shape))
            if axes[0] != 0:
                raise UnsupportedLayerError(
                    f"Expected operation '{name}' to keep the batch axis first. Received: axes "
                    f"{axes}."
                )
            return layers.Permute(axes[1:], name=name)(x)

        return call

    return row


def _transposed(operation: Any, rank: int) -> tuple[int, ...]:
    return tuple(operation.axes) if operation.axes else tuple(reversed(range(rank)))


def _swapped(operation: Any, rank: int) -> tuple[int, ...]:
    axes = list(range(rank))
    a, b = operation.axis1 % rank, operation.axis2 % rank
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _moved(operation: Any, rank: int) -> tuple[int, ...]:
    # An empty array whose axes all have different sizes: its shape shows where each axis went.
    return np.moveaxis(np.empty(range(rank)), operation.source, operation.destination).shape


def _concatenate(operation: Any, name: str) -> Callable[..., Any]:
    def call(tensors: Any) -> Any:
        if not all(is_tensor(t) for t in tensors):
            raise UnsupportedLayerError(
                f"Expected tensors in operation '{name}'. Received: a constant. Make it a variable "
                "of a layer, or an input."
            )
        axis = axis_of(operation.axis, len(tensors[0].shape), name)
        return layers.Concatenate(axis=axis, name=name)(tensors)

    return call


def _stack(operation: Any, name: str) -> Callable[..., Any]:
    def call(tensors: Any) -> Any:
        return stacked(tensors, axis_of(operation.axis, len(tensors[0].shape) + 1, name), name)

    return call


def _split(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        kind = type(operation).__name__
        given = {"Hsplit": 1, "Dsplit": 2}.get(kind) or operation.axis
        axis = axis_of(given, len(x.shape), name)
        size, where = x.shape[axis], operation.indices_or_sections
        if isinstance(where, int):
            # As NumPy's array_split: if the size does not divide evenly, the first parts are one
            # longer.
            where = [size // where * i + min(i, size % where) for i in range(1, where)]
        edges = [0, *(int(w) for w in where), size]
        keys = [
            (*[slice(None)] * axis, slice(begin, end)) for begin, end in itertools.pairwise(edges)
        ]
        return [sliced(x, key, f"{name}_{i}") for i, key in enumerate(keys)]

    return call


def _unstack(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        axis = axis_of(operation.axis, len(x.shape), name)
        before = [slice(None)] * axis
        return [sliced(x, (*before, i), f"{name}_{i}") for i in range(x.shape[axis])]

    return call


def _get_item(operation: Any, name: str) -> Callable[..., Any]:
    return lambda x, key: sliced(x, key, name)


def _picked(pick: Callable[[Any, np.ndarray], np.ndarray], axis_of: Callable[[Any], Any]) -> Row:
    """A row for functions that pick values along axes: `pick(operation, indices)` says which."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            axes = axes_of(axis_of(operation), len(x.shape), name)
            for i, axis in enumerate(axes):
                indices = pick(operation, np.arange(x.shape[axis]))
                part = name if i == len(axes) - 1 else f"{name}_{i}"
                x = Take(indices.tolist(), axis, name=part)(x)
            return x

        return call

    return row


def _roll(operation: Any, name: str) -> Callable[..., Any]:
    if np.ndim(operation.axis) == 0:
        return _picked(lambda o, indices: np.roll(indices, o.shift), lambda o: o.axis)(
            operation, name
        )

    def call(x: Any) -> Any:
        for shift, axis in zip(operation.shift, operation.axis, strict=True):
            x = ops.roll(x, shift, axis)
        return x

    return call


def _tile(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        repeats = [1] * (len(x.shape) - len(operation.repeats)) + list(operation.repeats)
        if repeats[0] != 1 or len(repeats) > len(x.shape):
            raise UnsupportedLayerError(
                f"Expected operation '{name}' to leave the batch axis alone. Received: repeats="
                f"{operation.repeats}."
            )
        tiled = [axis for axis, times in enumerate(repeats) if times != 1]
        for axis in tiled:
            indices = np.tile(np.arange(x.shape[axis]), repeats[axis]).tolist()
            part = name if axis == tiled[-1] else f"{name}_{axis}"
            x = Take(indices, axis, name=part)(x)
        return x if tiled else layers.Identity(name=name)(x)

    return call


def _take(operation: Any, name: str) -> Callable[..., Any]:
    """`take` of a tensor at constant indices, or of rows of a constant at a tensor of indices."""

    def call(x: Any, indices: Any) -> Any:
        if is_tensor(x) and not is_tensor(indices):
            axis = axis_of(operation.axis, len(x.shape), name)
            flat = np.asarray(indices, np.int64) % x.shape[axis]
            part = name if flat.ndim == 1 else f"{name}_flat"
            taken = Take(flat.reshape(-1).tolist(), axis, name=part)(x)
            if flat.ndim == 1:
                return taken
            shape = (*x.shape[1:axis], *flat.shape, *x.shape[axis + 1 :])
            return layers.Reshape(shape, name=name)(taken)
        by_rows = is_tensor(indices) and holds_indexes(indices) and operation.axis in (0, -2)
        if by_rows and not is_tensor(x) and np.ndim(x) == 2:
            return rows(np.asarray(x, np.float32), indices, name, getattr(x, "trainable", False))
        raise UnsupportedLayerError(
            f"Expected constant indices, or rows of a constant matrix, in operation '{name}' of "
            f"type Take. Received: axis={operation.axis}, tensors for both, or another rank. Take "
            "rows (axis=0), or an axis of a tensor at constant indices."
        )

    return call


def _one_hot(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        if operation.axis not in (-1, len(x.shape)):
            raise UnsupportedLayerError(
                f"Expected axis=-1 in operation '{name}'. Received: axis={operation.axis}. Permute "
                "the input."
            )
        return one_hot(x, operation.num_classes, name)

    return call


def _multi_hot(operation: Any, name: str) -> Callable[..., Any]:
    return lambda x: multi_hot(x, operation.num_classes, name)


def _blocks(kind: type) -> Row:
    def row(operation: Any, name: str) -> Callable[..., Any]:
        if operation.data_format == "channels_first":
            raise UnsupportedLayerError(
                f"Expected data_format='channels_last' in operation '{name}'. Received: "
                "channels_first. Permute the input."
            )
        return kind(operation.block_size, name=name)

    return row


def _triangle(keep: Callable[..., np.ndarray]) -> Row:
    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            if len(x.shape) < 3:
                raise UnsupportedLayerError(
                    f"Expected a matrix for each sample in operation '{name}'. Received: shape "
                    f"{tuple(x.shape)}, where the batch is one side of the matrix. Reshape it."
                )
            mask = keep(np.ones(x.shape[-2:], np.float32), operation.k)
            return ops.multiply(x, mask)

        return call

    return row


def _joined(axis: int) -> Row:
    return lambda operation, name: layers.Concatenate(axis=axis, name=name)


def _pad(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any, constant_values: Any = None) -> Any:
        width = [tuple(pair) for pair in operation.pad_width]
        plain = operation.mode == "constant" and (
            constant_values is None or (is_number(constant_values) and not constant_values)
        )
        spatial = width[1:-1]
        if not plain or width[0] != (0, 0) or len(width) < 2:
            raise UnsupportedLayerError(
                f"Expected zeros around axes other than the batch in operation '{name}'. "
                f"Received: pad_width={operation.pad_width}, mode={operation.mode!r}. Slice and "
                "concatenate instead."
            )
        if len(width) > 4 and (width[-1] != (0, 0) or len(width) > 5):
            return _zeros_axis_by_axis(x, width[1:], name)
        if width[-1] != (0, 0) or not 1 <= len(spatial) <= 3:
            # Only spatial axes can be padded: one more axis makes the last one spatial.
            shape = tuple(x.shape[1:])
            grown = (*shape, 1)
            spatial = width[1:]
            x = layers.Reshape(grown, name=f"{name}_grown")(x)
            padded = _zeros_around(spatial, f"{name}_padded")(x)
            return layers.Reshape(padded.shape[1:-1], name=name)(padded)
        return _zeros_around(spatial, name)(x)

    return call


def _zeros_axis_by_axis(x: Any, width: list[tuple[int, int]], name: str) -> Any:
    """Zeros around more axes than PAD takes: one after another, the others before it as one."""
    shape = list(x.shape[1:])
    for axis, pair in enumerate(width):
        if pair != (0, 0):
            outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
            x = layers.Reshape((outer, shape[axis], inner), name=f"{name}_grown_{axis}")(x)
            x = _zeros_around([(0, 0), pair], f"{name}_padded_{axis}")(x)
            shape[axis] += sum(pair)
    return layers.Reshape(tuple(shape), name=name)(x)


def _zeros_around(spatial: list[tuple[int, int]], name: str) -> Any:
    kind = {1: layers.ZeroPadding1D, 2: layers.ZeroPadding2D, 3: layers.ZeroPadding3D}
    return kind[len(spatial)](spatial[0] if len(spatial) == 1 else tuple(spatial), name=name)


REARRANGING: dict[str, Row] = {
    **dict.fromkeys(("Reshape", "Squeeze", "ExpandDims"), to_output_shape),
    "Transpose": permuted(_transposed),
    "Swapaxes": permuted(_swapped),
    "Moveaxis": permuted(_moved),
    "Concatenate": _concatenate,
    "Stack": _stack,
    "Split": _split,
    "ArraySplit": _split,
    "Hsplit": _split,
    "Dsplit": _split,
    "Unstack": _unstack,
    "GetItem": _get_item,
    "Flip": _picked(lambda _, indices: indices[::-1], lambda o: o.axis),
    "Roll": _roll,
    "Repeat": _picked(lambda o, indices: np.repeat(indices, o.repeats), lambda o: o.axis),
    "Tile": _tile,
    "Take": _take,
    "OneHot": _one_hot,
    "MultiHot": _multi_hot,
    "DepthToSpace": _blocks(DepthToSpace),
    "SpaceToDepth": _blocks(SpaceToDepth),
    "Tril": _triangle(np.tril),
    "Triu": _triangle(np.triu),
    "Hstack": _joined(1),
    "Dstack": _joined(2),
    "Append": lambda operation, name: lambda *x: _concatenate(operation, name)(list(x)),
    "Fliplr": lambda operation, name: lambda x: ops.flip(x, axis=1),
    "Pad": _pad,
}
