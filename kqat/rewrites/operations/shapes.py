"""Rewrites functions that move or pick values: `reshape`, `transpose`, `split`, `take`, `pad` …"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.base import UnsupportedLayerError
from kqat.devices import MOST_AXES
from kqat.graph import holds_indexes, is_tensor, option
from kqat.parts import (
    DepthToSpace,
    IndexKind,
    IndexOperation,
    Matmul,
    Padding,
    PaddingKind,
    SpaceToDepth,
    Take,
    ZeroPadding,
    joined,
    sliced,
    stacked,
)
from kqat.rewrites.layers import whole_numbers
from kqat.rewrites.layers.channels_first import operation_in_either_format
from kqat.rewrites.layers.one_hot import multi_hot, one_hot, rows
from kqat.rewrites.operations.binary import FAR_BELOW, Row, is_number
from kqat.rewrites.operations.reductions import axes_of, axis_of
from kqat.rewrites.operations.weights import emitted


def to_output_shape(operation: Any, name: str) -> Callable[..., Any]:
    """A Reshape to the shape that the operation gives."""

    def call(x: Any) -> Any:
        shape = operation.compute_output_spec(x).shape
        if shape[0] != x.shape[0]:
            raise UnsupportedLayerError(
                f"Expected operation '{name}' to keep the batch axis first. Received: {x.shape} "
                f"-> {shape}. Reshape the other axes alone."
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
                    f"{axes}. Reorder the other axes alone."
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
        return joined(tensors, axis, name)

    return call


def _stack(operation: Any, name: str) -> Callable[..., Any]:
    def call(tensors: Any) -> Any:
        shape = tensors[0].shape
        axis = axis_of(operation.axis, len(shape) + 1, name)
        if axis == len(shape) or len(tensors) == 1:
            return stacked(tensors, axis, name)
        # Joined along the axis that follows, which is then parted: one reshape for all of them.
        together = joined(tensors, axis, f"{name}_joined")
        parted = (*shape[1:axis], len(tensors), *shape[axis:])
        return layers.Reshape(parted, name=name)(together)

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
                f"{operation.repeats}. Repeat along the other axes alone."
            )
        return _tiled(x, repeats, name)

    return call


def _tiled(x: Any, repeats: Sequence[int], name: str) -> Any:
    """`x`, with each axis repeated as a whole that many times."""
    tiled = [axis for axis, times in enumerate(repeats) if times != 1]
    for axis in tiled:
        indices = np.tile(np.arange(x.shape[axis]), repeats[axis]).tolist()
        part = name if axis == tiled[-1] else f"{name}_{axis}"
        x = Take(indices, axis, name=part)(x)
    return x if tiled else layers.Identity(name=name)(x)


def _broadcast(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        shape = tuple(operation.shape)
        if len(shape) != len(x.shape):
            raise UnsupportedLayerError(
                f"Expected as many axes as there are in operation '{name}' of type BroadcastTo. "
                f"Received: a tensor of shape {tuple(x.shape)} for the shape {shape}. Reshape it "
                "before, so that the batch stays the first axis."
            )
        if x.dtype == "bool" and shape[1:] != tuple(x.shape[1:]):
            # GATHER takes no truth values on TFLite Micro.
            none = np.zeros((1, *shape[1:]), bool).tolist()
            return IndexOperation(IndexKind.LOGICAL_OR, {"x2": none}, name=name)(x)
        sizes = zip(shape[1:], x.shape[1:], strict=True)
        return _tiled(x, [1, *(wanted // size for wanted, size in sizes)], name)

    return call


def _rot90(operation: Any, name: str) -> Callable[..., Any]:
    # With k=2 and sides of unlike length, Keras 3.15 returns something else on TensorFlow: a trial
    # refuses that.
    def call(x: Any) -> Any:
        first, second = (axis_of(axis, len(x.shape), name) for axis in operation.axes)
        turns = operation.k % 4
        if turns == 1:
            return ops.swapaxes(ops.flip(x, axis=second), first, second)
        if turns == 3:
            return ops.flip(ops.swapaxes(x, first, second), axis=second)
        if turns == 0:
            return layers.Identity(name=name)(x)
        # One after the other: Keras before 3.13 takes no list of axes.
        return ops.flip(ops.flip(x, axis=first), axis=second)

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
        return kind(operation.block_size, name=name)

    return operation_in_either_format(row)


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
    return lambda operation, name: lambda tensors: joined(tensors, axis, name)


def _pad(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any, constant_values: Any = None) -> Any:
        widths, mode = [tuple(pair) for pair in operation.pad_width], operation.mode.lower()
        value = 0.0 if constant_values is None else constant_values
        if widths[0] != (0, 0) or len(widths) < 2 or not (mode != "constant" or is_number(value)):
            raise UnsupportedLayerError(
                f"Expected one number around axes other than the batch in operation '{name}'. "
                f"Received: pad_width={operation.pad_width}, mode={mode!r}. Slice and "
                "concatenate instead."
            )
        padded = [axis for axis, width in enumerate(widths) if any(width)]
        if not padded:
            return layers.Identity(name=name, dtype=x.dtype)(x)
        if mode != "constant":
            return _repeated(x, widths, mode, name)
        number = float(np.asarray(value).reshape(()))
        if whole_numbers.is_whole(x) and x.dtype != "bool":
            return whole_numbers.padded(x, widths, number, name)
        if number == 0:
            return zeros_around(x, widths, name)
        most = min(MOST_AXES["PADV2"])
        if number <= FAR_BELOW and len(widths) <= most:
            return Padding(PaddingKind.LOWEST, widths[1:], name=name)(x)
        for axis in padded:
            part = name if axis == padded[-1] else f"{name}_{axis}"
            x = _beside(x, axis, widths[axis], number, part)
        return x

    return call


TRIED_AXES = 6  # the most with which `benchmarks/rank_probe.py` tried MIRROR_PAD


def zeros_around(x: Any, widths: list[tuple[int, int]], name: str) -> Any:
    """Zeros before and behind, one pair of numbers for each axis; the batch's are 0."""
    spatial = widths[1:-1]
    if widths[-1] == (0, 0) and 1 <= len(spatial) <= 3:
        return _zeros_around(spatial, name)(x)
    if len(widths) <= min(MOST_AXES["PAD"]):
        return ZeroPadding(widths[1:], name=name)(x)
    return _zeros_axis_by_axis(x, widths[1:], name)


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


