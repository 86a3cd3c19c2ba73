"""The operand that is broadcast comes first in a sum, where Keras does not take it for a bias.

`kqat.graph.added` says what Keras makes of the other order; an `Add` is Keras's own layer.
"""

import dataclasses

from keras import layers

from kqat.graph import Graph, Node, Ref


def broadcast_first(graph: Graph) -> Graph:
    """`graph` in which each sum of two has the operand first that is repeated along more axes."""
    nodes = tuple(map(_ordered, graph.nodes))
    return dataclasses.replace(graph, nodes=nodes)


def _ordered(node: Node) -> Node:
    # Not of a subclass, whose operands may have a meaning each.
    if type(node.layer) is not layers.Add or len(node.args) != 1 or len(node.args[0]) != 2:
        return node
    first, second = node.args[0]
    if not _is_broadcast(second, first) or _is_broadcast(first, second):
        return node
    return dataclasses.replace(node, args=([second, first],))


def _is_broadcast(ref: Ref, other: Ref) -> bool:
    """Whether a value is repeated along an axis of another, of as many axes."""
    pairs = zip(ref.shape[1:], other.shape[1:], strict=False)
    return any(size == 1 != wanted for size, wanted in pairs)
