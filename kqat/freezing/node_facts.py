"""What the exporter asks of each node of a frozen graph, from the facts of its layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from kqat.devices import ops_at
from kqat.freezing.frozen_model import NodeFacts
from kqat.graph import Graph, Node, Ref
from kqat.grids import Site
from kqat.parts import Marker, MarkerKind, Requantize, Tabulated, TiedWeight, is_marker
from kqat.planning import activation_of, replacements
from kqat.registry import LayerFacts, stock_facts


def find_node_facts(
    graph: Graph, sites: Sequence[Site], carried: Mapping[int, LayerFacts]
) -> dict[str, NodeFacts]:
    """The facts of the nodes that compute on integers, by their names.

    Args:
        graph: of the frozen model.
        sites: its sites.
        carried: facts that the QAT model carries, by the identity of the frozen layer.
    """
    widths: dict[Ref, int] = {}  # of the values that are integers
    found = {}
    for node in graph.nodes:
        layer: Any = node.layer
        if isinstance(layer, Marker):
            if is_marker(layer, MarkerKind.SITE):
                widths[node.outputs[0]] = sites[layer.index].bits
            continue
        is_table = isinstance(layer, Tabulated)
        fed = all(ref.holds_indexes or ref in widths for ref in node.inputs)
        if not node.inputs or not (is_table or fed):
            continue
        # A layer may stand between two markers with others, all of them integer.
        bits = max((widths[ref] for ref in node.inputs if ref in widths), default=8)
        bits = layer.kernel_bits if isinstance(layer, Requantize) else bits
        widths |= dict.fromkeys(node.outputs, bits)
        found[node.name] = _node_facts(node, bits, carried)
    return found


def _node_facts(node: Node, bits: int, carried: Mapping[int, LayerFacts]) -> NodeFacts:
    table = node.layer if isinstance(node.layer, Tabulated) else None
    layer = node.layer if table is None else table.layer
    facts = carried.get(id(layer))
    if facts is None or isinstance(layer, TiedWeight):  # Each use has facts of its own.
        facts = stock_facts(layer, node.kwargs)
    label = node.name if table is None else layer.name
    if facts is None:
        return NodeFacts(label=label, bits=bits)
    function = activation_of(layer, label)
    # Else there is no kernel of this width, or it is wrong on this very grid.
    computes = table is not None and facts.table and table.bits == 8
    axes = max(len(ref.shape) for ref in (*node.inputs, *node.outputs))
    ops = ops_at(facts.ops, bits, axes)
    return NodeFacts(
        label=label,
        bits=bits,
        ops=ops,
        own_kernel=ops if computes else (),
        keeps_integers=table is None and facts.keeps_integers(),
        function=function,
        replacements=replacements(function, bits),
    )
