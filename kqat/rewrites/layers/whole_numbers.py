"""Arithmetic of integers without a scale: their bounds, their sums, and quantities of them.

Counts of steps and places of words are such integers. They are added in int32, which is exact, and
become quantities by a table with one row for each integer that they may be.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import holds_indexes, is_tensor, maker_of
from kqat.parts import IndexKind, IndexOperation, Slice, Take, TopK
from kqat.rewrites.layers.one_hot import rows

# A table of more rows would be larger than the weights of many layers.
MOST_ROWS = 4096

_COMPARISONS = frozenset(
    (
        IndexKind.EQUAL, IndexKind.NOT_EQUAL, IndexKind.GREATER, IndexKind.GREATER_EQUAL,
        IndexKind.LESS, IndexKind.LESS_EQUAL, IndexKind.LOGICAL_AND, IndexKind.LOGICAL_OR,
        IndexKind.LOGICAL_NOT,
    )
)  # fmt: skip
_MOVING = (
    layers.Reshape, layers.Permute, layers.Flatten, layers.Identity, layers.RepeatVector,
    layers.Cropping1D, layers.Cropping2D, layers.Cropping3D, Slice, Take,
)  # fmt: skip
_MOVING_OPERATIONS = frozenset(
    (
        "Reshape", "ExpandDims", "Squeeze", "Transpose", "Swapaxes", "Moveaxis", "GetItem", "Take",
        "Flip", "Roll", "Repeat", "Tile", "Stack", "Concatenate", "Split", "Unstack", "Identity",
        "BroadcastTo",
    )
)  # fmt: skip
_ARITHMETIC: dict[IndexKind, Callable[[float, float], float]] = {
    IndexKind.ADD: operator.add,
    IndexKind.SUBTRACT: operator.sub,
    # Zero times an end that is not known is zero.
    IndexKind.MULTIPLY: lambda a, b: a * b if a and b else 0,
    # By constants: an infinite end stays one.
    IndexKind.DIVIDE: lambda a, b: math.trunc(a / b) if math.isfinite(a) else a / b,
    IndexKind.MAXIMUM: max,
    IndexKind.MINIMUM: min,
}
_JOINING = (IndexKind.CONCATENATE, IndexKind.PAD)
# Integers, or infinite where the graph does not tell.
Bounds = tuple[float, float]
_ANY = (-math.inf, math.inf)
_TRUTH = (0, 1)
# What integers of an input are taken for: the first that leaves a table of few rows.
_INPUTS: tuple[Bounds, ...] = (_ANY, (0, math.inf), _TRUTH)


def bounds(x: Any) -> tuple[int, int] | None:
    """The least and the largest that integers may be, as far as the graph tells.

    An input may be anything that a clip leaves of it, or that a bound leaves of what is not
    negative. Where nothing bounds it, it is taken for zeros and ones, as a mask is: calibration
    looks at its data.
    """
    for inputs in _INPUTS:
        low, high = _Bounds(inputs).of(x) or _ANY
        if high - low < MOST_ROWS:
            return int(low), int(high)
    return None if math.isinf(high - low) else (int(low), int(high))


class _Bounds:
    """Finds bounds, those of each tensor once; `inputs` are those of integers that are inputs."""

    def __init__(self, inputs: Bounds) -> None:
        self.inputs = inputs
        self.found: dict[int, tuple[Any, Bounds | None]] = {}

    def of(self, x: Any) -> Bounds | None:
        """See `bounds`."""
        if id(x) not in self.found:
            self.found[id(x)] = (x, self._of(x))
        return self.found[id(x)][1]

    def _of(self, x: Any) -> Bounds | None:
        maker, read = maker_of(x)
        if x.dtype == "bool":
            return _TRUTH
        if maker is None or isinstance(maker, layers.InputLayer):
            return self.inputs
        if isinstance(maker, IndexOperation) and maker.kind not in _JOINING:
            return self._computed(maker, read)
        if isinstance(maker, TopK):
            return self._picked(read[0])
        if isinstance(maker, IndexOperation):
            moves = True
        elif isinstance(maker, layers.Layer):
            moves = isinstance(maker, _MOVING)
        else:
            moves = type(maker).__name__ in _MOVING_OPERATIONS
        parts = [self.of(tensor) for tensor in read]
        known = [part for part in parts if part is not None]
        if not moves or len(known) < len(parts) or not known:
            return None
        if isinstance(maker, IndexOperation) and maker.kind is IndexKind.PAD:
            known.append((maker.options["constant_values"],) * 2)
        return min(low for low, _ in known), max(high for _, high in known)

    def _picked(self, x: Any) -> Bounds | None:
        """The largest integers along an axis, or their indexes; of quantities only the indexes."""
        size = x.shape[-1]
        numbers = self.of(x) if holds_indexes(x) else (0, 0)
        if numbers is None or size is None:
            return None
        return min(numbers[0], 0), max(numbers[1], size - 1)

    def _computed(self, maker: IndexOperation, read: list[Any]) -> Bounds | None:
        if maker.kind in _COMPARISONS:
            return _TRUTH
        if maker.kind not in _ARITHMETIC:  # The place of the largest or least.
            size = read[0].shape[maker.options["axis"]]
            return None if size is None else (0, size - 1)
        if (rest := self._rest(maker, read)) is not None:
            return rest
        operands: list[Bounds | None] = [self.of(tensor) for tensor in read]
        for key in ("x1", "x2"):
            if key in maker.options:
                numbers = np.asarray(maker.options[key])
                if numbers.dtype.kind not in "iub":
                    return None
                operands.insert(int(key == "x2"), (int(numbers.min()), int(numbers.max())))
        if len(operands) != 2 or operands[0] is None or operands[1] is None:
            return None
        if maker.kind is IndexKind.MULTIPLY and len(read) == 2 and read[0] is read[1]:
            low, high = sorted(map(abs, operands[0]))
            return (0 if operands[0][0] <= 0 <= operands[0][1] else low**2), high**2
        results = [_ARITHMETIC[maker.kind](a, b) for a in operands[0] for b in operands[1]]
        # Two infinite ends that leave each other undetermined are not the ends of the result.
        ends = [end for end in results if not math.isnan(end)]
        return min(ends), max(ends)

    def _rest(self, maker: IndexOperation, read: list[Any]) -> Bounds | None:
        """Bounds of what a division leaves; `None` for another difference."""
        product, factors = maker_of(read[-1])
        if maker.kind is not IndexKind.SUBTRACT or len(read) != 2 or not factors:
            return None
        quotient, dividend = maker_of(factors[0])
        parts = ((product, IndexKind.MULTIPLY), (quotient, IndexKind.DIVIDE))
        divides = all(isinstance(o, IndexOperation) and o.kind is kind for o, kind in parts)
        if not divides or dividend[0] is not read[0]:
            return None
        divisors = np.asarray(quotient.options["x2"])
        if not np.array_equal(divisors, np.asarray(product.options.get("x2"))):
            return None
        most = int(np.abs(divisors).max()) - 1
        low, high = self.of(dividend[0]) or _ANY
        return max(low, -most) if low < 0 else 0, min(high, most) if high > 0 else 0


def floor_division(x: Any, divisor: Any, name: str) -> tuple[Any, Any]:
    """The quotient of integers by constants, rounded down, and what it leaves.

    TFLite Micro has no FLOOR_DIV and FLOOR_MOD of int32; every runtime has DIV, which rounds
    towards zero. Where that leaves a negative rest, the quotient is one less.

    Raises:
        UnsupportedLayerError: if a divisor is no integer above zero.
    """
    divisors = np.asarray(divisor)
    if divisors.dtype.kind not in "iu" or divisors.min() < 1:
        raise UnsupportedLayerError(
            f"Expected integers to be divided by constant integers above zero in '{name}'. "
            f"Received: {divisors.tolist()}. Cast the integers to float for another quotient."
        )

    def by(kind: IndexKind, a: Any, b: Any, part: str) -> Any:
        read, options = ([a, b], {}) if is_tensor(b) else (a, {"x2": b})
        return IndexOperation(kind, options, name=f"{name}_{part}")(read)

    numbers = divisors.tolist()
    whole = as_integers(x, name)
    quotient = by(IndexKind.DIVIDE, whole, numbers, "quotient")
    rest = by(
        IndexKind.SUBTRACT, whole, by(IndexKind.MULTIPLY, quotient, numbers, "multiple"), "rest"
    )
    if (bounds_of := _Bounds(_ANY).of(whole)) is not None and bounds_of[0] >= 0:
        return quotient, rest
    below = as_integers(by(IndexKind.LESS, rest, 0, "below"), f"{name}_below")
    more = by(IndexKind.MULTIPLY, below, numbers, "more")
    return (
        by(IndexKind.SUBTRACT, quotient, below, "floor"),
        by(IndexKind.ADD, rest, more, "mod"),
    )


def padded(x: Any, widths: Sequence[tuple[int, int]], number: Any, name: str) -> Any:
    """Integers with a number around them; `widths` has a pair for each axis, the batch's zeros."""
    options = {"pad_width": [list(pair) for pair in widths], "constant_values": int(number)}
    return IndexOperation(IndexKind.PAD, options, name=name)(as_integers(x, name))


