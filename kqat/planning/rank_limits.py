"""Values of more axes than a kernel takes: reshaped around it, where that computes the same.

A slice or a transposition moves runs of neighbouring axes as if they were one; a normalization over
the last axis, or a slope for each channel, does not see how the others are arranged, and what
broadcasts does not see how those are arranged along which the same values are repeated. RESHAPE
costs nothing but its operator.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from keras import layers

from kqat.config import QuantizeConfig
from kqat.devices import MOST_BROADCAST_AXES, RUNTIMES, most_axes
from kqat.graph import Graph, Node, Part, clone, rebuild, trace, unique_name
from kqat.parts import IndexOperation, Matmul, Select, Slice, Take

Configs = Mapping[str, QuantizeConfig | None]
Shape = tuple[int, ...]


def fit_ranks(
    graph: Graph, origins: Mapping[str, str], configs: Configs, name: str
) -> tuple[Graph, dict[str, str]]:
    """`graph` in which kernels get no more axes than every runtime takes, where that can be.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name; those left float stay as they are.
        name: of the model.

    Returns:
        The graph, and for each of its layers' names the name of the user's layer.
    """
    chosen: dict[Node, Callable[..., Any]] = {}
    taken = {*graph.input_names, *(node.layer.name for node in graph.nodes)}
    taken |= {node.name for node in graph.nodes}
    new: dict[str, str] = {}
    for node in graph.nodes:
        origin = origins[node.layer.name]
        if configs[origin] is None:
            continue

        def named(part: str, node: Node = node, origin: str = origin) -> str:
            own = unique_name(f"{node.name}_{part}", taken)
            new[own] = origin
            return own

        made = _FITTED[type(node.layer)][1](node, named) if _exceeds(node) else None
        if made is None and _broadcasts_too_far(node):
            made = _broadcast(node, named)
        if made is not None:
            chosen[node] = made
    if not chosen:
        return graph, dict(origins)

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        return chosen.get(node, node.layer)(*args, **kwargs)

    fitted = trace(rebuild(graph, call, name))
    return dataclasses.replace(fitted, output_names=graph.output_names), {**origins, **new}


def _exceeds(node: Node) -> bool:
    if type(node.layer) not in _FITTED:
        return False
    axes = max(len(ref.shape) for ref in (*node.inputs, *node.outputs))
    return axes > min(most_axes(_FITTED[type(node.layer)][0], runtime) for runtime in RUNTIMES)


def _most_broadcast(layer: Any) -> float:
    """The most axes, with that of the batch, over which the layer's kernel broadcasts."""
    kind = type(layer)
    op = layer.kind.name if kind is IndexOperation else _BROADCASTING.get(kind, "")
    return MOST_BROADCAST_AXES.get(op, math.inf)


def _broadcasts_too_far(node: Node) -> bool:
    shapes = {tuple(ref.shape[1:]) for ref in node.inputs}
    alike = len(shapes) < 2 or len({len(shape) for shape in shapes}) > 1
    return not alike and len(node.outputs[0].shape) > _most_broadcast(node.layer)


def _reshaped(x: Any, shape: Sequence[int], name: str) -> Any:
    return layers.Reshape(tuple(int(size) for size in shape), name=name)(x)


def _slice(node: Node, named: Callable[[str], str]) -> Callable[..., Any]:
    """One slice for each axis that is sliced, with the axes before and behind as one each."""
    layer = node.layer

    def call(x: Any) -> Any:
        shape = list(x.shape[1:])
        for axis, key in enumerate(zip(layer.begin, layer.end, layer.steps, strict=True)):
            begin, end, step = slice(*key).indices(shape[axis])
            if (begin, end, step) == (0, shape[axis], 1):
                continue
            outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
            x = _reshaped(x, (outer, shape[axis], inner), named("reshaped"))
            part = Slice([0, begin, 0], [outer, end, inner], [1, step, 1], name=named("part"))
            x = part(x)
            shape[axis] = len(range(begin, end, step))
        return _reshaped(x, shape, named("whole"))

    return call


