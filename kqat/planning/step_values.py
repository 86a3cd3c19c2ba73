"""Values of a recurrence's step that need a grid of their own: a `Requantize` stands behind each.

The inputs of a step are rounded outside of it. Where an operator demands one scale for such an
input and for other values, as a concatenation with a state does, the input takes on the others'
grid inside the step. So it does where values on its grid are rounded inside, as its means are. A
state that a step hands on as it is, or chooses from other values, gets the rounding that all states
have.
"""

import dataclasses

from kqat.graph import Graph, Node, Ref, fill, unique_name
from kqat.parts import Requantize
from kqat.planning.planned_graph import PlannedGraph
from kqat.planning.shared_scales import share_scales
from kqat.registry import Output


def with_own_grids(planned: PlannedGraph, sequences: int, bits: int) -> Graph:
    """The graph of a step, with a `Requantize` behind each of its inputs that needs one.

    Args:
        planned: the graph of a step, and what is known of its nodes.
        sequences: how many of its inputs are no states.
        bits: of its activations.
    """
    graph, shared = planned.graph, share_scales(planned)
    made = [ref for n in graph.nodes if _makes_values(planned, n) for ref in n.outputs]
    others = {shared.root(ref) for ref in (*made, *graph.inputs[sequences:])}
    steps = [ref for ref in graph.inputs[:sequences] if not ref.holds_indexes]
    wanted = [ref for ref in steps if shared.root(ref) in others]
    handed_on = {ref for ref in graph.outputs if _lacks_rounding(planned, ref)}
    if not wanted and not handed_on:
        return graph
    taken = {*graph.input_names, *(node.name for node in graph.nodes)}
    names = dict(zip(graph.inputs, graph.input_names, strict=True))
    names |= {ref: node.name for node in graph.nodes for ref in node.outputs}

    def requantized(ref: Ref) -> Node:
        name = unique_name(f"{names[ref]}_grid", taken)
        layer = Requantize(bits, bits, name=name)
        return Node(name, layer, (ref,), {}, (Ref(ref.shape, ref.dtype),))

    before = {ref: requantized(ref) for ref in wanted}
    behind = {ref: requantized(ref) for ref in handed_on}

    def inside(ref: Ref) -> Ref:
        return before[ref].outputs[0] if ref in before else ref

    nodes = []
    for node in graph.nodes:
        args, kwargs = fill((node.args, node.kwargs), inside)
        nodes.append(dataclasses.replace(node, args=args, kwargs=kwargs))
    outputs = fill(
        graph.output_struct,
        lambda ref: behind[ref].outputs[0] if ref in behind else ref,
    )
    return dataclasses.replace(
        graph, nodes=(*before.values(), *nodes, *behind.values()), output_struct=outputs
    )


def _makes_values(planned: PlannedGraph, node: Node) -> bool:
    """Whether the outputs of a node are rounded in the step, be it on the grid of its inputs."""
    kind, rule = planned.output_kind(node), planned.rules[node]
    rounds = kind is Output.SAME and rule is not None and rule.rounds
    return rounds or kind in (Output.OWN, Output.FIXED, Output.INSIDE)


def _lacks_rounding(planned: PlannedGraph, ref: Ref) -> bool:
    """Whether an output of a step is not rounded as it is made: an input, or one of other values.

    Layers that compute nothing may stand behind it.
    """
    node = planned.producers.get(ref)
    if node is None:
        return True
    kind, rule = planned.output_kind(node), planned.rules[node]
    if kind is Output.VANISHES:
        return _lacks_rounding(planned, node.inputs[0])
    return kind is Output.SAME and not (rule and rule.rounds)