def moved(layer: Any, x: Any, name: str) -> Any:
    """What a layer makes of integers, which Keras's symbolic tensors say are floats from there on.

    Args:
        layer: that moves values, or merges them.
        x: a tensor, or a list of them.
        name: of what computes it.

    Returns:
        Integers, or `None` where it is no such layer, or reads quantities.
    """
    known = type(layer) in _MOVES and all(map(is_whole, x if isinstance(x, list | tuple) else [x]))
    return _MOVES[type(layer)](layer, x, name) if known else None


def _pairs(given: Any) -> list[tuple[int, int]]:
    """Two numbers for each axis but the batch's, of a layer of one or more spatial axes."""
    spatial = [given] if isinstance(given[0], int) else given
    return [*(tuple(pair) for pair in spatial), (0, 0)]


def _cropped(layer: Any, x: Any, name: str) -> Any:
    pairs = _pairs(layer.cropping)
    ends = [size - end for size, (_, end) in zip(x.shape[1:], pairs, strict=True)]
    return Slice([start for start, _ in pairs], ends, [1] * len(pairs), name=name)(x)


def _zero_padded(layer: Any, x: Any, name: str) -> Any:
    return padded(x, [(0, 0), *_pairs(layer.padding)], 0, name)


def _repeated(layer: Any, x: Any, name: str) -> Any:
    """`RepeatVector` and `UpSampling1D`: each row as often as the layer says."""
    count = layer.n if isinstance(layer, layers.RepeatVector) else layer.size
    rows_before = math.prod(x.shape[1:-1])
    row = layers.Reshape((rows_before, 1, x.shape[-1]), name=f"{name}_row")(x)
    many = IndexOperation(IndexKind.CONCATENATE, {"axis": 2}, name=f"{name}_many")
    whole = (rows_before * count, x.shape[-1])
    return layers.Reshape(whole, name=name)(many([row] * count) if count > 1 else row)


