"""`a * x + (1 - a) * y` of a weight `a` is `y + a * (x - y)`, which reads the weight once.

So a gate, or a mix of two values, trains the one weight of the user's: `1 - a` would be another.
"""

import dataclasses
from typing import Any

import keras

from kqat.graph import Graph, Node, Ref, complement_of


def blended(graph: Graph, kept: frozenset[str] = frozenset()) -> Graph:
    """`graph` with one product of the difference in the place of the two of each blend.

    Args:
        graph: of a call of the user's: operations, among whose arguments weights stand.
        kept: names of nodes that stay as they are.
    """
    if not any(complement_of(v) for node in graph.nodes for v in _weights(node)):
        return graph
    producers, readers = graph.producers(), graph.consumers()
    read_later = {*graph.outputs, *(ref for loss in graph.losses for ref in loss.inputs)}
    made: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if type(node.layer).__name__ != "Add" or len(set(node.inputs)) != 2:
            continue
        alone = all(readers[ref] == [node] and ref not in read_later for ref in node.inputs)
        products = [producers[ref] for ref in node.inputs if ref in producers]
        if alone and len(products) == 2 and kept.isdisjoint(n.name for n in (node, *products)):
            parts = _parts(node, *products) or _parts(node, *products[::-1])
            made |= {products[0]: [], products[1]: [], node: parts} if parts else {}
    nodes = tuple(part for node in graph.nodes for part in made.get(node, [node]))
    return dataclasses.replace(graph, nodes=nodes)


def _parts(node: Node, first: Node, second: Node) -> list[Node] | None:
    """What a sum computes of two products: of `first` by a weight, of `second` by one less it."""
    one, other = _factors(first), _factors(second)
    found = complement_of(other[0]) if one and other else None
    if one is None or other is None or found is None or found[0] is not one[0]:
        return None
    weight, x, y = one[0], one[1], other[1]
    difference = _made(found[1], x, y)
    product = _made(first.layer, weight, difference)
    return [
        Node(second.name, found[1], (x, y), {}, (difference,)),
        Node(first.name, first.layer, (weight, difference), {}, (product,)),
        dataclasses.replace(node, args=(y, product), kwargs={}),
    ]


def _factors(node: Node) -> tuple[Any, Ref] | None:
    """The weight and the value that a node multiplies."""
    weights = _weights(node)
    if type(node.layer).__name__ != "Multiply" or len(weights) != 1 or len(node.inputs) != 1:
        return None
    return weights[0], node.inputs[0]


def _made(operation: Any, *given: Any) -> Ref:
    """What an operation of two makes of them."""
    symbols = [keras.KerasTensor(v.shape, dtype=v.dtype) for v in given]
    made = operation.compute_output_spec(*symbols)
    return Ref(tuple(made.shape), str(made.dtype))


def _weights(node: Node) -> list[Any]:
    given = keras.tree.flatten((node.args, node.kwargs))
    return [v for v in given if isinstance(v, keras.Variable)]
