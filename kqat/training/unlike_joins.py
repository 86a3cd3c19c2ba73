"""Joins of values of unlike size, which one scale would drown: taken apart, or scaled alike.

CONCATENATION has one scale for all its members. Beside boxes in pixels every score is 0 or one
step. Where such a join ends the model, its members become outputs of their own. Inside, the small
members are multiplied by a power of two before they meet, and the weights of the layers that read
the join are divided by it, so that the model computes the same.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.graph import (
    AddedLoss,
    Graph,
    GraphLoss,
    Node,
    Part,
    Ref,
    clone,
    duplicate,
    is_of_users,
    rebuild,
    unique_name,
)
from kqat.training.calibration import CalibrationWarning, batches, run_batches
from kqat.training.range_checks import LOST_BITS

# Layers whose kernel takes up a factor of each input channel, and the kernel's axis of these.
_TAKES_FACTORS: Mapping[type, tuple[str, int]] = {
    layers.Dense: ("kernel", -2),
    layers.Conv1D: ("kernel", -2),
    layers.Conv2D: ("kernel", -2),
    layers.Conv3D: ("kernel", -2),
    layers.DepthwiseConv1D: ("kernel", -2),
    layers.DepthwiseConv2D: ("kernel", -2),
    layers.SeparableConv1D: ("depthwise_kernel", -2),
    layers.SeparableConv2D: ("depthwise_kernel", -2),
}


def with_unlike_members_apart(
    graph: Graph, data: Any, name: str, stacklevel: int = 2
) -> keras.Model:
    """A copy of a float model in which no Concatenate joins values of unlike size.

    An output that was such a join becomes several, in its place: those of its members that are
    alike stay joined.

    Args:
        graph: of the model.
        data: as for `kqat.calibrate`.
        name: of the copy.
        stacklevel: of warnings, counted from here.

    Raises:
        CalibrationError: if the data are empty, misshapen or not finite.

    Warns:
        CalibrationWarning: of a join whose readers cannot take a factor up.
    """
    parts = _parts_of_joins(graph, _widths(graph, data))
    graph = _with_penalties_beside(graph, parts)
    graph, parts = _outputs_apart(graph, parts)
    readers, calls = graph.consumers(), graph.calls()
    factors: dict[Node, np.ndarray] = {}
    scaled: dict[Node, Sequence[float]] = {}
    for join, found in parts.items():
        stuck = [n for n in readers[join.outputs[0]] if not _takes_factors(n, calls, join)]
        if stuck or join.outputs[0] in graph.outputs:
            reader = stuck[0].name if stuck else "an output"
            warnings.warn(
                f"'{join.name}' joins values of unlike size, of which some lose more than "
                f"{LOST_BITS:.0f} bits; '{reader}' reads them and has no kernel to take a factor "
                "up. Scale the members alike before they meet, or give them 'int16x8'.",
                CalibrationWarning,
                stacklevel=stacklevel + 1,
            )
            continue
        scaled[join] = found.factors
        each = np.repeat(found.factors, [ref.shape[-1] or 1 for ref in join.inputs])
        factors |= dict.fromkeys(readers[join.outputs[0]], each)
    members = {join.outputs[0]: join.inputs for join in scaled}
    axes = {join.outputs[0]: join.layer.axis for join in scaled}
    losses = tuple(_of_members(one, members, axes) for one in graph.losses)
    graph = dataclasses.replace(graph, losses=losses)
    return rebuild(
        graph, _Copies(scaled, factors).call, name, graph.output_names, graph.output_masks
    )


@dataclasses.dataclass(frozen=True)
class OutputPart:
    """What an output of a model without unlike joins was of an output of the model before.

    Attributes:
        output: which output, counted from 0.
        axis: along which it was joined.
        start, stop: where, along that axis; all of it by default.
    """

    output: int
    axis: int = -1
    start: int = 0
    stop: int | None = None

    def of(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """This part of the outputs of the model before."""
        whole = outputs[self.output]
        place = [slice(None)] * whole.ndim
        place[self.axis] = slice(self.start, self.stop)
        return whole[tuple(place)]


def output_parts(graph: Graph, data: Any) -> tuple[OutputPart, ...]:
    """For each output that `with_unlike_members_apart` makes, what it was before.

    Args:
        graph: of the float model.
        data: as for `with_unlike_members_apart`.
    """
    split: dict[Ref, list[OutputPart]] = {}
    for join, found in _parts_of_joins(graph, _widths(graph, data)).items():
        if not _is_parted(graph, join, found):
            continue
        ref, axis = join.outputs[0], join.layer.axis
        ends = np.cumsum([_joined(run, axis)[axis] or 0 for run in found.runs]).tolist()
        places = zip([0, *ends[:-1]], ends, strict=True)
        split[ref] = [OutputPart(graph.outputs.index(ref), axis, *place) for place in places]
    leaves = keras.tree.flatten(_spliced(graph.output_struct, split))
    return tuple(
        leaf if isinstance(leaf, OutputPart) else OutputPart(graph.outputs.index(leaf))
        for leaf in leaves
    )


@dataclasses.dataclass(frozen=True)
class _Join:
    """The members of a join, in runs of alike ones, and the factor for each member."""

    runs: tuple[tuple[Ref, ...], ...]
    factors: tuple[float, ...]


def _widths(graph: Graph, data: Any) -> dict[Ref, float]:
    """How far the members of all joins spread from 0, over the data."""
    members = {ref for node in graph.nodes if _is_join(node) for ref in node.inputs}
    widths = dict.fromkeys(members, 0.0)

    def seen(ref: Ref, value: Any) -> None:
        if ref in members and not ref.holds_indexes:
            array = np.asarray(keras.ops.convert_to_numpy(value), np.float32)
            spread = max(float(array.max()), 0.0) - min(float(array.min()), 0.0)
            widths[ref] = max(widths[ref], spread)

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        values = [v for v in keras.tree.flatten((args, kwargs)) if keras.ops.is_tensor(v)]
        for ref, value in zip(node.inputs, values, strict=False) if _is_join(node) else ():
            seen(ref, value)
        return node.layer(*args, **kwargs)

    run_batches(graph, batches(data, graph), call)
    return widths


def _is_join(node: Node) -> bool:
    kind = type(node.layer).__name__
    stock = kind == "Concatenate" and not is_of_users(node.layer)
    return stock and len(node.inputs) > 1 and not node.outputs[0].holds_indexes


def _parts_of_joins(graph: Graph, widths: Mapping[Ref, float]) -> dict[Node, _Join]:
    """The joins of unlike members."""
    found = {}
    for node in filter(_is_join, graph.nodes):
        sizes = [widths[ref] for ref in node.inputs]
        most = max(sizes)
        if all(size == 0.0 or most < size * 2.0**LOST_BITS for size in sizes):
            continue
        runs: list[list[Ref]] = []
        for ref in node.inputs:
            run = [*runs[-1], ref] if runs else [ref]
            spread = [widths[r] for r in run if widths[r]]
            alike = bool(runs) and (not spread or max(spread) < min(spread) * 2.0**LOST_BITS)
            runs[-1:] = [run] if alike else [*runs[-1:], [ref]]
        factors = [2.0 ** math.floor(math.log2(most / s)) if s else 1.0 for s in sizes]
        found[node] = _Join(tuple(map(tuple, runs)), tuple(factors))
    return found


def _is_parted(graph: Graph, join: Node, found: _Join) -> bool:
    """Whether a join is an output and nothing else, so that outputs can stand in its place."""
    ref, makers = join.outputs[0], {*graph.producers()}
    ends = not graph.consumers()[ref] and graph.outputs.count(ref) == 1
    return ends and set(found.runs[0]) <= makers


def _outputs_apart(graph: Graph, parts: Mapping[Node, _Join]) -> tuple[Graph, dict[Node, _Join]]:
    """`graph` with outputs in place of the joins that end it, and the other joins."""
    producers = graph.producers()
    taken = {*graph.input_names, *graph.output_names, *(node.name for node in graph.nodes)}
    nodes, split = list(graph.nodes), dict[Ref, list[Ref]]()
    names: dict[Ref, list[str]] = {}
    axes = {join.outputs[0]: join.layer.axis for join in parts}
    for join, found in parts.items():
        ref = join.outputs[0]
        if not _is_parted(graph, join, found):
            continue
        split[ref], names[ref] = [], []
        at = nodes.index(join)
        del nodes[at]
        for run in found.runs:
            if len(run) == 1 and run[0] in producers and run[0] not in graph.outputs:
                maker = producers[run[0]].name
                own = maker if maker not in graph.output_names else unique_name(maker, taken)
                split[ref].append(run[0])
            else:
                own = unique_name(f"{join.name}_{len(names[ref])}", taken)
                axis = join.layer.axis
                part = Ref(_joined(run, axis), ref.dtype)
                layer = layers.Concatenate(axis=axis, name=own)
                nodes.insert(at, Node(own, layer, (list(run),), {}, (part,)))
                split[ref].append(part)
            names[ref].append(own)
    rest = {join: found for join, found in parts.items() if join.outputs[0] not in split}
    if not split:
        return graph, rest
    structure = _spliced(graph.output_struct, split)
    # Keras lists the outputs of a dict by their keys, of which there are others now.
    given = [*zip(graph.outputs, graph.output_names, graph.output_masks, strict=True)]
    of_part = {
        part: (name, mask)
        for ref, _, mask in given
        for part, name in zip(split.get(ref, ()), names.get(ref, ()), strict=True)
    }
    others = iter([(name, mask) for ref, name, mask in given if ref not in split])
    ends = [of_part.get(ref) or next(others) for ref in keras.tree.flatten(structure)]
    return Graph(
        nodes=tuple(nodes),
        input_struct=graph.input_struct,
        output_struct=structure,
        input_names=graph.input_names,
        output_names=tuple(name for name, _ in ends),
        output_masks=tuple(mask for _, mask in ends),
        losses=tuple(_of_members(one, split, axes) for one in graph.losses),
    ), rest


def _with_penalties_beside(graph: Graph, parts: Mapping[Node, _Join]) -> Graph:
    """`graph` with the penalties of joins among its losses: the joins will make other outputs."""
    penalties = {join: getattr(join.layer, "activity_regularizer", None) for join in parts}
    losses = tuple(
        GraphLoss(AddedLoss(activity_penalty=penalty, label=join.name), join.outputs)
        for join, penalty in penalties.items()
        if penalty is not None
    )
    return dataclasses.replace(graph, losses=(*graph.losses, *losses))


def _of_members(
    loss: GraphLoss, members: Mapping[Ref, Sequence[Ref]], axes: Mapping[Ref, int]
) -> GraphLoss:
    """A loss that reads the members of joins in their place, as these are taken apart or scaled."""
    for ref, parts in members.items():
        if ref in loss.inputs:
            wholes = [_input_of(one) for one in loss.inputs]
            apart = [
                [_input_of(part) for part in parts] if one == ref else None for one in loss.inputs
            ]
            layer = loss.layer.of_members(wholes, apart, axes[ref])
            read = [p for one in loss.inputs for p in (parts if one == ref else [one])]
            loss = GraphLoss(layer, tuple(read))
    return loss


def _input_of(ref: Ref) -> Any:
    return keras.Input(batch_shape=ref.shape, dtype=ref.dtype)


def _joined(run: Sequence[Ref], axis: int) -> tuple[int | None, ...]:
    shape = list(run[0].shape)
    shape[axis] = sum(ref.shape[axis] or 0 for ref in run)
    return tuple(shape)


def _spliced(structure: Any, split: Mapping[Ref, Sequence[Any]]) -> Any:
    """An output structure in which several stand where one stood."""
    if isinstance(structure, Ref):
        return list(split[structure]) if structure in split else structure
    if isinstance(structure, dict):
        # Keras lists the outputs of a dict by their sorted keys.
        found: dict[str, Any] = {}
        for key, value in structure.items():
            if isinstance(value, Ref) and value in split:
                found |= {f"{key}_{index}": part for index, part in enumerate(split[value])}
            else:
                found[key] = _spliced(value, split)
        return found
    flat: list[Any] = []
    for value in structure:
        new = _spliced(value, split)
        flat += new if isinstance(value, Ref) and value in split else [new]
    return flat


def _takes_factors(node: Node, calls: Mapping[int, int], join: Node) -> bool:
    """Whether the kernel of a node that reads a join can take a factor per channel up."""
    rank = len(join.outputs[0].shape)
    last = join.layer.axis in (-1, rank - 1)
    plain = getattr(node.layer, "groups", 1) == 1
    once = calls[id(node.layer)] == 1 and len(node.inputs) == 1
    return type(node.layer) in _TAKES_FACTORS and plain and once and last


class _Copies:
    """Copies of the layers, with factors before joins and kernels that take them up."""

    def __init__(self, scaled: Mapping[Node, Sequence[float]], factors: Mapping[Node, np.ndarray]):
        self.scaled = scaled
        self.factors = factors
        self.made: dict[int, Any] = {}

    def call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        """The node's output, symbolic; see `kqat.graph.Graph.run`."""
        if node in self.scaled:
            args, kwargs = self._scaled(node, args, kwargs)
        if id(node.layer) not in self.made:
            self.made[id(node.layer)] = self._copy(node)
        return self.made[id(node.layer)](*args, **kwargs)

    def _scaled(self, node: Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        pairs = iter(enumerate(self.scaled[node]))

        def times(x: Any) -> Any:
            if not isinstance(x, keras.KerasTensor):
                return x
            index, factor = next(pairs)
            name = f"{node.name}_scaled_{index}"
            return x if factor == 1.0 else layers.Rescaling(factor, name=name)(x)

        return keras.tree.map_structure(times, (args, kwargs))

    def _copy(self, node: Node) -> Any:
        if node in self.scaled and isinstance(node.layer, keras.layers.Layer):
            # The penalty is of what it joined unscaled, and is among the graph's losses.
            return layers.Concatenate(axis=node.layer.axis, name=node.name)
        if node not in self.factors:
            return duplicate(node.layer, node.name)
        kernel, axis = _TAKES_FACTORS[type(node.layer)]
        weights = []
        for variable, value in zip(node.layer.weights, node.layer.get_weights(), strict=True):
            if variable is getattr(node.layer, kernel):
                shape = [1] * value.ndim
                shape[axis] = -1
                value = value / self.factors[node].reshape(shape)
            weights.append(value)
        return Part(clone(node.layer, node.name), weights)