def _repeated(x: Any, widths: list[tuple[int, int]], mode: str, name: str) -> Any:
    """Values around that come again from inside, in the order that NumPy has for `mode`."""
    if mode not in ("reflect", "symmetric"):
        raise UnsupportedLayerError(
            f"Expected mode 'constant', 'reflect' or 'symmetric' in operation '{name}'. "
            f"Received: {mode!r}. Take or concatenate what is to stand around."
        )
    if len(widths) <= TRIED_AXES:
        return Padding(mode, widths[1:], name=name)(x)
    padded = [axis for axis, width in enumerate(widths) if any(width)]
    for axis in padded:
        kind: Any = mode
        indices = np.pad(np.arange(x.shape[axis]), widths[axis], kind).tolist()
        x = Take(indices, axis, name=name if axis == padded[-1] else f"{name}_{axis}")(x)
    return x


def _beside(x: Any, axis: int, widths: tuple[int, int], number: float, name: str) -> Any:
    """One number before and behind the values of an axis: its range joins theirs."""
    parts = [x]
    for place, width in ((0, widths[0]), (len(parts) + 1, widths[1])):
        if width:
            shape = (1, *x.shape[1:axis], width, *x.shape[axis + 1 :])
            side = np.full(shape, number, np.float32)
            around = emitted(side, x, len(shape), f"{name}_{'behind' if place else 'before'}")
            parts.insert(place, around)
    return joined(parts, axis, name)


def _zeros_around(spatial: list[tuple[int, int]], name: str) -> Any:
    kind = {1: layers.ZeroPadding1D, 2: layers.ZeroPadding2D, 3: layers.ZeroPadding3D}
    return kind[len(spatial)](spatial[0] if len(spatial) == 1 else tuple(spatial), name=name)


