"""Transpositions move on through what commutes with them, until they meet their opposites.

A layer with the channels first became one with the channels last between two transpositions
(`kqat.rewrites.layers.channels_first`). What stands between two such layers computes number by
number, or along axes that move with the others: sums, activations, paddings, means. It computes on
the transposed value as well. So a transposition is carried along, towards the outputs: it goes
where it meets its opposite, and is computed where something reads the value in its own order.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, Part, Ref, clone, duplicate, fill, rebuild, trace, unique_name
from kqat.parts import (
    ChannelAffine,
    Hide,
    IndexKind,
    IndexOperation,
    Learned,
    LearnedPower,
    Padding,
    ReciprocalSquareRoot,
    Reduce,
    Remainder,
    Select,
    Slice,
    SquaredDifference,
    StopGradient,
    Take,
    WithConstant,
    ZeroPadding,
    computes_each_number,
)
from kqat.planning.expansion import compute_alike

Configs = Mapping[str, QuantizeConfig | None]
# Of axes, the batch among them: axis `i` of a value is axis `order[i]` of what it is made of.
Order = tuple[int, ...]
# What a layer becomes that reads transposed values: the order of its output, and its maker.
Moved = tuple[Order, Callable[[], Callable[..., Any]]]


def carry_transpositions(
    graph: Graph, origins: Mapping[str, str], configs: Configs, name: str
) -> tuple[Graph, dict[str, str]]:
    """`graph` and `origins` with transpositions carried along, where that leaves fewer of them.

    Or as many, where that lets a layer with weights meet what may be computed inside its kernel.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name; those left float stay as they are.
        name: of the model.
    """
    movable = {part for part, user in origins.items() if configs.get(user)}
    orders = {_order_of(node) for node in graph.nodes if _is_permute(node, movable)}
    if not orders:
        return graph, dict(origins)
    before = _Carried(graph, movable, moves=False)
    # A mean along the last axis is best where it is, if that costs no transposition.
    ways = [_Carried(graph, movable, keeps_rows=keeps) for keeps in (True, False)]
    best = min(ways, key=lambda way: way.cost)
    # What several branches of an input need transposed is transposed once, where it comes in.
    turned: dict[Ref, Order] = {}
    for ref in graph.inputs:
        for order in sorted(order for order in orders if len(order) == len(ref.shape)):
            tried = _Carried(graph, movable, {**turned, ref: order}, keeps_rows=best.keeps_rows)
            if tried.cost < best.cost:
                best = tried
        turned = best.turned
    if (best.cost, not best.joins) >= (before.cost, True):
        return graph, dict(origins)
    built, parts = best.rebuilt(origins, name)
    return (built, parts) if compute_alike(graph, built) else (graph, dict(origins))


def _is_permute(node: Node, movable: set[str]) -> bool:
    return type(node.layer) is layers.Permute and node.layer.name in movable


def _order_of(node: Node) -> Order:
    return (0, *node.layer.dims)


def _after(first: Order, second: Order) -> Order:
    """The order of a value transposed by `first` and then by `second`."""
    return tuple(first[axis] for axis in second)


def _opposite(order: Order) -> Order:
    return tuple(order.index(axis) for axis in range(len(order)))


def _plain(rank: int) -> Order:
    return tuple(range(rank))


def _transposed(shape: Sequence[Any], order: Order) -> tuple[Any, ...]:
    return tuple(shape[axis] for axis in order)


def _is_reshape(shape: Sequence[Any], order: Order) -> bool:
    """Whether a transposition moves no number, as only axes of size 1 move past others."""
    long = [axis for axis in order if shape[axis] != 1]
    return long == sorted(long)


@dataclasses.dataclass(frozen=True)
class _Step:
    """How a node is called: its inputs in these orders, by what `make` makes (or as it is)."""

    orders: Mapping[Ref, Order]
    make: Callable[[], Callable[..., Any]] | None


class _Carried:
    """A graph in which each value is held in some order of its axes, as it was computed.

    Args:
        graph: of simple layers.
        movable: names of the layers that may change.
        turned: inputs that are transposed where they come in.
        keeps_rows: whether what reduces the last axis reads its values in their own order.
        moves: whether transpositions are carried; else the graph is as it is, for its cost.

    Attributes:
        cost: how many transpositions are computed, and of how many numbers.
        joins: whether something stands behind a layer with weights that a transposition parted
            from it before: it may be computed inside its kernel.
    """

    def __init__(
        self,
        graph: Graph,
        movable: set[str],
        turned: Mapping[Ref, Order] | None = None,
        keeps_rows: bool = False,
        moves: bool = True,
    ) -> None:
        self.movable, self.turned, self.keeps_rows = movable, dict(turned or {}), keeps_rows
        self.graph = _with_ends(graph)
        self.calls, self.producers = self.graph.calls(), self.graph.producers()
        # What holds the numbers of a value, and the order in which it has them.
        self.held: dict[Ref, tuple[Ref, Order]] = {}
        self.made: set[tuple[Ref, Order]] = set()
        self.names: dict[tuple[Ref, Order], str] = {}
        self.inputs: dict[Ref, tuple[Ref, Order]] = {}
        self.steps: dict[Node, _Step] = {}
        self.cost, self.joins = (0, 0), False
        for ref in self.graph.inputs:
            self.held[ref] = ref, _plain(len(ref.shape))
            if ref in self.turned:
                order = self.turned[ref]
                self._compute(ref, order)
                inside = Ref(_transposed(ref.shape, order), ref.dtype)
                self.inputs[inside] = ref, order
                self.held[ref] = inside, _opposite(order)
        for node in self.graph.nodes:
            self._place(node, moves)

    def _place(self, node: Node, moves: bool) -> None:
        if _is_permute(node, self.movable):
            root, order = self.held[node.inputs[0]]
            found = root, _after(order, _order_of(node))
            self.names.setdefault(found, node.layer.name)
            if moves:
                self.held[node.outputs[0]] = found
                return
            self._compute(*found)
        moved = self._moved(node) if moves else None
        plain = {ref: _plain(len(ref.shape)) for ref in (*node.inputs, *node.outputs)}
        if moved is None:
            self.steps[node] = _Step({ref: plain[ref] for ref in node.inputs}, None)
            self.held |= {ref: (ref, plain[ref]) for ref in node.outputs}
        else:
            target, (out, make) = moved
            self.steps[node] = _Step(dict.fromkeys(node.inputs, target), make)
            made = node.outputs[0]
            self.held[made] = Ref(_transposed(made.shape, _opposite(out)), made.dtype), out
            moves_only = isinstance(node.layer, layers.Reshape | layers.Flatten)
            self.joins |= not moves_only and any(map(self._joins, node.inputs))
        for ref, order in self.steps[node].orders.items():
            self._compute(*self._needed(ref, order))

    def _joins(self, ref: Ref) -> bool:
        """Whether transpositions part a value from the layer with weights that computes it."""
        parted, held = self.producers.get(ref), self.producers.get(self.held[ref][0])
        return parted is not held and held is not None and held.has_weights

    def _needed(self, ref: Ref, order: Order) -> tuple[Ref, Order]:
        """What gives the value of which `ref` is the transposition by `order`."""
        root, held = self.held[ref]
        return root, _after(held, _opposite(order))

    def _compute(self, root: Ref, order: Order) -> None:
        if order == _plain(len(order)) or (root, order) in self.made:
            return
        self.made.add((root, order))
        if not _is_reshape(root.shape, order):
            count, numbers = self.cost
            self.cost = count + 1, numbers + math.prod(int(n or 1) for n in root.shape)

    def _moved(self, node: Node) -> tuple[Order, Moved] | None:
        """In which order a node reads its inputs, if that is not their own, and what it becomes."""
        layer = node.layer
        rule = _COMMUTES.get(type(layer))
        found = [self.held[ref][1] for ref in node.inputs]
        ranks = {len(order) for order in found}
        if len(ranks) != 1 or layer is None or layer.name not in self.movable or node.masks:
            return None
        if len(node.outputs) != 1 or node.kwargs.keys() - {"training"}:
            return None
        if any(isinstance(self._maker(ref), Learned) for ref in node.inputs):
            return None  # Who reads it holds it as a constant.
        plain = _plain(ranks.pop())
        wanted = sorted(set(found) - {plain}, key=lambda order: self._price(node.inputs, order))
        for target in wanted:
            if self._price(node.inputs, target) > self._price(node.inputs, plain):
                continue
            if rule is not None:
                moved = rule(self, node, target)
            elif _of_each_number(layer):
                moved = target, lambda: duplicate(layer)
            else:
                moved = None
            if moved is not None:
                return target, moved
        return None

    def _maker(self, ref: Ref) -> Any:
        return self.producers[ref].layer if ref in self.producers else None

    def is_shared(self, node: Node) -> bool:
        """Whether other calls read the weights of a node's layer."""
        return node.has_weights and self.calls[id(node.layer)] > 1

    def _price(self, refs: Sequence[Ref], order: Order) -> int:
        """How many numbers are to be transposed for values to be at hand in that order."""
        total = 0
        for root, needed in {self._needed(ref, order) for ref in refs}:
            at_hand = (root, needed) in self.made or needed == _plain(len(needed))
            if not at_hand and not _is_reshape(root.shape, needed):
                total += math.prod(int(n or 1) for n in root.shape)
        return total

    def rebuilt(self, origins: Mapping[str, str], name: str) -> tuple[Graph, dict[str, str]]:
        """The graph, and for each of its layers' names the name of the user's layer."""
        values: dict[tuple[Ref, Order], Any] = {}
        taken = {*self.graph.input_names, *origins, *self.names.values()}
        taken |= {node.name for node in self.graph.nodes}
        parts = dict(origins)
        left, inputs = dict(self.names), set(self.graph.inputs)

        def value(root: Ref, order: Order, reader: Node) -> Any:
            if (root, order) not in values:
                if order == _plain(len(order)):
                    values[root, order] = value(*self.inputs[root], reader)
                else:
                    x = value(root, _plain(len(order)), reader)
                    values[root, order] = turn(x, root, order, reader)
            return values[root, order]

        def turn(x: Any, root: Ref, order: Order, reader: Node) -> Any:
            maker = next((n for n in self.steps if self.held[n.outputs[0]][0] is root), reader)
            label = maker.layer.name if maker.layer is not None else name
            own = left.pop((root, order), None) or unique_name(f"{label}_transposed", taken)
            parts.setdefault(own, origins.get(label, own))
            if _is_reshape(root.shape, order):
                return layers.Reshape(_transposed(root.shape, order)[1:], name=own)(x)
            return layers.Permute(order[1:], name=own)(x)

        def call(node: Node, *args: Any, **kwargs: Any) -> Any:
            refs = keras.tree.flatten((node.args, node.kwargs))
            for ref, given in zip(refs, keras.tree.flatten((args, kwargs)), strict=True):
                if isinstance(ref, Ref) and ref in inputs:
                    values.setdefault((ref, _plain(len(ref.shape))), given)
            if node not in self.steps:  # A transposition that is carried on.
                return args[0]
            step = self.steps[node]
            args, kwargs = fill(
                (node.args, node.kwargs),
                lambda ref: value(*self._needed(ref, step.orders[ref]), node),
            )
            if node.layer is None:
                return args[0]
            output = (step.make() if step.make else node.layer)(*args, **kwargs)
            for ref, made in zip(node.outputs, keras.tree.flatten(output), strict=True):
                root, order = self.held[ref]
                values[root, _plain(len(order))] = made
            return output

        built = trace(rebuild(self.graph, call, name))
        built = dataclasses.replace(built, output_names=self.graph.output_names)
        kept = {node.layer.name for node in built.nodes}
        return built, {part: user for part, user in parts.items() if part in kept}


