"""A sum over steps times a function of their count, as in a masked mean that is written by hand.

`sum(x * m, 1) / sum(m, 1)` needs a grid that holds the sums of all lengths, and one that holds
1/200 beside 1: short rows lose their values in the one, long rows in the other. As products with
rows of the factors, in groups of counts (`kqat.rewrites.step_masks.scaled_sum`), both are kept.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, maker_of, rebuild, trace
from kqat.grids import Fixed
from kqat.parts import (
    ConstantRows,
    Elementwise,
    IndexKind,
    IndexOperation,
    Learned,
    Matmul,
    ReciprocalSquareRoot,
    Reduce,
    ReduceKind,
    Select,
    Slice,
    computes_each_number,
    inverts,
)
from kqat.planning.expansion import compute_alike
from kqat.rewrites import step_masks, whole_numbers

Configs = Mapping[str, QuantizeConfig | None]
# Factors less far apart are fine on one grid of 8 bits (benchmarks/masked_means.md).
LEAST_SPREAD = 12.0
# A factor so much larger than the next guards a division by zero: there is nothing to sum.
_GUARD = 100.0
_SAME = (layers.Reshape, layers.Identity, layers.Flatten)
_POOLS = (
    layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D,
)  # fmt: skip


def scale_sums(
    graph: Graph, origins: Mapping[str, str], configs: Configs, name: str
) -> tuple[Graph, dict[str, str]]:
    """`graph` and `origins` with products in place of sums that a function of a count multiplies.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name; sums of 8 bits are changed, if no range is given.
        name: of the model.
    """
    if not all(
        any(isinstance(node.layer, kinds) for node in graph.nodes)
        for kinds in (
            layers.Multiply,
            (Elementwise, ReciprocalSquareRoot),
            (Reduce, Matmul, *_POOLS),
        )
    ):
        return graph, dict(origins)
    eight = {
        part
        for part, origin in origins.items()
        if (asked := configs.get(origin)) is not None
        and asked.activation.bits == 8
        and not isinstance(asked.activation_range, Fixed)
    }
    search, found, calls = _Search(eight), dict(origins), graph.calls()

    known: dict[int, Any] = {}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.layer
        result, scaled = None, None
        if layer.name in eight and not kwargs and len(args) == 1 and calls[id(layer)] == 1:
            scaled = search.scaled(layer, args[0])
        if scaled is None:
            result = layer(*args, **kwargs)
        else:
            result = scaled.emit(str(layer.name), node.outputs[0].shape[1:])
            for part in _made(result, known):
                found.setdefault(part, origins[layer.name])
        known.update((id(made), made) for made in keras.tree.flatten(result))
        return result

    rebuilt = rebuild(graph, call, name)
    if len(found) == len(origins):
        return graph, found
    scaled_graph = dataclasses.replace(trace(rebuilt), output_names=graph.output_names)
    # What looked like a count may be none. The sums then stay as they are, and calibration tells.
    return (scaled_graph, found) if compute_alike(graph, scaled_graph) else (graph, dict(origins))


def _made(tensor: Any, known: Mapping[int, Any]) -> set[str]:
    """The names of the layers that compute a tensor of those that are known, and of inputs."""
    names, rest, seen = set(), [tensor], set(known)
    while rest:
        one = rest.pop()
        maker, read = maker_of(one)
        if id(one) not in seen and not isinstance(maker, layers.InputLayer):
            seen.add(id(one))
            names.add(str(maker.name))
            rest += read
    return names


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """Quantities that a table makes of integers.

    Attributes:
        index: the integers.
        values: of each integer from zero on.
        summed: how the integers are shaped before they are summed, and along which axes; `None`
            where they are not.
        negated: whether the values are of one less the integers, which are zeros and ones.
    """

    index: Any
    values: np.ndarray
    summed: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    negated: bool = False

    @property
    def is_mask(self) -> bool:
        """Whether they are zeros and some other number, of truth values."""
        return self.summed is None and self.values.size == 2 and self.values[0] == 0.0

    def is_of_the_same(self, other: "_Numbers") -> bool:
        """Whether both are of the same truth values, of single ones or of their sum."""
        return self.index is other.index and self.negated is other.negated

    def integers(self, name: str) -> Any:
        """What the values are of, or their sum is."""
        whole = whole_numbers.as_integers(self.index, name)
        if not self.negated:
            return whole
        return IndexOperation(IndexKind.SUBTRACT, {"x1": 1}, name=f"{name}_negated")(whole)

    def count(self, name: str) -> Any:
        """The integers that the values are of."""
        if self.summed is None:
            return self.integers(name)
        shape, axes = self.summed
        ones = _reshaped(self.integers(name), shape, f"{name}_shaped")
        return whole_numbers.folded(IndexKind.ADD, ones, axes, True, name)


@dataclasses.dataclass(frozen=True)
class _Quotient:
    """A weighted mean, `sum(w * x) / sum(w)`: both sums are divided by the count of weights.

    Attributes:
        above: what is summed above: a tensor or a `_Product`.
        below: what is summed below.
        axes: the first that is summed, and the first behind them.
        mask: of the steps; `None` for those of what is summed below that are not zero.
        factors: of both sums.
        inverse: the layers that make the inverse, in their order.
        divided: shape of the lower sum, without the batch.
        divisor: the inverse, where it is among the factors of what is summed above.
    """

    above: Any
    below: Any
    axes: tuple[int, int]
    mask: _Numbers | None
    factors: tuple[float, float]
    inverse: list[Any]
    divided: Any
    divisor: Any = None

    def emit(self, name: str, shape: Any) -> Any:
        """The layers that compute it; the last bears `name`."""
        first, end = self.axes
        rows = [math.prod(self.below.shape[1:first])] if first > 1 else []
        steps = math.prod(self.below.shape[first:end])
        if self.mask is not None:
            ones = self.mask.integers(f"{name}_shown")
        else:
            some = IndexOperation(IndexKind.NOT_EQUAL, {"x2": 0.0}, name=f"{name}_some")(self.below)
            ones = whole_numbers.as_integers(some, f"{name}_shown")
        ones = _reshaped(ones, (*rows, steps), f"{name}_each")
        count = whole_numbers.folded(IndexKind.ADD, ones, [len(rows) + 1], True, f"{name}_count")
        above = _whole(self.above, self.divisor, f"{name}_above")
        inverses = np.array([0.0, *(1.0 / n for n in range(1, steps + 1))])
        sums = []
        ends = tuple(shape), tuple(self.divided)
        for part, x, factor, whole in zip(
            ("sum", "weights"), (above, self.below), self.factors, ends, strict=True
        ):
            label = f"{name}_{part}"
            x = _reshaped(x, (*rows, steps, math.prod(x.shape[end:])), f"{label}_steps")
            sums.append(step_masks.scaled_sum(x, ones, count, factor * inverses, label, whole))
        inverse = sums[1]
        for layer in self.inverse:
            inverse = layer(inverse)
        if len(inverse.shape) != len(shape) + 1:
            each = (*shape[: first - 1], *(1,) * (len(shape) - first + 1))
            inverse = layers.Reshape(each, name=f"{name}_inverse")(inverse)
        return layers.Multiply(name=name)([sums[0], inverse])


def _whole(x: Any, divisor: Any, name: str) -> Any:
    """What is summed, as a tensor without a factor."""
    if not isinstance(x, _Product):
        return _without(x, divisor, f"{name}_bare")
    row = _without(x.row, divisor, f"{name}_row")
    weights = layers.Reshape((*x.shape[1:-1], 1), name=f"{name}_column")(row)
    return layers.Multiply(name=f"{name}_weighted")([weights, x.matrix])


def _without(product: Any, factor: Any, name: str) -> Any:
    """A product without one factor that has one number for each row."""
    if factor is None:
        return product
    maker, read = maker_of(product)
    if type(maker) is not layers.Multiply:
        return _reshaped(_without(read[0], factor, f"{name}_in"), product.shape[1:], name)
    if any(one is factor for one in read):
        return next(one for one in read if one is not factor)
    parts = [
        _without(one, factor, f"{name}_{i}") if _has(one, factor) else one
        for i, one in enumerate(read)
    ]
    return layers.Multiply(name=f"{name}_product")(parts)


def _has(product: Any, factor: Any) -> bool:
    maker, read = maker_of(product)
    if product is factor:
        return True
    moves = type(maker) is layers.Multiply or _keeps(maker, read)
    return moves and any(_has(one, factor) for one in read)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """`factor * sum(x)` over some axes, of those steps that are shown, times a function of a count.

    Attributes:
        x: quantities.
        axes: the first that is summed, and the first behind them.
        shown: a mask of the steps, if it is known.
        factors: the function of the count.
        factor: a number.
    """

    x: Any
    axes: tuple[int, int]
    shown: _Numbers | None
    factors: _Numbers
    factor: float = 1.0

    def emit(self, name: str, shape: Any) -> Any:
        """The layers that compute it; the last bears `name`."""
        first, end = self.axes
        rows = [math.prod(self.x.shape[1:first])] if first > 1 else []
        steps, width = math.prod(self.x.shape[first:end]), math.prod(self.x.shape[end:])
        x = _whole(self.x, None, f"{name}_x")
        x = _reshaped(x, (*rows, steps, width), f"{name}_steps")
        count = _reshaped(self.factors.count(f"{name}_count"), (*(rows or ()), 1), f"{name}_of")
        values, shown, factor = self.factors.values.copy(), None, self.factor
        if self.shown is not None:
            factor *= float(self.shown.values[1])
            ones = self.shown.integers(f"{name}_shown")
            shown = _reshaped(ones, (*rows, steps), f"{name}_each")
            if self.factors.summed is not None and self.factors.is_of_the_same(self.shown):
                values[0] = 0.0  # Nothing is shown.
            elif values[0] != 0.0:
                count = IndexOperation(IndexKind.ADD, {"x2": 1}, name=f"{name}_from_one")(count)
                values = np.concatenate([[0.0], values])
        return step_masks.scaled_sum(x, shown, count, values * factor, name, shape)


class _Search:
    """Finds sums that a function of a count multiplies.

    Args:
        parts: names of the layers that may be changed.
    """

    def __init__(self, parts: set[str]) -> None:
        self.parts = parts

    def scaled(self, layer: Any, given: Any) -> _Scaled | _Quotient | None:
        """What a layer computes of what it is given, if it is such a sum."""
        if type(layer) is layers.Multiply and len(given) == 2:
            for total, other in (given, given[::-1]):
                factors = self._factors(other)
                if factors is not None and (found := self._sum(total)) is not None:
                    x, first, end, factor = found
                    if _of_rows(other.shape, total.shape, x.shape[1:first]):
                        return self._masked(x, (first, end), factors, factor)
            for total, other in (given, given[::-1]):
                if (quotient := self._quotient(total, other)) is not None:
                    return quotient
            return None
        if isinstance(layer, Matmul):
            found = self._row_product(given)
        else:
            found = self._reduced(layer, given)
        if found is None:
            return None
        x, first, end, factor = found
        scaled = self._weighted(x, (first, end), factor)
        return scaled if scaled is not None else self._normalized(found)

    def _maker(self, tensor: Any) -> tuple[Any, list[Any]]:
        maker, read = maker_of(tensor)
        return (maker, read) if maker is not None and maker.name in self.parts else (None, [])

    def _sum(self, tensor: Any) -> tuple[Any, int, int, float] | None:
        """What a tensor is the sum of: the first axis, that behind the last, and a factor."""
        factor = 1.0
        while True:
            maker, read = self._maker(tensor)
            if isinstance(maker, layers.Rescaling):
                if np.size(maker.scale) != 1 or np.any(np.asarray(maker.offset)):
                    return None
                factor *= float(np.reshape(maker.scale, ()))
            elif isinstance(maker, Matmul):
                found = self._row_product(read)
                return None if found is None else (*found[:3], found[3] * factor)
            elif not _keeps(maker, read):
                found = self._reduced(maker, read[0]) if len(read) == 1 else None
                return None if found is None else (*found[:3], found[3] * factor)
            tensor = read[0]

    def _reduced(self, layer: Any, x: Any) -> tuple[Any, int, int, float] | None:
        """As `_sum`, for a mean over neighbouring axes."""
        axes = _mean_axes(layer, x)
        if axes is None or axes != [*range(axes[0], axes[-1] + 1)]:
            return None
        first, end = axes[0], axes[-1] + 1
        return x, first, end, 1.0 / math.prod(x.shape[first:end])

    def _row_product(self, given: Any) -> tuple[Any, int, int, float] | None:
        """As `_sum`, for the product of a row of weights with a matrix: of it, times the row."""
        row, matrix = given
        if len(row.shape) != len(matrix.shape) or row.shape[-2] != 1:
            return None
        if tuple(row.shape[1:-2]) != tuple(matrix.shape[1:-2]):
            return None
        leaves = self._leaves(row, is_row=True)
        return _Product(matrix, row, tuple(leaves)), len(row.shape) - 2, len(row.shape) - 1, 1.0

    def _normalized(self, total: tuple[Any, int, int, float]) -> _Quotient | None:
        """A weighted mean of masked steps whose weights are divided by their sum."""
        x, first = total[:2]
        for leaf in x.leaves if isinstance(x, _Product) else self._leaves(x):
            if not isinstance(x, _Product):
                if not _of_rows(leaf.shape, x.shape, x.shape[1:first]):
                    continue
            elif math.prod(leaf.shape[1:]) != 1:
                continue
            if (found := self._quotient(total, leaf, leaf)) is not None:
                return found
        return None

    def _quotient(self, total: Any, other: Any, divisor: Any = None) -> _Quotient | None:
        """A weighted mean of masked steps, of its upper sum and the inverse of the lower one.

        Args:
            total: the upper sum, or what `_sum` finds of it.
            other: the inverse.
            divisor: a factor of what is summed, which the inverse is to leave.
        """
        inverse: list[Any] = []
        maker, read = self._maker(other)
        while maker is not None and (_keeps(maker, read) or _is_function(maker)):
            if isinstance(maker, layers.Rescaling) and not np.any(np.asarray(maker.offset)):
                if (self._sum(other)) is not None:
                    break
            inverse.insert(0, maker)
            other = read[0]
            maker, read = self._maker(other)
        if not inverts([layer for layer in inverse if _is_function(layer)]):
            return None
        below = self._sum(other)
        above = total if isinstance(total, tuple) else self._sum(total)
        if below is None or above is None or isinstance(below[0], _Product):
            return None
        weights, first, end, factor = below
        x = above[0]
        same = above[1:3] == (first, end) and tuple(x.shape[:end]) == tuple(weights.shape[:end])
        steps = math.prod(weights.shape[first:end])
        if not same or math.prod(weights.shape[end:]) != 1 or steps < LEAST_SPREAD:
            return None
        masks = [
            numbers
            for leaf in self._leaves(weights)
            if (numbers := self._numbers(leaf)) is not None
            and numbers.is_mask
            and _droppable(numbers.index)
            and _of_steps(leaf.shape, weights.shape, first, end)
        ]
        if not masks and not self._is_given(weights):
            return None
        mask = masks[0] if masks else None
        sides = (above[3], factor)
        return _Quotient(x, weights, (first, end), mask, sides, inverse, other.shape[1:], divisor)

    def _is_given(self, tensor: Any) -> bool:
        """Whether a tensor is an input of the model, as a mask of floats is."""
        maker, read = maker_of(tensor)
        while _keeps(maker, read):
            tensor = read[0]
            maker, read = maker_of(tensor)
        return isinstance(maker, layers.InputLayer)

    def _masked(
        self, x: Any, axes: tuple[int, int], factors: _Numbers, factor: float
    ) -> _Scaled | None:
        """A sum, with the mask that its addends are multiplied by if there is one."""
        values, shown, others = self._split(x, axes)
        if values is None or others:
            return _Scaled(x, axes, None, factors, factor)
        return _Scaled(values, axes, shown, factors, factor)

    def _weighted(self, x: Any, axes: tuple[int, int], factor: float) -> _Scaled | None:
        """A sum of addends that a function of a count multiplies."""
        values, shown, others = self._split(x, axes)
        if values is None or len(others) != 1:
            return None
        return _Scaled(values, axes, shown, others[0], factor)

    def _split(self, x: Any, axes: tuple[int, int]) -> tuple[Any, _Numbers | None, list[_Numbers]]:
        """What a product is of: quantities, a mask of steps, and functions of a count.

        `None` for the quantities where it is of something else besides.
        """
        leaves = list(x.leaves) if isinstance(x, _Product) else self._leaves(x)
        shape, (first, end) = x.shape, axes
        values, masks, factors = [], [], []
        if isinstance(x, _Product):
            values.append(x.matrix)
        if len(leaves) == 1 and not values:
            return x, None, []
        for leaf in leaves:
            numbers = self._numbers(leaf)
            # A row of weights stands along the steps of the matrix.
            turned = (*leaf.shape[:-2], leaf.shape[-1], 1)
            if first == 1:
                turned = (None, math.prod(leaf.shape[1:]), 1)
            ending = turned if isinstance(x, _Product) else leaf.shape
            if numbers is not None and numbers.is_mask and _droppable(numbers.index):
                if _of_steps(ending, shape, first, end):
                    masks.append(numbers)
                    continue
            usable = None if numbers is None else _usable(numbers)
            if usable is not None and _of_rows(ending, shape, shape[1:first]):
                factors.append(usable)
                continue
            values.append(leaf)
        if len(values) != 1 or len(masks) > 1 or tuple(values[0].shape) != tuple(shape):
            return None, None, []
        return values[0], masks[0] if masks else None, factors

    def _leaves(self, tensor: Any, is_row: bool = False) -> list[Any]:
        """The factors of a product.

        Args:
            tensor: the product.
            is_row: whether it has one axis that counts, so that a Reshape changes none.
        """
        maker, read = self._maker(tensor)
        if _keeps(maker, read):
            shapes = sorted((tuple(tensor.shape), tuple(read[0].shape)), key=len)
            grown = (*shapes[0], *(1,) * (len(shapes[1]) - len(shapes[0])))
            inside = self._leaves(read[0], is_row) if is_row or grown == shapes[1] else []
            return inside if len(inside) > 1 else [tensor]
        if type(maker) is not layers.Multiply:
            return [tensor]
        return [leaf for one in read for leaf in self._leaves(one, is_row)]

    def _factors(self, tensor: Any) -> _Numbers | None:
        """A function of a count that is too coarse on one grid."""
        numbers = self._numbers(tensor)
        return None if numbers is None else _usable(numbers)

    def _numbers(self, tensor: Any) -> _Numbers | None:
        """The integers that quantities are a function of, and the function."""
        maker, read = self._maker(tensor)
        if type(maker) is Select:
            return self._chosen(*read)
        if isinstance(maker, ConstantRows):
            table = np.asarray(maker.embeddings, np.float64)
            return _Numbers(read[0], table[:, 0]) if table.shape[1] == 1 else None
        if maker is None or len(read) != 1:
            return None
        inside = self._numbers(read[0])
        if inside is None or _keeps(maker, read):
            return inside
        if _is_function(maker):
            values = np.asarray(maker(inside.values[:, None].astype(np.float32)), np.float64)[:, 0]
            if inside.summed is None and values.size == 2 and values[1] == 0.0 != values[0]:
                return _Numbers(inside.index, values[::-1], None, not inside.negated)
            return dataclasses.replace(inside, values=values)
        axes = _mean_axes(maker, read[0])
        if axes is None or inside.summed is not None or inside.values.size != 2:
            return None
        shape = tuple(read[0].shape)
        steps = math.prod(shape[axis] for axis in axes)
        share = np.arange(steps + 1) / steps
        values = inside.values[0] * (1.0 - share) + inside.values[1] * share
        return _Numbers(inside.index, values, (shape[1:], tuple(axes)), inside.negated)

    def _chosen(self, condition: Any, a: Any, b: Any) -> _Numbers | None:
        """A choice by a comparison of numbers of one count, as in `where(n > 0, n, 1)`."""
        maker, read = self._maker(condition)
        if not isinstance(maker, IndexOperation) or len(read) != 1:
            return None
        compared = self._numbers(read[0])
        if compared is None or any(np.size(option) != 1 for option in maker.options.values()):
            return None
        chosen = []
        for one in (a, b):
            constant, _ = self._maker(one)
            if isinstance(constant, Learned) and not constant.trainable:
                numbers = np.unique(np.asarray(constant.value))
                if numbers.size > 1:
                    return None
                chosen.append(numbers)
                continue
            part = self._numbers(one)
            if part is None or not part.is_of_the_same(compared) or part.summed != compared.summed:
                return None
            chosen.append(part.values)
        where = np.asarray(maker(ops.convert_to_tensor(compared.values.astype(np.float32))))
        return dataclasses.replace(compared, values=np.where(where.astype(bool), *chosen))


@dataclasses.dataclass(frozen=True)
class _Product:
    """A matrix, each row of which is multiplied by a number of `row`, a product of `leaves`."""

    matrix: Any
    row: Any
    leaves: tuple[Any, ...]

    @property
    def shape(self) -> Any:
        """That of the matrix."""
        return self.matrix.shape


def _usable(numbers: _Numbers) -> _Numbers | None:
    """The function, with zero where it guards a division by zero; `None` if it needs no groups."""
    values = np.where(np.isfinite(numbers.values), numbers.values, np.inf)
    if values.size < 3:
        return None
    if values[0] > _GUARD * values[1]:
        values[0] = 0.0
    shown = values[1:] if values[0] == 0.0 else values
    if shown[-1] <= 0.0 or not np.all(np.isfinite(shown)) or np.any(np.diff(shown) > 0.0):
        return None
    return (
        dataclasses.replace(numbers, values=values)
        if shown[0] >= LEAST_SPREAD * shown[-1]
        else None
    )


def _mean_axes(layer: Any, x: Any) -> list[int] | None:
    """The axes of which a layer makes the mean."""
    if isinstance(layer, Reduce):
        return list(layer.axes) if layer.kind is ReduceKind.MEAN and layer.axes else None
    if isinstance(layer, _POOLS) and layer.data_format == "channels_last":
        return [*range(1, len(x.shape) - 1)]
    return None


def _keeps(layer: Any, read: list[Any]) -> bool:
    """Whether a layer hands on all numbers in their order."""
    if isinstance(layer, Slice):  # As of `x[..., None]`.
        shape = tuple(read[0].shape)
        return tuple(layer.compute_output_shape(shape)) == shape
    return isinstance(layer, _SAME)


def _is_function(layer: Any) -> bool:
    """Whether a layer computes each number from one, with no weights."""
    return computes_each_number(layer) or isinstance(layer, ReciprocalSquareRoot)


def _of_rows(shape: Any, whole: Any, rows: Any) -> bool:
    """Whether something of `shape` has one number for each row of `whole`."""
    if not rows:
        return math.prod(shape[1:]) == 1
    behind = len(whole) - 1 - len(rows)
    return tuple(shape[1:]) == (*rows, *(1,) * behind)


def _of_steps(shape: Any, whole: Any, first: int, end: int) -> bool:
    """Whether something of `shape` has one number for each step of `whole`."""
    steps = tuple(whole[1:end])
    if first == 1 and end == 2 and len(shape) != len(whole):
        return math.prod(shape[1:]) == steps[0]
    return tuple(shape[1:]) == (*steps, *(1,) * (len(whole) - end))


def _droppable(index: Any) -> bool:
    """Whether the graph tells that integers are zeros and ones.

    Calibration checks those of an input where a table reads them, so the table stays.
    """
    maker, read = maker_of(index)
    while _keeps(maker, read):
        index = read[0]
        maker, read = maker_of(index)
    return index.dtype == "bool" or isinstance(maker, IndexOperation)


def _reshaped(x: Any, shape: Any, name: str) -> Any:
    return x if tuple(x.shape[1:]) == tuple(shape) else layers.Reshape(tuple(shape), name=name)(x)
