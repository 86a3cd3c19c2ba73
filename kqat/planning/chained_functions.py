"""Functions of each number that follow one another become one function, and so one table.

`1 / sqrt(variance + 1e-6)`, as people write it, is a sum, a root and a reciprocal: three roundings,
and as many groups of operators. As one lookup table it is rounded once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, rebuild, trace
from kqat.parts import Clip, ClipKind, Elementwise, ReciprocalSquareRoot
from kqat.planning.layer_configs import row_for

Configs = Mapping[str, QuantizeConfig | None]
# Layers that ship as a lookup table of 8-bit activations.
_TABLES = (Elementwise, ReciprocalSquareRoot)


def join_functions(graph: Graph, origins: Mapping[str, str], configs: Configs, name: str) -> Graph:
    """`graph` in which each chain of functions, of which one ships as a table, is one layer.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name; only layers of one config are joined.
        name: of the model.
    """
    chains = _chains(graph, origins, configs)
    if not chains:
        return graph
    skipped = {node for chain in chains for node in chain[:-1]}
    last = {chain[-1]: chain for chain in chains}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if node in skipped:
            return args[0]
        if node not in last:
            return node.layer(*args, **kwargs)
        functions = [_function(member, index) for index, member in enumerate(last[node])]
        return Elementwise.of(_one_after_another(functions), name=node.layer.name)(args[0])

    joined = trace(rebuild(graph, call, name))
    return dataclasses.replace(joined, output_names=graph.output_names)


def _chains(graph: Graph, origins: Mapping[str, str], configs: Configs) -> list[list[Node]]:
    """The nodes of each chain, in the order in which they run; two of them at least."""
    producers, readers, calls = graph.producers(), graph.consumers(), graph.calls()

    def config(node: Node) -> QuantizeConfig | None:
        return configs[origins[node.layer.name]]

    def joins(node: Node) -> bool:
        asked = config(node)
        alone = calls[id(node.layer)] == 1
        return asked is not None and asked.activation.bits == 8 and alone and _is_function(node)

    def before(node: Node) -> Node | None:
        ref = node.inputs[0]
        found = producers.get(ref)
        if found is None or len(readers[ref]) != 1 or ref in graph.outputs:
            return None
        return found if joins(found) and config(found) == config(node) else None

    chains, taken = [], set()
    for node in reversed(graph.nodes):
        if node in taken or not joins(node):
            continue
        chain = [node]
        while (previous := before(chain[0])) is not None:
            chain.insert(0, previous)
        while chain and _costs_nothing(chain[0], producers.get(chain[0].inputs[0]), config):
            chain.pop(0)
        taken.update(chain)
        if len(chain) > 1 and any(map(_is_table, chain)):
            chains.append(chain)
    return chains


def _costs_nothing(
    node: Node, producer: Node | None, config: Callable[[Node], QuantizeConfig | None]
) -> bool:
    """Whether a function that begins a chain is no operator where it stands."""
    if type(node.layer) is Clip:
        # The kernel before it saturates there, and its grid is the finer for that.
        asked = None if producer is None else config(producer)
        row = None if producer is None else row_for(producer.layer, producer.name, asked)
        return not _is_table(node) and row is not None and row.takes_clamp
    # The scale of a model input may be that of the bytes of a camera.
    return producer is None and not _is_table(node)


def _is_table(node: Node) -> bool:
    layer: Any = node.layer
    return type(layer) in _TABLES or (type(layer) is Clip and layer.kind is ClipKind.TABLE)


def _is_function(node: Node) -> bool:
    """Whether a node computes each number from one, with no weights."""
    layer = node.layer
    if type(layer) is not layers.Rescaling:
        return _is_table(node) or type(layer) is Clip
    return np.size(layer.scale) == 1 and np.size(layer.offset) == 1


def _function(node: Node, index: int) -> Callable[[Any], Any]:
    """What a node computes; `index` tells it from the others of its chain."""
    layer: Any = node.layer
    if isinstance(layer, Elementwise):
        function = layer.function
        return keras.Model(function.inputs[0], function.outputs[0], name=f"function_{index}")
    if isinstance(layer, layers.Rescaling):
        scale, offset = (float(np.reshape(v, ())) for v in (layer.scale, layer.offset))
        return lambda x: x * scale + offset
    if isinstance(layer, Clip):
        return layer.call
    epsilon = layer.epsilon
    return lambda x: ops.rsqrt(ops.maximum(x, 0.0) + epsilon)


def _one_after_another(functions: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def whole(x: Any) -> Any:
        for one in functions:
            x = one(x)
        return x

    return whole