def _with_ends(graph: Graph) -> Graph:
    """`graph` with a node without a layer before each output and loss: they read in order."""
    ends: dict[Ref, Node] = {}
    for ref in (*graph.outputs, *(ref for loss in graph.losses for ref in loss.inputs)):
        if ref not in ends:
            name = f"end {len(ends)}"
            ends[ref] = Node(name, None, (ref,), {}, (Ref(ref.shape, ref.dtype),))
    return dataclasses.replace(
        graph,
        nodes=(*graph.nodes, *ends.values()),
        output_struct=fill(graph.output_struct, lambda ref: ends[ref].outputs[0]),
        losses=tuple(
            dataclasses.replace(loss, inputs=tuple(ends[ref].outputs[0] for ref in loss.inputs))
            for loss in graph.losses
        ),
    )


# Layers that do nothing in inference, and to each number by itself in training.
_DROPPING = (
    layers.Identity,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.ActivityRegularization,
    StopGradient,
)


def _of_each_number(layer: Any) -> bool:
    """Whether a layer of one input computes each of its numbers by itself."""
    if type(layer) in (layers.Dropout, layers.AlphaDropout):
        return layer.noise_shape is None
    if type(layer) in (*_DROPPING, layers.LeakyReLU, layers.ELU, ReciprocalSquareRoot):
        return True
    return isinstance(layer, layers.Layer) and computes_each_number(layer)