def _joined(layer: Any, x: Sequence[Any], name: str) -> Any:
    return IndexOperation(IndexKind.CONCATENATE, {"axis": layer.axis}, name=name)(list(x))


def _merged(kind: IndexKind) -> Callable[[Any, Any, str], Any]:
    def merge(layer: Any, x: Sequence[Any], name: str) -> Any:
        result, *others = [as_integers(part, f"{name}_{i}") for i, part in enumerate(x)]
        for i, other in enumerate(others, 1):
            part = name if i == len(others) else f"{name}_and_{i}"
            result = IndexOperation(kind, name=part)([result, other])
        return result

    return merge


_MOVES: dict[type, Callable[[Any, Any, str], Any]] = {
    layers.RepeatVector: _repeated,
    layers.UpSampling1D: _repeated,
    layers.Concatenate: _joined,
    layers.Add: _merged(IndexKind.ADD),
    layers.Subtract: _merged(IndexKind.SUBTRACT),
    layers.Multiply: _merged(IndexKind.MULTIPLY),
    layers.Maximum: _merged(IndexKind.MAXIMUM),
    layers.Minimum: _merged(IndexKind.MINIMUM),
    **dict.fromkeys((layers.Cropping1D, layers.Cropping2D, layers.Cropping3D), _cropped),
    **dict.fromkeys(
        (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D), _zero_padded
    ),
}


