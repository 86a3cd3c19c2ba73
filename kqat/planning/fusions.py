"""Which layers have no kernel of their own: they are computed inside the kernel before them.

A BatchNormalization folds into the weights of the layer before it. A clamp (ReLU, ReLU6) is the
fused activation of the operator before it. What lies between the two never exists as integers, so
it has no scale.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import keras

from kqat.graph import Node, Ref, config_of
from kqat.grids import TrainedThreshold
from kqat.parts import is_factor
from kqat.planning.affine_inputs import find_before
from kqat.planning.layer_configs import weight_grids, weight_step
from kqat.planning.planned_graph import PlannedGraph


@dataclasses.dataclass(frozen=True)
class Fusions:
    """Which layers are computed inside another's kernel.

    Args:
        folded: BatchNormalization -> the layer with weights that it folds into; a layer that hands
            its input on, between the two, too.
        factors: layer that only multiplies -> the layer with weights before it. In the file these
            are multiplied in its place: other scales for the same integers.
        activations: clamp -> the layer whose kernel carries it out as its fused activation.
        clamps: value -> the clamp that makes it, which a quantizer carries out where all values
            of its group have the same clamp.
        before: layer that multiplies and adds a number for each channel -> the layers with weights
            behind it. In the file their weights and biases do both.
        inside: values that never exist as integers: they lie between two layers of one kernel.
    """

    folded: Mapping[Node, Node]
    factors: Mapping[Node, Node]
    activations: Mapping[Node, Node]
    clamps: Mapping[Ref, Node]
    before: Mapping[Node, tuple[Node, ...]]
    inside: frozenset[Ref]

    def normalization_of(self, node: Node) -> Node | None:
        """The BatchNormalization that folds into a layer."""
        folded = (norm for norm, into in self.folded.items() if into is node)
        return next((norm for norm in folded if _is_normalization(norm)), None)

    def before_kernel(self, node: Node) -> tuple[Node, ...]:
        """The layers that scale and shift the input of a layer with weights, first to last."""
        return tuple(one for one, kernels in self.before.items() if node in kernels)


def find_fusions(planned: PlannedGraph, *, keeps_clusters: bool = False) -> Fusions:
    """What folds and what fuses, from the graph's edges and the rows of the registry.

    Args:
        planned: the graph, and what is decided about it.
        keeps_clusters: whether training keeps the number of distinct values of weights.
    """
    integer = [node for node in planned.graph.nodes if planned.rules[node] is not None]
    folded = _find_folded(planned, [node for node in integer if _is_normalization(node)])
    activations: dict[Node, Node] = {}
    factors = _find_factors(planned, integer, folded, keeps_clusters)
    before = find_before(planned, integer, folded, factors, keeps_clusters)
    inside = {node.inputs[0] for node in (*folded, *factors)}
    inside |= {node.outputs[0] for node in before}
    for node in integer:
        chain = _chain_of_clamp(planned, node)
        if chain:
            activations[node] = chain[0]
            inside |= {member.outputs[0] for member in chain}
    clamps = {node.outputs[0]: node for node in integer if _quantizer_may_clamp(planned, node)}
    return Fusions(folded, factors, activations, clamps, before, frozenset(inside))


def _is_normalization(node: Node) -> bool:
    return isinstance(node.layer, keras.layers.BatchNormalization)


def _find_folded(planned: PlannedGraph, normalizations: list[Node]) -> dict[Node, Node]:
    """BatchNormalizations, and what stands before them and hands on, -> what they fold into.

    A layer that is called more than once has its weights quantized once, so either all of its
    calls fold or none does, and so it is with the calls of a BatchNormalization.
    """
    chains: dict[Node, list[Node]] = {}
    for node in normalizations:
        chain = planned.chain_before(node)
        rule = planned.rules[chain[0]] if chain else None
        if rule is not None and rule.takes_normalization:
            chains[node] = chain
    by_layer: dict[int, list[Node]] = {}
    for node, chain in chains.items():
        by_layer.setdefault(id(chain[0].layer), []).append(node)
    folded: dict[Node, Node] = {}
    for nodes in by_layer.values():
        if _fold_at_every_call(planned, nodes, chains):
            for node in nodes:
                folded |= dict.fromkeys((*chains[node][1:], node), chains[node][0])
    return folded


def _fold_at_every_call(
    planned: PlannedGraph, nodes: list[Node], chains: Mapping[Node, list[Node]]
) -> bool:
    """Whether the BatchNormalizations behind one layer are behind all its calls, and no other."""
    layer = chains[nodes[0]][0].layer
    if len(nodes) != planned.calls[id(layer)]:
        return False
    between = [[_what_it_does(member) for member in chains[node][1:]] for node in nodes]
    calls = Counter(id(node.layer) for node in nodes)
    alike = all(parts == between[0] for parts in between)
    return alike and all(planned.calls[norm] == count for norm, count in calls.items())


def _find_factors(
    planned: PlannedGraph,
    integer: list[Node],
    folded: Mapping[Node, Node],
    keeps_clusters: bool,
) -> dict[Node, Node]:
    """Layers that only multiply what a layer with weights makes -> that layer.

    Numbers for each channel need weights with scales for each, and turn the integers of some
    channels over, which would make more distinct ones of clusters. Scales that were trained as
    powers of two ship as such.
    """
    found: dict[Node, Node] = {}
    for node in integer:
        producer = planned.only_reader_of(node) if is_factor(node.layer) else None
        kernel = folded.get(producer, producer) if producer else None
        if kernel is None or planned.states is not None:
            continue
        rule, config = planned.rules[kernel], planned.configs[kernel]
        once = planned.calls[id(node.layer)] == planned.calls[id(kernel.layer)] == 1
        if rule is None or config is None or not rule.takes_normalization or not once:
            continue
        grids = weight_grids(kernel.name, kernel.layer, rule, config).values()
        learned = isinstance(weight_step(rule, config), TrainedThreshold)
        if learned or any(spec.power_of_two for spec in grids):
            continue
        single = isinstance(node.layer, keras.layers.Rescaling)
        by_channel = all(spec.axis is not None for spec in grids) and not keeps_clusters
        if single or by_channel:
            found[node] = kernel
    return found


def _what_it_does(node: Node) -> tuple[type, dict[str, Any]]:
    """Equal for layers that do the same: one without weights is made anew for each of its calls."""
    config = config_of(node.layer)
    return type(node.layer), {key: value for key, value in config.items() if key != "name"}


def _chain_of_clamp(planned: PlannedGraph, node: Node) -> list[Node]:
    """The layer whose kernel ends with the clamp `node`, and those between; empty without one."""
    rule = planned.rules[node]
    if rule is None or rule.clamp is None:
        return []
    chain = planned.chain_before(node)
    rule = planned.rules[chain[0]] if chain else None
    return chain if rule and rule.takes_clamp else []


def _quantizer_may_clamp(planned: PlannedGraph, node: Node) -> bool:
    # A regularizer needs the clamp's output before rounding, so the layer stays in the QAT model.
    rule = planned.rules[node]
    return bool(rule and rule.clamp) and node.layer.activity_regularizer is None