def _merged(carried: _Carried, node: Node, order: Order) -> Moved | None:
    """Of values of one shape; Keras adds what it takes for a bias otherwise than it broadcasts."""
    if isinstance(node.layer, layers.Add) and len({ref.shape for ref in node.inputs}) > 1:
        return None
    return order, lambda: duplicate(node.layer)


def _with_one_number(carried: _Carried, node: Node, order: Order) -> Moved | None:
    """Of a layer that reads one weight for all numbers."""
    return order, lambda: node.layer


def _of_rows(carried: _Carried, node: Node, order: Order) -> Moved | None:
    """Of a layer that works along the last axis, where that stays the last."""
    return (order, lambda: node.layer) if order[-1] == len(order) - 1 else None


def _spatial_dropout(carried: _Carried, node: Node, order: Order) -> Moved | None:
    """Of channels that are last: what else is dropped with a number moves with it."""
    layer = node.layer
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    alike: list[int | None] = [None, *(1 for _ in order[2:]), None]
    shape = tuple(alike[axis] for axis in _opposite(order))
    options = {"seed": layer.seed, "name": layer.name, "dtype": layer.dtype_policy}
    return order, lambda: layers.Dropout(layer.rate, noise_shape=shape, **options)


def _activation(carried: _Carried, node: Node, order: Order) -> Moved | None:
    if not computes_each_number(node.layer):
        return _of_rows(carried, node, order)
    return order, lambda: duplicate(node.layer)