def _take_along(operation: Any, name: str) -> Callable[..., Any]:
    """Constant indices, others at each place: as one `take` of all that lies along such axes.

    Indices that are computed, of whole rows of a matrix, are a product with their one-hot codes.
    """

    def call(x: Any, indices: Any) -> Any:
        axis = axis_of(operation.axis, len(x.shape), name)
        if is_tensor(x) and is_tensor(indices) and axis == 1 and _picks_rows(x, indices):
            codes = layers.Reshape((indices.shape[1],), name=f"{name}_places")(indices)
            codes = one_hot(codes, x.shape[1], f"{name}_codes")
            if len(x.shape) == 3:
                return Matmul(name=name)([codes, x])
            column = layers.Reshape((x.shape[1], 1), name=f"{name}_column")(x)
            picked = Matmul(name=f"{name}_product")([codes, column])
            return layers.Reshape((indices.shape[1],), name=name)(picked)
        if is_tensor(indices) or not is_tensor(x):
            raise UnsupportedLayerError(
                f"Expected constant indices into a tensor in operation '{name}' of type "
                f"{type(operation).__name__}, or indices of rows: (batch, places, 1) into (batch, "
                f"rows, columns) along axis 1. Received: shapes {tuple(np.shape(x))} and "
                f"{tuple(np.shape(indices))} along axis {axis}. Multiply by a one_hot of the "
                "indices instead."
            )
        picked = np.asarray(indices, np.int64) % x.shape[axis]
        shape = np.broadcast_shapes(
            (*picked.shape[:axis], 1, *picked.shape[axis + 1 :]),
            (1, *x.shape[1:axis], 1, *x.shape[axis + 1 :]),
        )
        if shape[0] != 1:
            raise UnsupportedLayerError(
                f"Expected indices that are the same for all samples in operation '{name}'. "
                f"Received: shape {picked.shape}. Let their first axis, the batch, be 1."
            )
        grid = np.indices((1, *x.shape[1:]), sparse=False)[0].shape[1:]
        picked = np.broadcast_to(picked, (*shape[:axis], picked.shape[axis], *shape[axis + 1 :]))[0]
        # The axes before those along which all indices are alike stay as they are.
        first = next((i for i in range(axis - 1) if not _alike_along(picked, i)), axis - 1)
        picked = picked[(0,) * first]
        places = np.indices(picked.shape)
        places[axis - 1 - first] = picked
        flat = np.ravel_multi_index(tuple(places), grid[first:])
        whole = layers.Reshape((*grid[:first], -1), name=f"{name}_flat")(x)
        taken = Take(flat.reshape(-1).tolist(), first + 1, name=f"{name}_taken")(whole)
        return layers.Reshape((*grid[:first], *picked.shape), name=name)(taken)

    return call


def _picks_rows(x: Any, indices: Any) -> bool:
    """Whether indices pick numbers of a vector, or whole rows of a matrix."""
    rows_of_matrix = len(x.shape) == 3 and tuple(indices.shape[2:]) == (1,)
    return holds_indexes(indices) and not holds_indexes(x) and (len(x.shape) == 2 or rows_of_matrix)


def _alike_along(array: np.ndarray, axis: int) -> bool:
    return bool(np.all(array == np.take(array, [0], axis=axis)))


def _filled(number: float | None) -> Row:
    """A constant of a tensor's shape, which is the same for all samples."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any, fill_value: Any = number, dtype: Any = None) -> Any:
            value = fill_value
            if not is_number(value):
                raise UnsupportedLayerError(
                    f"Expected one number to fill with in operation '{name}'. Received: "
                    f"{fill_value!r}. Multiply ones by the tensor instead."
                )
            value = float(np.asarray(value).reshape(()))
            dtype = option(operation, "dtype", dtype) or x.dtype
            if keras.backend.is_float_dtype(dtype):
                shape = (1, *x.shape[1:])
                return keras.Variable(np.full(shape, value), trainable=False, name="filled")
            if not holds_indexes(x):
                raise UnsupportedLayerError(
                    f"Expected the type of the tensor in operation '{name}'. Received: {x.dtype} "
                    f"-> {dtype}. Make the indexes of an input that holds indexes."
                )
            zero = IndexOperation(IndexKind.MULTIPLY, {"x2": 0}, name=f"{name}_zero")(x)
            return IndexOperation(IndexKind.ADD, {"x2": int(value)}, name=name)(zero)

        return call

    return row


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
    "BroadcastTo": _broadcast,
    "Rot90": _rot90,
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
    "TakeAlongAxis": _take_along,
    "ZerosLike": _filled(0.0),
    "OnesLike": _filled(1.0),
    "FullLike": _filled(None),
}
