"""A weight that several layers or operations read as a value is one value, which all of them read.

Queries of a detection transformer, latents of a Perceiver and class tokens are tiled to the batch,
attended with and added to the result. Each reader would train a copy of its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kqat.graph import Graph, Node, Ref, fill, trace, unique_name
from kqat.rewrites import computed


def with_values_of_weights(graph: Graph) -> Graph:
    """`graph` in which a trained weight with a batch axis of one, read twice, is a value.

    Args:
        graph: of a model, or of what a custom layer computes.
    """
    readers: dict[Any, list[tuple[Node, Any]]] = {}
    for node in graph.nodes:
        for value in keras.tree.flatten((node.args, node.kwargs)):
            if isinstance(value, keras.Variable) and value.trainable:
                readers.setdefault(_key(value), []).append((node, value))
    for found in readers.values():
        nodes, weights = zip(*found, strict=True)
        if len(set(nodes)) > 1 and all(_reads_value(node, weights[0]) for node in nodes):
            graph = _with_value(graph, weights)
    return graph


def _key(weight: Any) -> Any:
    """What is equal for a weight and the same weight, tiled to the batch at another place."""
    array = np.asarray(weight)
    varies = array.size > 1 and array.min() != array.max()
    return (array.shape, array.tobytes()) if varies else id(weight)


def _reads_value(node: Node, variable: Any) -> bool:
    """Whether a weight stands beside tensors with the batch first, as one of them."""
    shape = tuple(variable.shape)
    ranks = [len(ref.shape) for ref in node.inputs]
    return len(shape) > 1 and shape[0] == 1 and bool(ranks) and len(shape) == max(ranks)


def _with_value(graph: Graph, weights: Sequence[Any]) -> Graph:
    """The graph in which one value stands for all of `weights`, which are one."""
    variable, same = weights[0], {id(weight) for weight in weights}
    like = graph.inputs[0]
    taken = {*graph.input_names, *(node.name for node in graph.nodes)}
    x = keras.Input(like.shape[1:], dtype=like.dtype)
    name = unique_name(variable.path.replace("/", "_"), taken)
    made = trace(keras.Model(x, computed(variable, x, len(variable.shape), name)))
    given: dict[Ref, Ref] = {made.inputs[0]: like}

    def moved(ref: Ref) -> Ref:
        return given.get(ref, ref)

    nodes = [_with_arguments(node, fill((node.args, node.kwargs), moved)) for node in made.nodes]
    (value,) = made.outputs

    def one(argument: Any) -> Any:
        return value if id(argument) in same else argument

    for node in graph.nodes:
        arguments = keras.tree.map_structure(one, (node.args, node.kwargs))
        nodes.append(_with_arguments(node, arguments))
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _with_arguments(node: Node, arguments: Any) -> Node:
    args, kwargs = arguments
    return dataclasses.replace(node, args=args, kwargs=kwargs)