def _concatenated(carried: _Carried, node: Node, order: Order) -> Moved | None:
    axis = order[node.layer.axis % len(order)]
    return order, lambda: clone(node.layer, axis=axis)


def _without(order: Order, gone: set[int]) -> Order:
    """The order of a value without axes, which are those of what it is made of."""
    left = [axis for axis in order if axis not in gone]
    return tuple(sorted(left).index(axis) for axis in left)


def _reduced(carried: _Carried, node: Node, order: Order) -> Moved | None:
    axes = sorted(order[axis % len(order)] for axis in node.layer.axes)
    last = len(order) - 1
    rows = [axis % len(order) for axis in node.layer.axes] == [last]
    if rows and carried.keeps_rows and axes != [last]:
        return None
    out = order if node.layer.keepdims else _without(order, set(axes))
    return out, lambda: clone(node.layer, axes=axes)


def _index_operation(carried: _Carried, node: Node, order: Order) -> Moved | None:
    """The place of the largest or the smallest number along an axis."""
    options = dict(node.layer.options)
    if node.layer.kind not in (IndexKind.ARGMAX, IndexKind.ARGMIN) or options.get("axis") is None:
        return None
    options["axis"] = order[options["axis"] % len(order)]
    out = order if options.get("keepdims") else _without(order, {options["axis"]})
    return out, lambda: clone(node.layer, options=options)


def _at(order: Order, each: Sequence[Any]) -> list[Any]:
    """What is given for each axis behind the batch, for the axes of which they are made."""
    return [each[axis - 1] for axis in _opposite(order)[1:]]


def _padded(carried: _Carried, node: Node, order: Order) -> Moved | None:
    widths = _at(order, node.layer.widths)
    return order, lambda: clone(node.layer, widths=widths)


def _sliced(carried: _Carried, node: Node, order: Order) -> Moved | None:
    layer = node.layer
    changes: dict[str, Any] = {
        key: _at(order, getattr(layer, key)) for key in ("begin", "end", "steps")
    }
    return order, lambda: clone(layer, **changes)


