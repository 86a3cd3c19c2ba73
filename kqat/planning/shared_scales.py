"""Which values share one scale.

Operators that move values (pools, reshapes, concatenations) demand one scale for their inputs and
outputs (TFLite quantization specification). So do the states of a recurrence before and after a
step.
"""

from collections.abc import Collection

from kqat.graph import Node, Ref
from kqat.planning.planned_graph import PlannedGraph
from kqat.registry import Output


class SharedScales:
    """Disjoint sets of values; each has a root, the first value that others were joined to."""

    def __init__(self) -> None:
        self._above: dict[Ref, Ref] = {}

    def root(self, ref: Ref) -> Ref:
        """The root of the set of `ref`."""
        while ref in self._above:
            ref = self._above[ref]
        return ref

    def join(self, a: Ref, b: Ref) -> None:
        """Makes one set of those of `a` and `b`; the root is that of `a`."""
        a, b = self.root(a), self.root(b)
        if a is not b:
            self._above[b] = a


def share_scales(planned: PlannedGraph, scaling: Collection[Node] = ()) -> SharedScales:
    """The sets of values that must share one scale, from the graph's edges.

    Args:
        planned: the graph, and what is known of its nodes.
        scaling: layers that a kernel behind them computes, so that they hand integers on.
    """
    shared = SharedScales()
    for before, after in planned.states or ():
        shared.join(before, after)
    for node in planned.graph.nodes:
        kind = planned.output_kind(node)
        vanishes = kind is Output.VANISHES and planned.is_integer(node)
        moves = kind is Output.SAME or vanishes or node in scaling
        if not moves or node.outputs[0].holds_indexes:
            continue
        for ref in (*node.inputs, *node.outputs[1:]):
            if not ref.holds_indexes:
                shared.join(ref, node.outputs[0])
    return shared
