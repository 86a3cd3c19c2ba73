"""Graph and policy to `Plan`: who gets which quantizer, before a weight is touched.

`make_plan` prepares the graph: one config per layer, composite layers taken apart, a
requantization where two widths meet. `_decide` then asks four questions, each answered once from
the graph's edges and the rows of the registry, each by a module of its own:

    planned_graph   which nodes compute on integers, and which stay float
    fusions         which layers are computed inside another's kernel
    shared_scales   which values share one scale
    groups          which quantizer rounds which value
"""

import dataclasses
from collections.abc import Collection, Mapping

from kqat.base import ModelError, UnsupportedLayerError
from kqat.config import QuantizeConfig, QuantizePolicy
from kqat.devices import ops_at
from kqat.graph import Graph, Node, trace
from kqat.grids import MaxAbs, QuantSpec
from kqat.parts import Recurrence, Requantize, Select, reads_rows
from kqat.planning.additive_masks import check_hidden_values, hide_added_masks
from kqat.planning.biases import join_biases
from kqat.planning.byte_inputs import read_bytes
from kqat.planning.chained_functions import join_functions
from kqat.planning.clips import clip_by_grids
from kqat.planning.counted_sums import scale_sums
from kqat.planning.followers import follow_neighbours
from kqat.planning.fusions import Fusions, find_fusions
from kqat.planning.groups import Quantizers, check_given_ranges, place_quantizers
from kqat.planning.hard_sigmoids import split_hard_sigmoids
from kqat.planning.layer_configs import (
    assign_configs,
    fused_nodes,
    stays_whole,
    weight_grids,
    weight_step,
)
from kqat.planning.operand_order import broadcast_first
from kqat.planning.plan import LayerPlan, Plan, Role
from kqat.planning.planned_graph import PlannedGraph, State, planned_graph
from kqat.planning.rank_limits import fit_ranks
from kqat.planning.repetitions import drop_repetitions
from kqat.planning.row_sums import join_row_sums
from kqat.planning.shared_scales import share_scales
from kqat.planning.squared_differences import join_squares
from kqat.planning.step_values import with_own_grids
from kqat.planning.tied_weights import expand_tied, of_one_config
from kqat.planning.transpositions import carry_transpositions
from kqat.planning.weight_penalties import keep_penalties
from kqat.planning.width_changes import match_widths
from kqat.registry import Output


def make_plan(
    graph: Graph, policy: QuantizePolicy, model_name: str, *, keeps_clusters: bool = False
) -> Plan:
    """Decides about every layer of `graph`, the graph of a float model.

    Args:
        graph: of a float model.
        policy: the user's rules.
        model_name: for the plan.
        keeps_clusters: whether training keeps the number of distinct values of weights.

    Raises:
        UnsupportedLayerError: if a layer that is to be quantized has no integer form.
        PolicyError: if the policy asks for what cannot ship.
    """
    configs, input_configs, unused = assign_configs(graph, policy, model_name)
    configs = follow_neighbours(graph, configs)
    graph, configs = read_bytes(graph, configs, input_configs)
    whole = {n.name for n in graph.nodes if stays_whole(n.layer, configs[n.name])}
    fused = fused_nodes(graph, configs)
    simple, origins, readers = expand_tied(
        graph, lambda node: node.name in whole, model_name, configs, fused
    )
    keep_penalties(graph, simple)
    tied = of_one_config(graph, readers)
    simple, origins = _as_kernels_compute(simple, origins, configs, whole, model_name)
    masks = graph.output_masks
    simple, new = match_widths(simple, origins, configs, input_configs)
    origins, configs = {**origins, **{name: name for name in new}}, {**configs, **new}
    plan = _decide(
        dataclasses.replace(simple, output_masks=masks),
        origins,
        configs,
        model_name,
        input_configs=input_configs,
        unused_rules=unused,
        output_names=graph.output_names,
        keeps_clusters=keeps_clusters,
    )
    return dataclasses.replace(plan, tied=tied)


def _as_kernels_compute(
    graph: Graph,
    origins: Mapping[str, str],
    configs: Mapping[str, QuantizeConfig | None],
    whole: Collection[str],
    name: str,
) -> tuple[Graph, dict[str, str]]:
    """`graph` and `origins` with what neighbouring layers do together as kernels do it.

    Of a model and of the step of a recurrence alike.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name.
        whole: names of user's layers that stay as they are.
        name: of the model.
    """
    graph, origins = carry_transpositions(graph, origins, configs, name)
    graph, origins = drop_repetitions(graph, origins, configs, name)
    graph, origins = scale_sums(graph, origins, configs, name)
    graph, origins = hide_added_masks(graph, origins, whole, name)
    check_hidden_values(graph, origins)
    graph, origins = split_hard_sigmoids(graph, origins, configs, name)
    graph = join_biases(graph, origins, configs, name)
    graph = join_squares(graph, origins, configs, name)
    graph = clip_by_grids(graph, origins, configs, name)
    graph = join_functions(graph, origins, configs, name)
    graph = join_row_sums(graph, origins, configs, name)
    graph, origins = fit_ranks(graph, origins, configs, name)
    return broadcast_first(graph), origins