def _taken(carried: _Carried, node: Node, order: Order) -> Moved | None:
    return order, lambda: clone(node.layer, axis=order[node.layer.axis % len(order)])


def _prelu(carried: _Carried, node: Node, order: Order) -> Moved | None:
    layer = node.layer
    if carried.is_shared(node):
        return None
    shared = [order[axis] for axis in layer.shared_axes or ()]
    slopes = np.asarray(layer.alpha)
    slopes = np.transpose(slopes[None], _opposite(order))[0]
    return order, lambda: Part(clone(layer, shared_axes=sorted(shared) or None), [slopes])


def _with_constant(carried: _Carried, node: Node, order: Order) -> Moved | None:
    layer = node.layer
    value = np.asarray(layer.value)
    if value.size == 1:
        return order, lambda: layer
    if carried.is_shared(node) or value.ndim > len(order):
        return None
    whole = value.reshape((1,) * (len(order) - value.ndim) + value.shape)
    moved = np.transpose(whole, _opposite(order))
    while moved.ndim > 1 and moved.shape[0] == 1:
        moved = moved[0]
    return order, lambda: Part(clone(layer, shape=list(moved.shape)), [moved])


def _reshaped(carried: _Carried, node: Node, order: Order) -> Moved | None:
    """Of runs of axes that lie side by side before and behind, each for itself."""
    read, out = (
        tuple(int(n or 0) for n in ref.shape[1:]) for ref in (node.inputs[0], node.outputs[0])
    )
    name = node.layer.name
    held = tuple(carried.held[node.inputs[0]][0].shape)
    if _is_reshape(held, order):
        return _plain(len(out) + 1), lambda: layers.Reshape(out, name=name)
    runs = _runs(read, out)
    if runs is None:
        return None
    # Where each run lies in what the value is made of, axes of which are counted from 0 here.
    places = [[order[axis + 1] - 1 for axis in run] for run, _ in runs]
    for place in places:
        if place != list(range(place[0], place[0] + len(place))):
            return None
    by_place = sorted(range(len(runs)), key=lambda i: places[i][0])
    axes = [axis for i in by_place for axis in runs[i][1]]
    shape = [out[axis] for axis in axes]
    moved = (0, *(axes.index(axis) + 1 for axis in range(len(out))))
    return moved, lambda: layers.Reshape(shape, name=name)


def _runs(read: Sequence[int], out: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Runs of axes of as many numbers before and behind a reshape, the shortest there are."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(read) and j < len(out):
        first, second = [i], [j]
        a, b, i, j = read[i], out[j], i + 1, j + 1
        while a != b:
            if a < b and i < len(read):
                first, a, i = [*first, i], a * read[i], i + 1
            elif b < a and j < len(out):
                second, b, j = [*second, j], b * out[j], j + 1
            else:
                return None
        runs.append((first, second))
    if not runs:
        return None
    # Axes of size 1 are left.
    before, behind = runs.pop()
    return [*runs, ([*before, *range(i, len(read))], [*behind, *range(j, len(out))])]


_COMMUTES: dict[type, Callable[[_Carried, Node, Order], Moved | None]] = {
    **dict.fromkeys(
        (
            layers.Add, layers.Subtract, layers.Multiply, layers.Maximum, layers.Minimum,
            SquaredDifference, Select, Hide,
        ),
        _merged,
    ),
    LearnedPower: _with_one_number,
    layers.Concatenate: _concatenated,
    Reduce: _reduced,
    Remainder: _reduced,
    IndexOperation: _index_operation,
    ZeroPadding: _padded,
    Padding: _padded,
    Slice: _sliced,
    Take: _taken,
    layers.PReLU: _prelu,
    WithConstant: _with_constant,
    layers.Reshape: _reshaped,
    layers.Flatten: _reshaped,
    layers.Activation: _activation,
    **dict.fromkeys(
        (layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
        _spatial_dropout,
    ),
    **dict.fromkeys(
        (
            layers.Softmax, layers.UnitNormalization, layers.BatchNormalization,
            layers.Normalization, ChannelAffine,
        ),
        _of_rows,
    ),
}  # fmt: skip
