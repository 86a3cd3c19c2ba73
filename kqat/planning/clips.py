"""Clips that the ends of a grid carry out, in the place of a lookup table.

An integer kernel saturates at the ends of its output's grid. Where these lie at the ends of a clip,
or inside, there is nothing left to compute; and the grid holds no value that the clip takes away.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from keras import layers

from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, activation_name, rebuild, trace
from kqat.grids import Bounds, Fixed, LearnedRangeMethod, arithmetic
from kqat.parts import Clip, ClipKind
from kqat.registry import ACTIVATIONS

Configs = Mapping[str, QuantizeConfig | None]

# Clips of which a kernel has the fused activation: they only join others.
_FUSED = {row.bounds: name for name, row in ACTIVATIONS.items() if row.clamp}


def clip_by_grids(graph: Graph, origins: Mapping[str, str], configs: Configs, name: str) -> Graph:
    """`graph` in which clips that a grid can carry out are of that kind, those in a row one.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name; only layers of one config are joined.
        name: of the model.
    """
    made, joined = _found(graph, origins, configs)
    if not made:
        return graph

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if node in joined:
            return args[0]
        if node not in made:
            return node.layer(*args, **kwargs)
        if function := _FUSED.get(made[node]):
            return layers.Activation(function, name=node.layer.name)(args[0])
        return Clip.of(made[node], ClipKind.GRID, name=node.layer.name)(args[0])

    changed = trace(rebuild(graph, call, name))
    return dataclasses.replace(changed, output_names=graph.output_names)


def _found(
    graph: Graph, origins: Mapping[str, str], configs: Configs
) -> tuple[dict[Node, Bounds], set[Node]]:
    """The last clip of each row of them, with the bounds of all; and those before it."""
    producers, readers, calls = graph.producers(), graph.consumers(), graph.calls()
    made: dict[Node, Bounds] = {}
    joined: set[Node] = set()
    for node in graph.nodes:
        bounds, config = _bounds_of(node), configs[origins[node.layer.name]]
        if bounds is None or calls[id(node.layer)] != 1:
            continue
        before, row = producers.get(node.inputs[0]), [node]
        while before is not None and (inner := _bounds_of(before)) is not None:
            ref = before.outputs[0]
            alone = len(readers[ref]) == 1 and ref not in graph.outputs
            once = calls[id(before.layer)] == 1
            if not (alone and once and configs[origins[before.layer.name]] == config):
                break
            bounds = _one_after_the_other(inner, bounds)
            row.append(before)
            before = producers.get(before.inputs[0])
        fused = len(row) == 1 and _function(node) in _FUSED.values()
        if not fused and _is_grid(bounds) and _has_free_range(config, bounds):
            made[node] = bounds
            joined.update(row[1:])
    return {node: bounds for node, bounds in made.items() if node not in joined}, joined


def _function(node: Node) -> str | None:
    layer: Any = node.layer
    return activation_name(layer.activation) if type(layer) is layers.Activation else None


def _bounds_of(node: Node) -> Bounds | None:
    """The bounds of a node that clips each number, and does nothing else."""
    layer: Any = node.layer
    row = ACTIVATIONS.get(_function(node) or "")
    own = row.bounds if row else None
    bounds = layer.bounds if type(layer) is Clip else own
    # A regularizer reads the value before it is rounded.
    return None if bounds is None or layer.activity_regularizer is not None else bounds


def _one_after_the_other(first: Bounds, then: Bounds) -> Bounds:
    low, high = (min(max(end, then.low), then.high) for end in (first.low, first.high))
    return Bounds(low, high)


def _is_grid(bounds: Bounds) -> bool:
    """Whether a grid can end at these bounds: it always holds zero, and more than that."""
    high = arithmetic.SMALLEST_RANGE <= bounds.high
    bounded = math.isfinite(bounds.low) or math.isfinite(bounds.high)
    return bounded and bounds.low <= 0.0 and high


def _has_free_range(config: QuantizeConfig | None, bounds: Bounds) -> bool:
    """Whether the range of a layer's output can keep to bounds, on a grid of its own ends.

    A range that is given or learned lies where it lies, and an estimator knows of no clip. A
    symmetric one has both ends alike; where the lower bound is zero, a RELU sees to that.
    """
    if config is None:
        return False
    symmetric = config.activation.symmetric or config.activation.bits > 8
    if symmetric and not (math.isfinite(bounds.high) and bounds.low in (0.0, -bounds.high)):
        return False
    given = isinstance(config.activation_range, Fixed | LearnedRangeMethod)
    return not given and config.activation_gradient is None
