"""Which layers have no kernel of their own: they are computed inside the kernel before them.

A BatchNormalization folds into the weights of the layer before it. A clamp (ReLU, ReLU6) is the
fused activation of the operator before it. What lies between the two never exists as integers, so
it has no scale.
"""

import dataclasses
from collections.abc import Mapping

import keras

from kqat.graph import Node, Ref
from kqat.planning.planned_graph import PlannedGraph


@dataclasses.dataclass(frozen=True)
class Fusions:
    """Which layers are computed inside another's kernel.

    Args:
        folded: BatchNormalization -> the layer with weights that it folds into.
        activations: clamp -> the layer whose kernel carries it out as its fused activation.
        clamps: value -> the clamp that makes it, which a quantizer carries out where all values
            of its group have the same clamp.
        inside: values that never exist as integers: they lie between two layers of one kernel.
    """

    folded: Mapping[Node, Node]
    activations: Mapping[Node, Node]
    clamps: Mapping[Ref, Node]
    inside: frozenset[Ref]

    def normalization_of(self, node: Node) -> Node | None:
        """The BatchNormalization that folds into a layer."""
        return next((norm for norm, into in self.folded.items() if into is node), None)


def find_fusions(planned: PlannedGraph) -> Fusions:
    """What folds and what fuses, from the graph's edges and the rows of the registry."""
    integer = [node for node in planned.graph.nodes if planned.rules[node] is not None]
    folded = {node: into for node in integer if (into := _folds_into(planned, node))}
    activations = {node: into for node in integer if (into := _fuses_into(planned, node))}
    clamps = {node.outputs[0]: node for node in integer if _quantizer_may_clamp(planned, node)}
    inside = frozenset(node.inputs[0] for node in (*folded, *activations))
    return Fusions(folded, activations, clamps, inside)


def _folds_into(planned: PlannedGraph, node: Node) -> Node | None:
    """The layer whose weights take in the BatchNormalization `node`, if one does."""
    if not isinstance(node.layer, keras.layers.BatchNormalization):
        return None
    producer = planned.only_reader_of(node)
    rule = planned.rules[producer] if producer else None
    if producer is None or rule is None or not rule.takes_normalization:
        return None
    calls = {planned.calls[id(node.layer)], planned.calls[id(producer.layer)]}
    return producer if calls == {1} else None


def _fuses_into(planned: PlannedGraph, node: Node) -> Node | None:
    """The layer whose kernel ends with the clamp `node`, if its operator can."""
    rule = planned.rules[node]
    if rule is None or rule.clamp is None:
        return None
    producer = planned.only_reader_of(node)
    rule = planned.rules[producer] if producer else None
    return producer if rule and rule.takes_clamp else None


def _quantizer_may_clamp(planned: PlannedGraph, node: Node) -> bool:
    # A regularizer needs the clamp's output before rounding, so the layer stays in the QAT model.
    rule = planned.rules[node]
    return bool(rule and rule.clamp) and node.layer.activity_regularizer is None