def quantity(x: Any, name: str) -> Any:
    """Integers or truth values as quantities, by a table of all that they may be.

    Raises:
        UnsupportedLayerError: if the graph does not tell what they may be, or the table is large.
    """
    found = bounds(x)
    if found is None or found[1] - found[0] >= MOST_ROWS:
        said = "no bounds that the graph tells" if found is None else f"{found[0]} to {found[1]}"
        raise UnsupportedLayerError(
            f"Expected integers of few values in '{name}', which makes quantities of {x.dtype}. "
            f"Received: {said}. An index is no quantity: use one_hot or an Embedding, clip the "
            f"integers to a range of less than {MOST_ROWS}, or give the model one more input, "
            "float32."
        )
    low, high = found
    if low:
        x = IndexOperation(IndexKind.SUBTRACT, {"x2": low}, name=f"{name}_row")(x)
    table = np.arange(low, high + 1, dtype=np.float32)[:, None]
    return layers.Reshape(x.shape[1:], name=name)(rows(table, x, f"{name}_rows", False))


def as_integers(x: Any, name: str) -> Any:
    """Truth values as zeros and ones; integers as they are."""
    if x.dtype != "bool":
        return x
    return IndexOperation(IndexKind.MULTIPLY, {"x2": 1}, name=f"{name}_ones")(x)


def folded(kind: IndexKind, x: Any, axes: Sequence[int], keepdims: bool, name: str) -> Any:
    """The sum, largest or least of integers over axes, by halves.

    Args:
        kind: `ADD`, `MAXIMUM` or `MINIMUM`.
        x: integers or truth values, `(batch, …)`.
        axes: without the batch.
        keepdims: as Keras has it.
        name: that the layers' names begin with.
    """
    x = as_integers(x, name)
    kept = [
        1 if axis in axes else size
        for axis, size in enumerate(x.shape)
        if axis and (keepdims or axis not in axes)
    ]
    # The last operation bears the name; an axis of one is summed by none.
    final = max((axis for axis in axes if x.shape[axis] > 1), default=None)
    moves = len(kept) + 1 < len(x.shape) or final is None
    for axis in sorted(axes):
        rests = []
        while (size := x.shape[axis]) > 1:
            half, part = size // 2, f"{name}_{axis}_{size}"
            halves = [cut(x, axis, i * half, half, f"{part}_{i}") for i in range(2)]
            rests += [cut(x, axis, size - 1, 1, f"{part}_rest")] if size % 2 else []
            last = half == 1 and not rests and axis == final and not moves
            x = IndexOperation(kind, name=name if last else part)(halves)
        for i, rest in enumerate(rests, 1):
            last = i == len(rests) and axis == final and not moves
            x = IndexOperation(kind, name=name if last else f"{name}_{axis}_and_{i}")([x, rest])
    return layers.Reshape(tuple(kept), name=name)(x) if moves else x


def running_sum(x: Any, axis: int, name: str) -> Any:
    """The sum of integers up to each, along an axis: distances of 1, 2, 4 … are added in turn."""
    x = as_integers(x, name)
    size, far = x.shape[axis], 1
    while far < size:
        first = cut(x, axis, 0, far, f"{name}_first_{far}")
        none = IndexOperation(IndexKind.MULTIPLY, {"x2": 0}, name=f"{name}_none_{far}")(first)
        rest = cut(x, axis, 0, size - far, f"{name}_earlier_{far}")
        moved = IndexOperation(IndexKind.CONCATENATE, {"axis": axis}, name=f"{name}_moved_{far}")
        far *= 2
        last = name if far >= size else f"{name}_{far}"
        x = IndexOperation(IndexKind.ADD, name=last)([x, moved([none, rest])])
    return x


def cut(x: Any, axis: int, begin: int, size: int, name: str) -> Any:
    """Some positions along one axis."""
    behind = range(1, len(x.shape))
    starts = [begin if one == axis else 0 for one in behind]
    ends = [begin + size if one == axis else x.shape[one] for one in behind]
    return Slice(starts, ends, [1] * len(starts), name=name)(x)


def promoted(args: Any, name: str) -> Any:
    """Arguments of an operation of quantities, with its integers made quantities, as Keras does."""
    made: dict[int, Any] = {}

    def one(x: Any) -> Any:
        if id(x) not in made:
            label = f"{name}_quantity_{len(made)}" if made else f"{name}_quantity"
            made[id(x)] = quantity(x, label)
        return made[id(x)]

    return tuple(one(x) if is_whole(x) else x for x in args)


def is_whole(x: Any) -> bool:
    """Whether a value is a tensor of integers or truth values; bytes of a camera are none."""
    return is_tensor(x) and holds_indexes(x) and x.dtype != "uint8"