def _permute(node: Node, named: Callable[[str], str]) -> Callable[..., Any]:
    """Runs of axes that stay together as one; where that is not enough, one axis after another."""
    order = [axis - 1 for axis in node.layer.dims]

    def call(x: Any) -> Any:
        shape = tuple(x.shape[1:])
        runs: list[list[int]] = []
        for axis in (axis for axis in order if shape[axis] != 1):
            behind = bool(runs) and all(
                shape[between] == 1 for between in range(runs[-1][-1] + 1, axis)
            )
            if behind and axis > runs[-1][-1]:
                runs[-1].append(axis)
            else:
                runs.append([axis])
        sizes = {run[0]: math.prod(shape[axis] for axis in run) for run in runs}
        current, wanted = sorted(sizes), [run[0] for run in runs]
        most = min(most_axes("TRANSPOSE", runtime) for runtime in RUNTIMES)
        if 1 < len(wanted) < most:
            x = _reshaped(x, [sizes[axis] for axis in current], named("reshaped"))
            places = tuple(current.index(axis) + 1 for axis in wanted)
            x = layers.Permute(places, name=named("part"))(x)
        elif len(wanted) > 1:
            for place, axis in enumerate(wanted):
                at = current.index(axis)
                if at == place:
                    continue
                parts = (current[:place], current[place:at], [axis], current[at + 1 :])
                grouped = [math.prod(sizes[one] for one in part) for part in parts]
                x = _reshaped(x, grouped, named("reshaped"))
                x = layers.Permute((1, 3, 2, 4), name=named("part"))(x)
                current = [*parts[0], axis, *parts[1], *parts[3]]
        return _reshaped(x, [shape[axis] for axis in order], named("whole"))

    return call


def _prelu(node: Node, named: Callable[[str], str]) -> Callable[..., Any]:
    """Neighbouring axes that share a slope as one, and so those that share none.

    Where there are too many of these, all that share a slope are brought before the others.
    """
    layer = node.layer
    alpha = np.asarray(layer.alpha)
    shape: Shape = tuple(int(size or 1) for size in node.inputs[0].shape[1:])
    shares = [size == 1 for size in alpha.shape]
    runs = [list(run) for _, run in itertools.groupby(range(len(shape)), lambda axis: shares[axis])]
    merged = [math.prod(shape[axis] for axis in run) for run in runs]
    if len(runs) < min(most_axes("PRELU", runtime) for runtime in RUNTIMES):
        shared = [index + 1 for index, run in enumerate(runs) if shares[run[0]]]
        slopes = alpha.reshape([math.prod(alpha.shape[axis] for axis in run) for run in runs])
        part = Part(clone(layer, named("part"), shared_axes=shared or None), [slopes])

        def call(x: Any) -> Any:
            y = part(_reshaped(x, merged, named("reshaped")))
            return _reshaped(y, shape, named("whole"))

        return call

    order = sorted(range(len(runs)), key=lambda run: not shares[runs[run][0]])
    apart = Part(clone(layer, named("part"), shared_axes=[1]), [alpha.reshape(1, -1)])

    def turned(x: Any) -> Any:
        y = _reshaped(x, merged, named("reshaped"))
        y = layers.Permute([run + 1 for run in order], name=named("turned"))(y)
        sizes = list(y.shape[1:])
        y = apart(_reshaped(y, (-1, alpha.size), named("rows")))
        y = _reshaped(y, sizes, named("split"))
        back = [order.index(run) + 1 for run in range(len(runs))]
        y = layers.Permute(back, name=named("back"))(y)
        return _reshaped(y, shape, named("whole"))

    return turned


def _unit(node: Node, named: Callable[[str], str]) -> Callable[..., Any]:
    """A normalization of the last axis, with the others as one."""
    layer = node.layer

    def call(x: Any) -> Any:
        shape = tuple(x.shape[1:])
        y = _reshaped(x, (math.prod(shape[:-1]), shape[-1]), named("reshaped"))
        y = clone(layer, named("part"), axis=-1)(y)
        return _reshaped(y, shape, named("whole"))

    return call


