"""Functions whose tensors have the batch elsewhere, rewritten so that it is always the first axis.

`(batch * windows, …)` becomes `(batch, windows, …)`, and `(3, batch, …)`, as a transposition makes
queries, keys and values of one tensor, becomes `(batch, 3, …)`. All numbers stay the same; only
axes move. An integer file has one sample, so it needs the batch in one place.
"""

import dataclasses
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.base import ModelError, spelled_out
from kqat.graph.values import broadcast_sum, made_of

# Letters of an equation that no user's has: the batch, and the two parts beside it on its axis.
BATCH, OUTER, INNER = "αβγ"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor has the batch: `axis` has `outer * batch * inner` entries, in this order."""

    axis: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def beside(self) -> tuple[int, ...]:
        """The sizes that share the batch's axis, and get axes of their own."""
        return tuple(size for size in (self.outer, self.inner) if size > 1)

    def axes(self, rank: int) -> list[list[int]]:
        """For each axis of a tensor of `rank` axes, those that stand for it behind the batch."""
        found, at = [], 1
        for axis in range(rank):
            count = len(self.beside) if axis == self.axis else 1
            found.append(list(range(at, at + count)))
            at += count
        return found

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape behind the batch that stands for `shape`."""
        before, after = shape[: self.axis], shape[self.axis + 1 :]
        return (*before, *self.beside, *after)


FIRST = Place()


class BatchFirst:
    """Runs the calls of a function anew, with the batch first.

    Args:
        batch: the prime that stands for the batch size.
        weights: values of the tensors that no input reaches, by identity.
        name: of the layer whose function it is, for messages.
    """

    def __init__(self, batch: int, weights: Mapping[int, Any], name: str) -> None:
        self.batch, self.weights, self.name = batch, weights, name
        self.known: dict[int, tuple[Any, Place]] = {}

    def run(self, calls: Sequence[Any], inputs: Sequence[Any]) -> None:
        """Runs `calls`, which begin with `inputs`, that have the batch first; fills `known`.

        Raises:
            ModelError: if an operation mixes samples, or is not known to be free of that.
        """
        self.known.update((id(t), (t, FIRST)) for t in inputs)
        for call in calls:
            if not all(id(t) in self.weights for t in call.outputs):
                made = self._made(call)
                for tensor, (value, place) in zip(call.outputs, made, strict=True):
                    self.known[id(tensor)] = value, self._place_of(tensor, place, call)

    def _place_of(self, tensor: Any, place: Place, call: Any) -> Place:
        size = place.outer * self.batch * place.inner
        if len(tensor.shape) <= place.axis or tensor.shape[place.axis] != size:
            raise self.mixed(call)
        return place

    def _made(self, call: Any) -> list[tuple[Any, Place]]:
        operation, arguments = call.operation, call.arguments
        tensors = [t for t in call.input_tensors if id(t) in self.known]
        firsts = [self.known[id(t)][1] == FIRST for t in tensors]
        if all(firsts) and all(t.shape and t.shape[0] == self.batch for t in call.outputs):
            args, kwargs = keras.tree.map_structure(
                self._as_it_is, (arguments.args, arguments.kwargs)
            )
            return [(value, FIRST) for value in keras.tree.flatten(operation(*args, **kwargs))]
        kind = type(operation).__name__
        rule = _RULES.get(kind)
        if rule is not None:
            return rule(self, call)
        if isinstance(operation, keras.layers.Layer):
            return self._layer(call)
        same = [t.shape for t in tensors] == [t.shape for t in call.outputs]
        if same and not hasattr(operation, "axis"):
            return self._of_each_number(call)
        raise self.mixed(call)

    def _as_it_is(self, value: Any) -> Any:
        if id(value) in self.known:
            return self.known[id(value)][0]
        value = self.weights.get(id(value), value)
        if is_array(value) and len(value.shape) and value.shape[0] == self.batch:
            return self._beside(value, len(value.shape), FIRST)
        return value

    def mixed(self, call: Any) -> ModelError:
        shapes = [tuple(t.shape) for t in call.input_tensors]
        return ModelError(
            f"Expected every sample of the batch to be computed alone in '{self.name}'. Received: "
            f"operation {type(call.operation).__name__} of shapes {shapes}, "
            f"where {self.batch} stands for the batch, which is not the first axis; kqat does not "
            "know that it keeps samples apart. Move the batch to the front before it."
        )

    # Arguments.

    def tensor(self, call: Any, index: int = 0) -> tuple[Any, Place, int]:
        """The tensor argument at a position, its place, and the number of its axes."""
        given = self.flat(call)[index]
        if id(given) not in self.known:
            raise self.mixed(call)
        value, place = self.known[id(given)]
        return value, place, len(given.shape)

    def flat(self, call: Any) -> list[Any]:
        """The arguments by position, lists opened."""
        return keras.tree.flatten(call.arguments.args)

    def option(self, call: Any, name: str) -> Any:
        """An option of the operation, wherever Keras keeps it."""
        given = {**vars(call.operation), **call.arguments.kwargs}
        return given.get(name)

    def aligned(self, call: Any, values: Sequence[Any]) -> tuple[list[Any], Place]:
        """Operands that broadcast, all with the batch first and of one rank, and their place."""
        rank = max(len(np.shape(v)) if not hasattr(v, "shape") else len(v.shape) for v in values)
        places = {
            dataclasses.replace(place, axis=place.axis + rank - len(v.shape))
            for v in values
            if id(v) in self.known
            for _, place in [self.known[id(v)]]
        }
        if len(places) != 1:
            raise self.mixed(call)
        (place,) = places
        return [self._operand(v, rank, place) for v in values], place

    def _operand(self, value: Any, rank: int, place: Place) -> Any:
        if id(value) not in self.known:
            value = self.weights.get(id(value), value)
            return self._beside(value, rank, place) if is_array(value) else value
        moved, _ = self.known[id(value)]
        missing = rank - len(value.shape)
        if not missing:
            return moved
        return ops.reshape(moved, (self.batch, *(1,) * missing, *moved.shape[1:]))

    def _beside(self, value: Any, rank: int, place: Place) -> Any:
        """A constant that broadcasts beside tensors of `rank` axes, the batch first."""
        array = np.asarray(value)
        if not array.ndim:
            return value
        shape = (1,) * (rank - array.ndim) + array.shape
        size = shape[place.axis]
        if size == 1:
            beside: tuple[int, ...] = (1,) * len(place.beside)
            array = array.reshape(shape)
        elif size == place.outer * self.batch * place.inner:
            parts = array.reshape(
                *shape[: place.axis], place.outer, self.batch, place.inner, *shape[place.axis + 1 :]
            )
            array = np.take(parts, 0, axis=place.axis + 1)
            if not np.all(parts == np.expand_dims(array, place.axis + 1)):
                raise ModelError(
                    f"Expected weights that are the same for all samples in '{self.name}'. "
                    f"Received: one of shape {shape}, which was computed with the batch size. "
                    "Compute it without that."
                )
            beside = place.beside
        else:
            raise ModelError(
                f"Expected weights without a batch in '{self.name}'. Received: one of shape "
                f"{shape} beside {size} samples. Give that axis the size 1."
            )
        array = array.reshape(1, *shape[: place.axis], *beside, *shape[place.axis + 1 :])
        if isinstance(value, keras.Variable):
            made = keras.Variable(array, trainable=value.trainable, name=value.name)
            return made_of([value], made)
        return array

    # Kinds of operations.

    def _of_each_number(self, call: Any) -> list[tuple[Any, Place]]:
        args, kwargs = keras.tree.map_structure(
            self._as_it_is, (call.arguments.args, call.arguments.kwargs)
        )
        (place,) = {self.known[id(t)][1] for t in call.input_tensors}
        return [(value, place) for value in keras.tree.flatten(call.operation(*args, **kwargs))]

    def _layer(self, call: Any) -> list[tuple[Any, Place]]:
        """A layer: over the last axis as it is, else once for each part of the batch's axis."""
        layer = call.operation
        values = [self.known[id(t)] for t in call.input_tensors if id(t) in self.known]
        places = {place for _, place in values}
        if len(places) != 1:
            raise self.mixed(call)
        (place,) = places
        rank = len(call.input_tensors[0].shape)
        last = getattr(layer, "axis", -1) in (-1, [-1], (-1,), rank - 1, [rank - 1])
        if type(layer).__name__ in _LAST_AXIS and last and place.axis < rank - 1:
            return self._of_each_number(call)
        if place.axis or place.outer > 1 or len(values) < len(call.input_tensors):
            raise self.mixed(call)
        parts = []
        for i in range(place.inner):
            args, kwargs = keras.tree.map_structure(
                lambda v, i=i: (
                    self.known[id(v)][0][:, i] if id(v) in self.known else self._as_it_is(v)
                ),
                (call.arguments.args, call.arguments.kwargs),
            )
            parts.append(keras.tree.flatten(layer(*args, **kwargs)))
        return [(ops.stack(list(each), axis=1), place) for each in zip(*parts, strict=True)]

    def reshaped(self, call: Any) -> list[tuple[Any, Place]]:
        """Any operation that keeps the order of all values."""
        x, place, _ = self.tensor(call)
        given = self.flat(call)[0].shape
        shape = call.outputs[0].shape
        axis = next((i for i, size in enumerate(shape) if size % self.batch == 0), None)
        outer = math.prod(given[: place.axis]) * place.outer
        before = math.prod(shape[:axis])
        if axis is None or outer % before or (shape[axis] // self.batch) % (outer // before):
            raise self.mixed(call)
        outer //= before
        new = Place(axis, outer, shape[axis] // self.batch // outer)
        sizes = new.sizes(shape)
        return [(x if sizes == x.shape[1:] else ops.reshape(x, (self.batch, *sizes)), new)]

    def permuted(self, call: Any, order: Sequence[int]) -> list[tuple[Any, Place]]:
        """Axes in another order: axis `order[i]` comes at `i`."""
        x, place, rank = self.tensor(call)
        axes = place.axes(rank)
        new = [0, *(i for axis in order for i in axes[axis])]
        moved = x if new == sorted(new) else ops.transpose(x, new)
        return [(moved, dataclasses.replace(place, axis=list(order).index(place.axis)))]

    def axis(self, call: Any, axis: int, place: Place, rank: int) -> int:
        """The axis that stands for one that has nothing to do with the batch."""
        axis %= rank
        if axis == place.axis:
            raise self.mixed(call)
        return place.axes(rank)[axis][0]

    def along(self, call: Any, function: Callable[..., Any]) -> list[tuple[Any, Place]]:
        """`function(x, axis)` of one axis, which keeps the rank."""
        x, place, rank = self.tensor(call)
        axis = self.option(call, "axis")
        found = function(x, self.axis(call, -1 if axis is None else axis, place, rank))
        return [(value, place) for value in keras.tree.flatten(found)]


def is_array(value: Any) -> bool:
    """Whether a value is a constant array or a variable."""
    if isinstance(value, keras.KerasTensor):
        return False
    return isinstance(value, np.ndarray | keras.Variable) or keras.ops.is_tensor(value)


Made = list[tuple[Any, Place]]
_LAST_AXIS = frozenset(
    (
        "Activation", "BatchNormalization", "Dense", "Dropout", "ELU", "Embedding", "Identity",
        "LayerNormalization", "LeakyReLU", "RMSNormalization", "ReLU", "Rescaling", "Softmax",
        "UnitNormalization",
    )
)  # fmt: skip


def _broadcast(mover: BatchFirst, call: Any) -> Made:
    given = mover.flat(call)
    values, place = mover.aligned(call, given)
    found = iter(values)
    args = keras.tree.map_structure(lambda _: next(found), call.arguments.args)
    return [(call.operation(*args, **call.arguments.kwargs), place)]


def _added(mover: BatchFirst, call: Any) -> Made:
    """A sum, of which axes that moved must not make a bias."""
    values, place = mover.aligned(call, mover.flat(call))
    return [(broadcast_sum(*values), place)]


def _matmul(mover: BatchFirst, call: Any) -> Made:
    a, b = mover.flat(call)
    if id(b) not in mover.known:
        x, place, rank = mover.tensor(call)
        weight = mover.weights.get(id(b), b)
        if len(weight.shape) == 2 and place.axis < rank - 1:
            return [(ops.matmul(x, weight), place)]
    values, place = mover.aligned(call, (a, b))
    if place.axis >= max(len(a.shape), len(b.shape)) - 2:
        raise mover.mixed(call)
    return [(ops.matmul(*values), place)]


def _einsum(mover: BatchFirst, call: Any) -> Made:
    operands = mover.flat(call)
    terms, output = spelled_out(call.operation.subscripts, [len(v.shape) for v in operands])
    inputs = "".join(terms)
    places = {i: mover.known[id(v)][1] for i, v in enumerate(operands) if id(v) in mover.known}
    letters = {terms[i][place.axis] for i, place in places.items()}
    sizes = {(place.outer, place.inner) for place in places.values()}
    constant = "".join(term for i, term in enumerate(terms) if i not in places)
    if len(letters) != 1 or len(sizes) != 1 or letters & set(constant):
        raise mover.mixed(call)
    (letter,), ((outer, inner),) = letters, sizes
    if letter not in output:
        raise mover.mixed(call)
    beside = (OUTER if outer > 1 else "") + (INNER if inner > 1 else "")

    def ours(term: str) -> str:
        return BATCH + term.replace(letter, beside) if letter in term else term

    # Keras knows lower-case letters only where an operand lacks an axis of the output.
    free = iter(c for c in string.ascii_lowercase if c not in inputs)
    equation = f"{','.join(ours(term) for term in terms)}->{ours(output)}"
    for special in (BATCH, OUTER, INNER):
        equation = equation.replace(special, next(free))
    args = [
        mover.known[id(v)][0] if id(v) in mover.known else mover.weights.get(id(v), v)
        for v in operands
    ]
    return [(ops.einsum(equation, *args), Place(output.index(letter), outer, inner))]


def _transposed(mover: BatchFirst, call: Any) -> Made:
    rank = len(mover.flat(call)[0].shape)
    axes = call.operation.axes
    return mover.permuted(call, [a % rank for a in axes] if axes else [*reversed(range(rank))])


def _swapped(mover: BatchFirst, call: Any) -> Made:
    order = [*range(len(mover.flat(call)[0].shape))]
    a, b = call.operation.axis1, call.operation.axis2
    order[a], order[b] = order[b], order[a]
    return mover.permuted(call, order)


def _moved_axis(mover: BatchFirst, call: Any) -> Made:
    rank = len(mover.flat(call)[0].shape)
    # An array whose axes have different sizes shows where each went.
    shape = np.moveaxis(np.empty(range(rank)), call.operation.source, call.operation.destination)
    return mover.permuted(call, shape.shape)


def _permute(mover: BatchFirst, call: Any) -> Made:
    return mover.permuted(call, [0, *call.operation.dims])


def _softmax(mover: BatchFirst, call: Any) -> Made:
    return mover.along(call, lambda x, axis: ops.softmax(x, axis))


def _split(mover: BatchFirst, call: Any) -> Made:
    parts = call.operation.indices_or_sections
    return mover.along(call, lambda x, axis: ops.split(x, parts, axis))


def _concatenate(mover: BatchFirst, call: Any) -> Made:
    given = mover.flat(call)
    values, place = mover.aligned(call, given)
    axis = mover.axis(call, call.operation.axis, place, len(given[0].shape))
    return [(ops.concatenate(_of_one_size(values, axis), axis), place)]


def _of_one_size(values: Sequence[Any], axis: int | None = None) -> list[Any]:
    """Values to be joined, of which weights have the sizes of the others, save along `axis`."""
    like = next(v for v in values if isinstance(v, keras.KerasTensor))
    if axis is not None:
        like = ops.take(like, np.array([0]), axis=axis)

    def whole(value: Any) -> Any:
        sizes = [size for i, size in enumerate(value.shape) if i != axis]
        if isinstance(value, keras.KerasTensor) or sizes == [
            size for i, size in enumerate(like.shape) if i != axis
        ]:
            return value
        return ops.add(ops.subtract(like, like), value)

    return [whole(value) for value in values]


def _unstack(mover: BatchFirst, call: Any) -> Made:
    x, place, rank = mover.tensor(call)
    axis = call.operation.axis % rank
    new = dataclasses.replace(place, axis=place.axis - (axis < place.axis))
    return [(part, new) for part in ops.unstack(x, axis=mover.axis(call, axis, place, rank))]


def _stack(mover: BatchFirst, call: Any) -> Made:
    values, place = mover.aligned(call, mover.flat(call))
    rank = len(call.outputs[0].shape)
    axis = call.operation.axis % rank
    new = dataclasses.replace(place, axis=place.axis + (axis <= place.axis))
    return [(ops.stack(_of_one_size(values), new.axes(rank)[axis][0]), new)]


def _get_item(mover: BatchFirst, call: Any) -> Made:
    x, place, rank = mover.tensor(call)
    key = call.arguments.args[1]
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (rank - sum(k is not None for k in keys) + 1)
    keys += [slice(None)] * (rank - sum(k is not None for k in keys))
    ours: list[Any] = []
    new, axis = 0, 0
    for k in keys:
        if k is not None and axis == place.axis:
            if k != slice(None):
                raise mover.mixed(call)
            ours += [k] * len(place.beside)
            new_axis = new
        else:
            ours.append(k)
        axis += k is not None
        new += not isinstance(k, int)
    return [(x[(slice(None), *ours)], dataclasses.replace(place, axis=new_axis))]


def _reduced(name: str) -> Callable[[BatchFirst, Any], Made]:
    def rule(mover: BatchFirst, call: Any) -> Made:
        x, place, rank = mover.tensor(call)
        axis, keep = call.operation.axis, call.operation.keepdims
        axes = [a % rank for a in ([axis] if isinstance(axis, int) else axis or range(rank))]
        ours = tuple(mover.axis(call, a, place, rank) for a in axes)
        fewer = 0 if keep else sum(a < place.axis for a in axes)
        new = dataclasses.replace(place, axis=place.axis - fewer)
        return [(getattr(ops, name)(x, axis=ours, keepdims=keep), new)]

    return rule


def _index_of(name: str) -> Callable[[BatchFirst, Any], Made]:
    def rule(mover: BatchFirst, call: Any) -> Made:
        x, place, rank = mover.tensor(call)
        axis, keep = call.operation.axis, call.operation.keepdims
        if axis is None:
            raise mover.mixed(call)
        ours = mover.axis(call, axis, place, rank)
        fewer = 0 if keep else int(axis % rank < place.axis)
        new = dataclasses.replace(place, axis=place.axis - fewer)
        return [(getattr(ops, name)(x, axis=ours, keepdims=keep), new)]

    return rule


def _one_hot(mover: BatchFirst, call: Any) -> Made:
    x, place, rank = mover.tensor(call)
    if call.operation.axis % (rank + 1) != rank:
        raise mover.mixed(call)
    return [(call.operation(x), place)]


def _take(mover: BatchFirst, call: Any) -> Made:
    indices = mover.flat(call)[1]
    if np.ndim(indices) > 1:
        raise mover.mixed(call)
    return mover.along(call, lambda x, axis: ops.take(x, indices, axis))


def _roll(mover: BatchFirst, call: Any) -> Made:
    x, place, rank = mover.tensor(call)
    axis, shift = call.operation.axis, call.operation.shift
    axes = [mover.axis(call, int(a), place, rank) for a in np.reshape(axis, -1)]
    return [(ops.roll(x, shift, axes if np.ndim(axis) else axes[0]), place)]


def _repeat(mover: BatchFirst, call: Any) -> Made:
    """Each entry as often as asked for: beside the batch, a further part within."""
    x, place, rank = mover.tensor(call)
    times, axis = call.operation.repeats, call.operation.axis
    if axis is None or np.size(times) != 1:
        raise mover.mixed(call)
    times, axis = int(np.reshape(times, ())), axis % rank
    if axis != place.axis:
        return [(ops.repeat(x, times, axis=place.axes(rank)[axis][0]), place)]
    if times == 1:
        return [(x, place)]
    at = 1 + place.axis + (place.outer > 1)
    x = ops.expand_dims(x, at) if place.inner == 1 else x
    new = dataclasses.replace(place, inner=place.inner * times)
    return [(ops.repeat(x, times, axis=at), new)]


def _tile(mover: BatchFirst, call: Any) -> Made:
    """All entries again and again: beside the batch, a further part without."""
    x, place, rank = mover.tensor(call)
    given = call.operation.repeats
    times = [given] if isinstance(given, int) else [*given]
    if len(times) > rank:
        raise mover.mixed(call)
    times = [1] * (rank - len(times)) + times
    beside = times[place.axis]
    if beside > 1 and place.outer == 1:
        x = ops.expand_dims(x, 1 + place.axis)
    new = dataclasses.replace(place, outer=place.outer * beside)
    ours = [1] * len(x.shape)
    for axis, axes in enumerate(new.axes(rank)):
        # Of the parts beside the batch the outer one comes first.
        if axes:
            ours[axes[0]] = times[axis]
    return [(ops.tile(x, ours), new)]


def _pad(mover: BatchFirst, call: Any) -> Made:
    x, place, rank = mover.tensor(call)
    if any(call.operation.pad_width[place.axis]):
        raise mover.mixed(call)
    widths = [(0, 0)] * len(x.shape)
    for axis, axes in enumerate(place.axes(rank)):
        for ours in axes:
            widths[ours] = tuple(call.operation.pad_width[axis])
    value = call.arguments.kwargs.get("constant_values")
    return [(ops.pad(x, widths, call.operation.mode, value), place)]


_RULES: dict[str, Callable[[BatchFirst, Any], Made]] = {
    **dict.fromkeys(
        ("Reshape", "ExpandDims", "Squeeze", "Flatten"), lambda mover, call: mover.reshaped(call)
    ),
    **dict.fromkeys(
        (
            "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum", "Where",
            "Power", "Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual",
            "LogicalAnd", "LogicalOr",
        ),
        _broadcast,
    ),
    "Add": _added,
    "Matmul": _matmul,
    "Einsum": _einsum,
    "Transpose": _transposed,
    "Swapaxes": _swapped,
    "Moveaxis": _moved_axis,
    "Permute": _permute,
    "Softmax": _softmax,
    "Split": _split,
    "Concatenate": _concatenate,
    "Unstack": _unstack,
    "Stack": _stack,
    "GetItem": _get_item,
    "Take": _take,
    "Roll": _roll,
    "Repeat": _repeat,
    "Tile": _tile,
    "Argmax": _index_of("argmax"),
    "Argmin": _index_of("argmin"),
    "OneHot": _one_hot,
    "Pad": _pad,
    **{name.capitalize(): _reduced(name) for name in ("mean", "sum", "max", "min", "var", "prod")},
}  # fmt: skip
