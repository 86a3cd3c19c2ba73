"""`Replay`: one batch through the graph of a QAT model, again and again, with other roundings.

The graph is traced once and computed once without rounding. Each question after that computes only
what lies behind the values that change.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.graph import Graph, Node, Ref, fill
from kqat.training import (
    ActivationQuantizer,
    QuantizedRecurrence,
    QuantizeWrapper,
    call_unrounded,
    judged_values,
)

# A noise below this is none: float32 itself has as much.
LEAST_NOISE = 1e-12
NodeCall = Callable[..., Any]


class Replay:
    """The values of a graph on one batch.

    Args:
        graph: of a QAT model. No variable of it is changed.
        tensors: one per input.

    Attributes:
        exact: each value where nothing is rounded.
        ends: the outputs, and in their place, behind a closing softmax or another function of a
            given range, what that reads: there differences show better.
    """

    def __init__(self, graph: Graph, tensors: Sequence[Any]) -> None:
        self.graph = graph
        self.exact: dict[Ref, Any] = dict(zip(graph.inputs, tensors, strict=True))
        self._run(self.exact, graph.nodes, {})
        judged = set(judged_values(graph))
        self.ends = tuple(
            ref for node in graph.nodes for ref in node.outputs if ref in judged
        ) or tuple(ref for ref in graph.outputs if not ref.holds_indexes)

    def values(self, calls: Mapping[Node, NodeCall]) -> dict[Ref, Any]:
        """Each value where some nodes compute something else.

        Args:
            calls: node -> what it computes, of the arguments of its call; see `as_built`.
        """
        values: dict[Ref, Any] = {}
        changed: set[Ref] = set()
        behind = []
        for node in self.graph.nodes:
            if node in calls or not changed.isdisjoint(node.inputs):
                behind.append(node)
                changed.update(node.outputs)
        values.update((ref, x) for ref, x in self.exact.items() if ref not in changed)
        self._run(values, behind, calls)
        return values

    def noise(self, calls: Mapping[Node, NodeCall]) -> float:
        """Power of the error at the ends over that of their values, the mean of all ends."""
        return self.noise_of(self.values(calls))

    def noise_of(self, values: Mapping[Ref, Any]) -> float:
        """The same of values that were computed before."""
        found = [noise(self.exact[ref], values[ref]) for ref in self.ends]
        return sum(found) / len(found)

    def outputs(self, values: Mapping[Ref, Any]) -> list[np.ndarray]:
        """The model's outputs among `values`, in its order."""
        return [as_array(values[ref]) for ref in self.graph.outputs]

    def rounding_nodes(self) -> tuple[Node, ...]:
        """The nodes that round."""
        kinds = (ActivationQuantizer, QuantizeWrapper, QuantizedRecurrence)
        return tuple(node for node in self.graph.nodes if isinstance(node.layer, kinds))

    def all_rounded(self) -> dict[Node, NodeCall]:
        """Every node as the QAT model computes it in inference."""
        return as_built(self.rounding_nodes())

    def _run(
        self, values: dict[Ref, Any], nodes: Collection[Node], calls: Mapping[Node, NodeCall]
    ) -> None:
        for node in nodes:
            args, kwargs = fill((node.args, node.kwargs), values.__getitem__)
            call = calls.get(node)
            made = call_unrounded(node, *args, **kwargs) if call is None else call(*args, **kwargs)
            values.update(zip(node.outputs, keras.tree.flatten(made), strict=True))


def as_built(nodes: Collection[Node]) -> dict[Node, NodeCall]:
    """Each of the nodes -> its layer as it is, rounding."""
    return {node: node.layer for node in nodes}


def as_array(x: Any) -> np.ndarray:
    """A tensor as float32 array."""
    return np.asarray(ops.convert_to_numpy(ops.cast(ops.stop_gradient(x), "float32")))


def noise(want: Any, got: Any) -> float:
    """Power of the error over that of the values; `LEAST_NOISE` at least."""
    exact, found = (np.asarray(as_array(x), np.float64) for x in (want, got))
    signal = float(np.mean(np.square(exact)))
    error = float(np.mean(np.square(exact - found)))
    if signal == 0.0:
        return LEAST_NOISE if error == 0.0 else 1.0
    return max(error / signal, LEAST_NOISE)


def decibels(ratio: float) -> float:
    """A noise as SQNR in dB."""
    return -10.0 * math.log10(max(ratio, LEAST_NOISE))