def _matmul(node: Node, named: Callable[[str], str]) -> Callable[..., Any] | None:
    """Products of matrices, whose axes before are one."""
    a, b = (tuple(ref.shape[1:]) for ref in node.inputs)
    if a[:-2] != b[:-2]:
        return None

    def call(inputs: Any) -> Any:
        each = math.prod(int(size or 1) for size in a[:-2])
        pair = [
            _reshaped(x, (each, *x.shape[-2:]), named(f"reshaped_{i}"))
            for i, x in enumerate(inputs)
        ]
        y = Matmul(name=named("part"))(pair)
        sizes = [int(size or 1) for size in (*a[:-2], *y.shape[-2:])]
        return _reshaped(y, sizes, named("whole"))

    return call


def _select(node: Node, named: Callable[[str], str]) -> Callable[..., Any] | None:
    """A choice between values of one shape, as one axis."""
    if len({tuple(ref.shape[1:]) for ref in node.inputs}) > 1:
        return None

    def call(inputs: Any) -> Any:
        shape = tuple(inputs[0].shape[1:])
        flat = [
            _reshaped(x, (math.prod(shape),), named(f"reshaped_{i}")) for i, x in enumerate(inputs)
        ]
        return _reshaped(Select(name=named("part"))(flat), shape, named("whole"))

    return call


def _broadcast(node: Node, named: Callable[[str], str]) -> Callable[..., Any]:
    """Neighbouring axes along which the same values are repeated as one.

    Where there are too many of these, values are repeated first: along those that cost least.
    """
    sizes = [[int(size or 1) for size in ref.shape[1:]] for ref in node.inputs]
    whole = [max(each) for each in zip(*sizes, strict=True)]
    repeated: list[tuple[int, int]] = []
    while len(runs := _alike(sizes, whole)) >= _most_broadcast(node.layer):
        broadcast = [run.axes for run in runs if not all(run.holds or ())]
        least = min(broadcast, key=lambda axes: math.prod(whole[axis] for axis in axes))
        for index, axis in itertools.product(range(len(sizes)), least):
            if sizes[index][axis] != whole[axis]:
                sizes[index][axis] = whole[axis]
                repeated.append((index, axis))

    def call(inputs: Any) -> Any:
        values = list(inputs)
        for index, axis in repeated:
            shape = [int(size) for size in values[index].shape[1:]]
            outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
            x = _reshaped(values[index], (outer, 1, inner), named("reshaped"))
            x = Take([0] * whole[axis], 2, name=named("repeated"))(x)
            shape[axis] = whole[axis]
            values[index] = _reshaped(x, shape, named("reshaped"))
        flat = [
            _reshaped(x, [math.prod(size[a] for a in run.axes) for run in runs], named("reshaped"))
            for x, size in zip(values, sizes, strict=True)
        ]
        return _reshaped(clone(node.layer, named("part"))(flat), whole, named("whole"))

    return call


@dataclasses.dataclass
class _Run:
    """Neighbouring axes; `holds` says of each value whether it has all numbers along them."""

    axes: list[int]
    holds: tuple[bool, ...] | None


def _alike(sizes: Sequence[Sequence[int]], whole: Sequence[int]) -> list[_Run]:
    """The longest runs of axes along which the same values repeat; axes of size 1 join any."""
    runs: list[_Run] = []
    for axis, size in enumerate(whole):
        holds = None if size == 1 else tuple(one[axis] == size for one in sizes)
        if runs and (None in (holds, runs[-1].holds) or holds == runs[-1].holds):
            runs[-1].axes.append(axis)
            runs[-1].holds = runs[-1].holds or holds
        else:
            runs.append(_Run([axis], holds))
    return runs


# Layers of several values, and their operators; of `IndexOperation` its kind says which.
_BROADCASTING: dict[type, str] = {
    layers.Maximum: "MAXIMUM",
    layers.Minimum: "MINIMUM",
    Select: "SELECT_V2",
}
_FITTED: dict[type, tuple[str, Callable[[Node, Callable[[str], str]], Any]]] = {
    Slice: ("STRIDED_SLICE", _slice),
    layers.Permute: ("TRANSPOSE", _permute),
    layers.PReLU: ("PRELU", _prelu),
    layers.UnitNormalization: ("L2_NORMALIZATION", _unit),
    Matmul: ("BATCH_MATMUL", _matmul),
    Select: ("SELECT_V2", _select),
}
