"""The square of a difference is one layer, as it is one kernel: SQUARED_DIFFERENCE.

The distance of two embeddings and a variance begin so, and the distance from a constant, also from
one that is trained. The kernel squares a difference that it never rounds, where SUB rounds one to 8
bits for MUL to read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import layers

from kqat.config import QuantizeConfig
from kqat.devices import MOST_BROADCAST_AXES
from kqat.graph import Graph, Node, Part, Ref, rebuild, trace
from kqat.parts import ConstantKind, SquaredDifference, WithConstant
from kqat.planning.additive_masks import addend

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
        joins = alone and once and _is_difference(found)
        return found if joins and not (_is_penalized(node) or _is_penalized(found)) else None

    squares = {node: found for node in graph.nodes if (found := difference(node)) is not None}
    if not squares:
        return graph
    differences = set(squares.values())
    read: dict[Ref, Any] = {}  # a difference -> the two values that it is of

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if node in differences:
            read[node.outputs[0]] = args[0]
            return args[0] if len(node.inputs) == 1 else args[0][0]  # Nothing reads it.
        if node in squares:
            return _square(node.layer.name, squares[node], read[node.inputs[0]])
        return node.layer(*args, **kwargs)

    joined = trace(rebuild(graph, call, name))
    return dataclasses.replace(joined, output_names=graph.output_names)


def _is_penalized(node: Node) -> bool:
    return getattr(node.layer, "activity_regularizer", None) is not None


def _is_difference(node: Node) -> bool:
    shape = node.outputs[0].shape
    if type(node.layer) is layers.Subtract and len(set(node.inputs)) == 2:
        broadcasts = any(ref.shape[1:] != shape[1:] for ref in node.inputs)
    else:
        constant = _constant(node)
        if constant is None:
            return False
        broadcasts = constant.shape[-len(shape[1:]) :] != shape[1:]
    # Further the converter makes SUB and SQUARE.
    return not broadcasts or len(shape) <= MOST_BROADCAST_AXES["SQUARED_DIFFERENCE"]


def _constant(node: Node) -> np.ndarray | None:
    """What a node takes off its one input, if it does nothing else."""
    layer: Any = node.layer
    if type(layer) is layers.Rescaling:
        shifts = np.size(layer.scale) == np.size(layer.offset) == 1 and layer.scale == 1.0
        return np.reshape(-np.float32(layer.offset), ()) if shifts else None
    if type(layer) is WithConstant and layer.trainable:
        # A center, as of a radial basis function or of a codebook, of which the sum has the
        # negative. A penalty on what the user's model adds may weigh its negative otherwise.
        is_sum = layer.kind is ConstantKind.ADD and layer.value_regularizer is None
        return -np.asarray(layer.value, np.float32) if is_sum else None
    added = addend(node)
    return None if added is None else -added


def _square(name: str, difference: Node, given: Any) -> Any:
    """The layer that squares a difference: of `given`, one value or two."""
    constant = _constant(difference)
    if constant is None:
        return SquaredDifference(name=name)(given)
    kind, shape = ConstantKind.SQUARED_DIFFERENCE, list(constant.shape)
    # A Rescaling says of itself that it is trainable, too.
    trained = type(difference.layer) is WithConstant and difference.layer.trainable
    return Part(WithConstant(kind, shape, name=name, trainable=trained), [constant])(given)