def _step_plan(recurrence: Recurrence, origin: str, config: QuantizeConfig, given: int) -> Plan:
    """The plan of one step: its inputs come rounded, and a state keeps its scale.

    Args:
        recurrence: the layer.
        origin: name of the user's layer.
        config: of that.
        given: how many of the states, the last ones, come from outside before the first step.
    """
    graph, configs = trace(recurrence.step), {origin: config}
    by_node = dict.fromkeys((node.name for node in graph.nodes), config)
    simple, parts, _ = expand_tied(graph, lambda node: False, recurrence.step.name, by_node)
    origins = dict.fromkeys(parts, origin)
    name = recurrence.step.name
    simple, origins = _as_kernels_compute(simple, origins, configs, frozenset(), name)
    before = simple.inputs[recurrence.sequences :]
    states = tuple(zip(before, simple.outputs, strict=True))
    planned = planned_graph(simple, origins, configs, {}, states)
    step = with_own_grids(planned, recurrence.sequences, config.activation.bits)
    states = tuple(zip(before, step.outputs, strict=True))
    origins = {node.layer.name: origin for node in step.nodes}
    return _decide(step, origins, configs, recurrence.step.name, states=states, given=given)


def _decide(
    graph: Graph,
    origins: Mapping[str, str],
    configs: Mapping[str, QuantizeConfig | None],
    model_name: str,
    *,
    input_configs: Mapping[str, QuantizeConfig] | None = None,
    unused_rules: tuple[str, ...] = (),
    output_names: tuple[str, ...] = (),
    states: tuple[State, ...] | None = None,
    given: int = 0,
    keeps_clusters: bool = False,
) -> Plan:
    """Every decision about a graph of simple layers.

    Args:
        graph: of simple layers, in which every value has one width.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name.
        model_name, input_configs, unused_rules, output_names: for the plan.
        states, given: of the graph of one step; see `PlannedGraph`.
        keeps_clusters: see `make_plan`.
    """
    planned = planned_graph(graph, origins, configs, input_configs or {}, states, given)
    _check_quantities(planned)
    steps = {
        node: _step_plan(node.layer, planned.user_names[node], config, _given(planned, node))
        for node, config in planned.configs.items()
        if config and planned.output_kind(node) is Output.INSIDE
    }
    planned = planned.with_steps(steps)
    fusions = find_fusions(planned, keeps_clusters=keeps_clusters)
    shared = share_scales(planned, fusions.before)
    quantizers = place_quantizers(planned, fusions, shared)
    check_given_ranges(planned, fusions, shared, quantizers)

    layers = [_layer_plan(planned, fusions, quantizers, node) for node in graph.nodes]
    # Calls of one recurrence share its step.
    parts = {id(node.layer): plan for node, plan in steps.items()}.values()
    return Plan(
        model_name=model_name,
        layers=(*layers, *(layer for plan in parts for layer in plan.layers)),
        groups=(*quantizers.groups.values(), *(group for plan in parts for group in plan.groups)),
        unused_rules=unused_rules,
        input_names=graph.input_names,
        output_names=output_names,
        graph=graph,
        roundings=quantizers.roundings,
        steps={node.name: plan for node, plan in steps.items()},
        rules={node.name: rule for node, rule in planned.rules.items() if rule is not None},
    )


def _given(planned: PlannedGraph, node: Node) -> int:
    """How many initial states a recurrence is given, at any of its calls: these share a step."""
    calls = [other for other in planned.graph.nodes if other.layer is node.layer]
    return max(len(call.inputs) for call in calls) - int(calls[0].layer.sequences)


