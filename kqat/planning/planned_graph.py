"""The graph that is planned, and what is known of each of its nodes before anything is decided."""

import dataclasses
import functools
from collections.abc import Mapping

from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, Ref
from kqat.grids import RangeMethod
from kqat.planning.layer_configs import row_for
from kqat.planning.plan import Plan
from kqat.registry import LayerRule, Output

State = tuple[Ref, Ref]


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedGraph:
    """A graph of simple layers, each with its config and its row of the registry.

    Args:
        graph: of simple layers, as `expand` makes them.
        user_names: node -> name of the user's layer that it is a part of, which policies and
            messages know.
        configs: node -> its config; `None` where the policy leaves the node float.
        rules: node -> its row of the registry; `None` where the node is float.
        input_configs: configs that rules of the policy give to model inputs, by name.
        states: for the graph of one step: each state before and after it, which share a scale.
            `None` for a whole model. The inputs of a step are rounded outside of it.
        given: how many of the states, the last ones, come from outside before the first step.
        steps: recurrence -> the plan of one of its steps.
    """

    graph: Graph
    user_names: Mapping[Node, str]
    configs: Mapping[Node, QuantizeConfig | None]
    rules: Mapping[Node, LayerRule | None]
    input_configs: Mapping[str, QuantizeConfig]
    states: tuple[State, ...] | None = None
    given: int = 0
    steps: Mapping[Node, Plan] = dataclasses.field(default_factory=dict)

    def with_steps(self, steps: Mapping[Node, Plan]) -> "PlannedGraph":
        """The same with the plans of the recurrences' steps."""
        return dataclasses.replace(self, steps=steps)

    @functools.cached_property
    def consumers(self) -> dict[Ref, list[Node]]:
        """The nodes that read each value."""
        return self.graph.consumers()

    @functools.cached_property
    def producers(self) -> dict[Ref, Node]:
        """The node that makes each value; none for a model input."""
        return self.graph.producers()

    @functools.cached_property
    def calls(self) -> dict[int, int]:
        """How often each layer is called, by its `id`."""
        return self.graph.calls()

    @functools.cached_property
    def given_states(self) -> tuple[Ref, ...]:
        """The states, before a step, that come from outside before the first."""
        before = [ref for ref, _ in self.states or ()]
        return tuple(before[len(before) - self.given :])

    @functools.cached_property
    def outputs(self) -> frozenset[Ref]:
        """The model's outputs."""
        return frozenset(self.graph.outputs)

    def output_kind(self, node: Node) -> Output | None:
        """How the scale of the node's output comes about; `None` where the node is float."""
        rule = self.rules[node]
        return rule.output if rule else None

    def is_integer(self, node: Node) -> bool:
        """Whether the node computes on integers; training-only layers are as their input is."""
        if self.output_kind(node) is Output.VANISHES:
            producer = self.producers.get(node.inputs[0])
            return self.is_integer(producer) if producer else self.is_rounded(node.inputs[0])
        return self.rules[node] is not None

    def is_rounded(self, ref: Ref) -> bool:
        """Whether a model input becomes integers: some consumer computes on them."""
        if ref.holds_indexes:
            return False
        return any(self._computes_on_integers(node) for node in self.consumers[ref])

    def _computes_on_integers(self, node: Node) -> bool:
        if self.output_kind(node) is Output.VANISHES:
            return any(self.is_rounded(ref) for ref in node.outputs)
        return self.rules[node] is not None

    def only_reader_of(self, node: Node) -> Node | None:
        """The producer of the node's input, if nothing but the node reads that."""
        ref = node.inputs[0]
        alone = len(self.consumers[ref]) == 1 and ref not in self.outputs
        return self.producers.get(ref) if alone else None

    def chain_before(self, node: Node) -> list[Node]:
        """What makes the node's input, and behind it the layers that hand it on as it is.

        Of values that nothing else reads; the list is empty where something else does. It ends
        with the node's own producer.
        """
        producer = self.only_reader_of(node)
        if producer is None:
            return []
        if self.output_kind(producer) is not Output.VANISHES:
            return [producer]
        before = self.chain_before(producer)
        return [*before, producer] if before else []

    def reader_config(self, ref: Ref) -> QuantizeConfig | None:
        """The config of the first integer layer that reads a value and stays in the file."""
        for reader in filter(self.is_integer, self.consumers[ref]):
            config = self.configs[reader]
            if self.output_kind(reader) is Output.VANISHES:
                config = self.reader_config(reader.outputs[0])
            if config is not None:
                return config
        return None

    def is_inner(self, node: Node) -> bool:
        """Whether the node is a part of a user's layer before the last one."""
        readers = self.consumers[node.outputs[0]]
        return any(self.user_names[reader] == self.user_names[node] for reader in readers)

    def range_inside(self, node: Node, ref: Ref) -> RangeMethod:
        """The range of an output of a recurrence: that of a state, the first for the sequence."""
        step, index = self.steps[node], node.outputs.index(ref)
        state = index - 1 + node.layer.own_output if index else 0
        rounding = step.roundings[step.graph.outputs[state]][-1]
        return next(g.range_method for g in step.groups if g.name == rounding.group)


def planned_graph(
    graph: Graph,
    origins: Mapping[str, str],
    configs: Mapping[str, QuantizeConfig | None],
    input_configs: Mapping[str, QuantizeConfig],
    states: tuple[State, ...] | None = None,
    given: int = 0,
) -> PlannedGraph:
    """The graph with what is known of its nodes, but for the steps of recurrences.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name.
        input_configs, states, given: see `PlannedGraph`.

    Raises:
        UnsupportedLayerError: if the registry has no row for a layer that is to be quantized.
    """
    user_names = {node: origins[node.layer.name] for node in graph.nodes}
    by_node = {node: configs[name] for node, name in user_names.items()}
    return PlannedGraph(
        graph=graph,
        user_names=user_names,
        configs=by_node,
        rules={
            node: row_for(node.layer, user_names[node], by_node[node], node.kwargs)
            for node in graph.nodes
        },
        input_configs=input_configs,
        states=states,
        given=given,
    )
