"""The square of a difference is one layer, as it is one kernel: SQUARED_DIFFERENCE.

The distance of two embeddings and a variance begin so. The kernel squares a difference that it
never rounds, where SUB rounds one to 8 bits for MUL to read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras import layers

from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, Ref, rebuild, trace
from kqat.parts import SquaredDifference

Configs = Mapping[str, QuantizeConfig | None]


def join_squares(graph: Graph, origins: Mapping[str, str], configs: Configs, name: str) -> Graph:
    """`graph` in which a difference that is squared, and read by nothing else, is one layer.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name; only layers of one config are joined, of 8 bits, as
            no runtime but TFLite Micro has a kernel of 16.
        name: of the model.
    """
    producers, readers, calls = graph.producers(), graph.consumers(), graph.calls()

    def config(node: Node) -> QuantizeConfig | None:
        return configs[origins[node.layer.name]]

    def difference(node: Node) -> Node | None:
        """The node that makes the difference of which `node` is the square."""
        if type(node.layer) is not layers.Multiply or node.inputs[1:] != node.inputs[:1]:
            return None
        ref = node.inputs[0]
        found, asked = producers.get(ref), config(node)
        if found is None or asked is None or asked.activation.bits != 8 or config(found) != asked:
            return None
        alone = set(readers[ref]) == {node} and ref not in graph.outputs
        once = calls[id(node.layer)] == calls[id(found.layer)] == 1
        return found if alone and once and _is_difference(found) else None

    squares = {node: found for node in graph.nodes if (found := difference(node)) is not None}
    if not squares:
        return graph
    differences = set(squares.values())
    read: dict[Ref, Any] = {}  # a difference -> the two values that it is of

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if node in differences:
            read[node.outputs[0]] = args[0]
            return args[0][0]  # Nothing reads it.
        if node in squares:
            return SquaredDifference(name=node.layer.name)(read[node.inputs[0]])
        return node.layer(*args, **kwargs)

    joined = trace(rebuild(graph, call, name))
    return dataclasses.replace(joined, output_names=graph.output_names)


def _is_difference(node: Node) -> bool:
    return type(node.layer) is layers.Subtract and len(set(node.inputs)) == 2