def _check_quantities(planned: PlannedGraph) -> None:
    """Checks that layers read integers without a scale where they are indexes, and only there.

    Raises:
        ModelError: if an Embedding reads quantities, whose integers stand on a grid.
        UnsupportedLayerError: if a layer that computes with quantities reads indexes; Keras would
            cast them to float for it.
    """
    makers = {ref: f"'{planned.user_names[n]}'" for n in planned.rules for ref in n.outputs}
    inputs = zip(planned.graph.inputs, planned.graph.input_names, strict=False)
    makers |= {ref: f"input '{name}'" for ref, name in inputs}
    computed = [
        (node, rule)
        for node, rule in planned.rules.items()
        if rule is not None and not stays_whole(node.layer, planned.configs[node])
    ]
    for node, _ in computed:  # First, as a table says best what was meant.
        if _looks_up(node) and not any(ref.holds_indexes for ref in node.inputs):
            raise ModelError(
                "Expected indexes, integers all the way to the table, for layer "
                f"'{planned.user_names[node]}' of type {type(node.layer).__name__}. Received: a "
                f"quantity, of {makers[node.inputs[0]]}. Give the model an input for indexes, "
                'keras.Input(shape, dtype="int32"), and compute them before the model, or with '
                "slices, concatenate, pad, +, -, *, // and % by numbers, maximum, minimum, clip, "
                "sum, cumsum, comparisons, where and argmax alone."
            )
    for node, rule in computed:
        read = [ref for ref in node.inputs if ref.holds_indexes and ref.dtype != "uint8"]
        if not read:
            continue
        takes_them = _looks_up(node) or rule.output in (Output.INDEX, Output.INSIDE)
        same = rule.output in (Output.SAME, Output.VANISHES) and not rule.rounds
        hands_on = same and node.outputs[0].holds_indexes
        selects = isinstance(node.layer, Select) and set(read) == {node.inputs[0]}
        if not (takes_them or hands_on or selects):
            raise UnsupportedLayerError(
                f"Expected '{planned.user_names[node]}' of type {type(node.layer).__name__} to "
                f"read quantities. Received: {read[0].dtype} of {makers[read[0]]}, indexes or "
                "truth values, which have no scale. Cast truth values to float first "
                "(keras.ops.cast), look indexes up in an Embedding, or give the model one more "
                "input, float32, for numbers that are quantities."
            )


def _looks_up(node: Node) -> bool:
    return reads_rows(node.layer, node.kwargs)


def _layer_plan(
    planned: PlannedGraph, fusions: Fusions, quantizers: Quantizers, node: Node
) -> LayerPlan:
    """What the plan says about one node."""
    rule, config = planned.rules[node], planned.configs[node]
    roundings = quantizers.roundings.get(node.outputs[0], ())
    normalization = fusions.normalization_of(node)
    role, note = _role(planned, fusions, quantizers, node)
    folded = fusions.folded.get(node) or fusions.factors.get(node)
    behind = next(iter(fusions.before.get(node, ())), None)
    into = folded or behind or fusions.activations.get(node)
    weights: dict[str, QuantSpec] = {}
    ops: tuple[str, ...] = ()
    if rule and config and role is Role.INTEGER:
        weights = weight_grids(node.name, node.layer, rule, config)
    if rule and role in (Role.INTEGER, Role.CLAMP) and node not in fusions.activations:
        axes = max(len(ref.shape) for ref in (*node.inputs, *node.outputs))
        ops = ops_at(rule.ops, config.activation.bits if config else 8, axes)
    return LayerPlan(
        name=node.name,
        origin=planned.user_names[node],
        kind=type(node.layer).__name__,
        role=role,
        weights=weights,
        weight_step=weight_step(rule, config) if rule and config else MaxAbs(),
        weight_gradient=config.weight_gradient if config else None,
        normalization=normalization.name if normalization else None,
        scaled_by=tuple(one.name for one in fusions.before_kernel(node)),
        group=roundings[-1].group if roundings else None,
        ops=ops,
        bits=config.activation.bits if config else 0,
        note=note,
        into=into.name if into else None,
        output=rule.output if rule else None,
    )


def _role(
    planned: PlannedGraph, fusions: Fusions, quantizers: Quantizers, node: Node
) -> tuple[Role, str]:
    """What becomes of a node, and a note on it."""
    rule = planned.rules[node]
    if rule is None:
        return Role.FLOAT, "the policy leaves it float"
    if node in fusions.folded:
        return Role.FOLDED, f"into {fusions.folded[node].name}"
    if node in fusions.factors:
        return Role.FACTOR, f"into the weights of {fusions.factors[node].name}"
    if node in fusions.before:
        names = ", ".join(kernel.name for kernel in fusions.before[node])
        return Role.FACTOR, f"into the weights of {names}"
    if rule.output is Output.VANISHES:
        return Role.TRAINING_ONLY, "no operator in the file"
    if node in fusions.activations:
        return Role.CLAMP, f"fused into {fusions.activations[node].name}"
    if node.outputs[0] in quantizers.clamped:
        return Role.CLAMP, "operator of its own"
    if len(quantizers.roundings.get(node.outputs[0], ())) > 1:
        return Role.INTEGER, "requantized: the kernel's fixed scale meets a group with another"
    if isinstance(node.layer, Requantize):
        bits = f"int{node.layer.source_bits} to int{node.layer.bits}"
        return Role.INTEGER, f"two widths meet: {bits}"
    return Role.INTEGER, rule.output.value
