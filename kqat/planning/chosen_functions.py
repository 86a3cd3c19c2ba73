"""A choice between functions of a number, by comparisons of that number, is a function of it.

`where(s > 2, 2.0, s)` is a minimum written by hand. As one function it is tried at low numbers
like any other (`kqat.planning.additive_masks`), so that a mask passes it, or is lifted by it.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.graph import Graph, Node, Ref, is_tensor, rebuild, trace
from kqat.parts import (
    Elementwise,
    IndexKind,
    IndexOperation,
    Learned,
    Select,
    computes_each_number,
)

_COMPARISONS = frozenset(
    (
        IndexKind.EQUAL, IndexKind.NOT_EQUAL, IndexKind.GREATER, IndexKind.GREATER_EQUAL,
        IndexKind.LESS, IndexKind.LESS_EQUAL,
    )
)  # fmt: skip
_MERGES: Mapping[type, Callable[[Any, Any], Any]] = {
    layers.Add: ops.add,
    layers.Subtract: ops.subtract,
    layers.Multiply: ops.multiply,
    layers.Maximum: ops.maximum,
    layers.Minimum: ops.minimum,
}
# A value as a function of the number that all is computed of.
_Value = Callable[[Any], Any]


def join_choices(
    graph: Graph, origins: Mapping[str, str], kept: Collection[str], name: str
) -> Graph:
    """`graph` in which each choice between a number's functions and constants is one function.

    A choice between functions of the number alone stays: what hides the number hides both.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        kept: the user's layers that stay as they are.
        name: of the model.
    """
    search = _Choices(graph, {n.name for n in graph.nodes if origins[n.layer.name] in kept})
    found = {node: one for node in graph.nodes if (one := search.function(node)) is not None}
    if not found:
        return graph
    tensors: dict[Ref, Any] = {}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in keras.tree.flatten((args, kwargs)) if is_tensor(t)]
        tensors.update(zip(node.inputs, given, strict=True))
        if node not in found:
            return node.layer(*args, **kwargs)
        ref, function = found[node]
        return Elementwise.of(function, name=node.layer.name)(tensors[ref])

    return dataclasses.replace(trace(rebuild(graph, call, name)), output_names=graph.output_names)


class _Choices:
    """Finds the choices that are functions of one number."""

    def __init__(self, graph: Graph, kept: Collection[str]) -> None:
        self.producers, self.kept = graph.producers(), kept

    def function(self, node: Node) -> tuple[Ref, _Value] | None:
        """The value that a choice is a function of, and that function, if there is one."""
        if type(node.layer) is not Select or node.name in self.kept:
            return None
        ref = self._compared(node.inputs[0])
        while ref is not None:
            value = self._value(node.outputs[0], ref)
            if value is not None and ref.shape == node.outputs[0].shape:
                return (ref, value) if self._reads_constant(node, ref) else None
            ref = self._before(ref)
        return None

    def _compared(self, ref: Ref) -> Ref | None:
        """What the first comparison of a condition compares with a number."""
        node = self.producers.get(ref)
        while node is not None and isinstance(node.layer, IndexOperation):
            if node.layer.kind in _COMPARISONS and len(node.inputs) == 1:
                return node.inputs[0]
            node = self.producers.get(node.inputs[0])
        return None

    def _before(self, ref: Ref) -> Ref | None:
        """What a value is a function of, one layer back: `x` where `abs(x)` is compared."""
        node = self.producers.get(ref)
        if node is None or len(node.inputs) != 1 or _of_numbers(node.layer, 1) is None:
            return None
        return node.inputs[0]

    def _reads_constant(self, node: Node, ref: Ref) -> bool:
        """Whether a constant is among what a node computes of `ref`."""
        read = [self.producers[one] for one in node.inputs if one != ref]
        return any(isinstance(one.layer, Learned) or self._reads_constant(one, ref) for one in read)

    def _value(self, ref: Ref, of: Ref) -> _Value | None:
        """`ref` as a function of `of`, number by number; `None` where it is none."""
        if ref == of:
            return lambda x: x
        node = self.producers.get(ref)
        if node is None or node.name in self.kept:
            return None
        layer = node.layer
        if isinstance(layer, Learned):
            numbers = np.unique(np.asarray(layer.value))
            if layer.trainable or numbers.size != 1:
                return None
            return lambda x: ops.full_like(x, float(numbers[0]))
        function = _of_numbers(layer, len(node.inputs))
        parts = [self._value(one, of) for one in node.inputs]
        if function is None or any(part is None for part in parts):
            return None
        return lambda x: function(*(part(x) for part in parts if part is not None))


def _of_numbers(layer: Any, operands: int) -> Callable[..., Any] | None:
    """What a layer computes of each number, or of numbers side by side; `None` if it does more."""
    if isinstance(layer, IndexOperation):
        if any(np.size(option) != 1 for option in layer.options.values()):
            return None
        return (lambda *x: layer(list(x))) if operands > 1 else layer
    if computes_each_number(layer) or isinstance(layer, layers.LeakyReLU | layers.Identity):
        return layer
    if type(layer) is Select:
        return ops.where
    return _MERGES.get(type(layer)) if operands == 2 else None
