"""Which layers of a model do not fit a device, and the model in which they are replaced."""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.devices import (
    NEAREST,
    NEVER_PACKED,
    PACKED,
    PACKED_BITS,
    STAND_INS,
    TARGETS,
    Misfit,
    Replacement,
    Target,
    edge_tpu_shapes,
    misfit,
    most_axes,
    moves_integers,
    ops_at,
)
from kqat.graph import Graph, Node, activation_name, copied, duplicate
from kqat.parts import Requantize
from kqat.planning.plan import LayerPlan, Plan, Role
from kqat.registry import ACTIVATIONS, as_layers, rule_for


def misfits(graph: Graph, plan: Plan, target: Target) -> tuple[Misfit, ...]:
    """The layers of a model that do not fit, each with the nearest change that would.

    Args:
        graph: of the user's model.
        plan: what becomes of its layers.
        target: the device.
    """
    functions = {node.name: activation_of(node.layer, node.name) for node in graph.nodes}
    made = _layers(plan)
    parts = [part for part in plan.layers if part.role is not Role.FLOAT]
    unfit: dict[tuple[str, int], dict[str, bool]] = {}
    for part in parts:
        layer = made[part.name]
        bits = layer.kernel_bits if isinstance(layer, Requantize) else part.bits
        unfit.setdefault((part.origin, bits), {}).update(_unfit(part, layer, target, bits))
    slow = []
    for (origin, bits), ops in unfit.items():
        function = functions.get(origin)
        if ops:
            slow.append(misfit(origin, ops, function, replacements(function, bits), target, bits))
    more = [m for part in parts for m in _unpacked(part, target)]
    more += [m for part, node in _integer_nodes(plan) for m in _beyond_kernels(part, node, target)]
    if target.name == "edge_tpu":
        more += _limited(plan)
    return (*slow, *dict.fromkeys(more))


def _layers(plan: Plan) -> dict[str, Any]:
    """The layers of a plan and of its recurrences' steps, by the names of their nodes."""
    made = {node.name: node.layer for node in plan.graph.nodes}
    for step in plan.steps.values():
        made |= _layers(step)
    return made


def activation_of(layer: Any, name: str) -> str | None:
    """Keras's name of the function that a layer or operation applies to its output, if it does."""
    if isinstance(layer, layers.ELU | layers.LeakyReLU):
        return "elu" if isinstance(layer, layers.ELU) else "leaky_relu"
    if not isinstance(layer, keras.layers.Layer):
        try:
            made = as_layers(layer, name)
        except UnsupportedLayerError:  # A float layer's; others were refused before.
            return None
        return activation_of(made, name) if isinstance(made, keras.layers.Layer) else None
    function = getattr(layer, "activation", None)
    return None if function is None else activation_name(function)


def replacements(function: str | None, bits: int) -> tuple[Replacement, ...]:
    """The activation functions nearest to `function`, best first.

    Args:
        function: Keras's name of an activation, or `None`.
        bits: width of the activations that they would read.
    """
    names = NEAREST.get(function or "", ())
    rules = [(name, ACTIVATIONS[name]) for name in names]
    return tuple(
        Replacement(name, ops_at(rule.ops, bits, 0), rule.is_table(bits)) for name, rule in rules
    )


def with_replacements(graph: Graph, found: Sequence[Misfit], name: str) -> keras.Model:
    """A copy of the model `graph` was traced from, with the activations that `found` names."""
    chosen = {unfit.layer: unfit.replacement for unfit in found if unfit.replacement}
    return copied(graph, name, lambda node: _replaced(node, chosen.get(node.name)))


def _replaced(node: Node, activation: str | None) -> Any:
    layer = node.layer
    if activation is None:
        return duplicate(layer, node.name)
    alone = layers.ELU | layers.LeakyReLU
    if isinstance(layer, keras.layers.Layer) and not isinstance(layer, alone):
        return duplicate(layer, node.name, activation=activation)
    return layers.Activation(activation, name=node.name)


def _integer_nodes(plan: Plan) -> Iterator[tuple[LayerPlan, Node]]:
    """What ships as integers, of a plan and of its recurrences' steps."""
    nodes = {node.name: node for node in plan.graph.nodes}
    for part in plan.layers:
        if part.role is not Role.FLOAT and part.name in nodes:
            yield part, nodes[part.name]
    for step in plan.steps.values():
        yield from _integer_nodes(step)


def _beyond_kernels(part: LayerPlan, node: Node, target: Target) -> Iterator[Misfit]:
    """What to say about values that a kernel does not take: of many axes, or without a scale."""
    axes = max(len(ref.shape) for ref in (*node.inputs, *node.outputs))
    large = tuple(op for op in part.ops if axes > most_axes(op, target.runtime))
    if large:
        most = min(most_axes(op, target.runtime) for op in large)
        yield _blocking(
            part,
            large,
            f"does not run there on values of {axes} axes, the batch among them",
            f"reshape to {most} axes at most before it, or leave it float",
        )
    if all(ref.holds_indexes for ref in (*node.inputs, node.outputs[0])):
        fixed = tuple(op for op in part.ops if not moves_integers(op, target.runtime))
        if fixed:
            yield _blocking(
                part,
                fixed,
                f"does not move {node.outputs[0].dtype} there, indexes or truth values",
                "move what is looked up or computed of them, use slices and concatenate, or "
                "compute them before the model",
            )


def _blocking(part: LayerPlan, operators: tuple[str, ...], reason: str, remedy: str) -> Misfit:
    return Misfit(
        layer=part.origin,
        operators=operators,
        blocking=True,
        reason=reason,
        replacement=None,
        remedy=remedy,
    )


def _unpacked(part: LayerPlan, target: Target) -> Iterator[Misfit]:
    """What to say about weights of so few bits that they could be packed, and will not be."""
    for spec in part.weights.values():
        packable = [op for op in part.ops if op in (*PACKED[PACKED_BITS], *NEVER_PACKED)]
        if spec.bits > PACKED_BITS or not packable:
            continue
        if not target.packs(packable[0], spec.axis is None, part.bits):
            remedy = "this target has no kernel for packed weights"
        elif packable[0] in target.slow_packed and part.bits == 8:
            remedy = (
                "the target's kernel for packed ones is several times as slow; "
                "convert(weights='packed') takes half the bytes for that time"
            )
        else:
            continue
        yield Misfit(
            layer=part.origin,
            operators=(packable[0],),
            blocking=False,
            reason=f"stores its {spec.bits}-bit weights as int8",
            replacement=None,
            remedy=remedy,
        )


def _limited(plan: Plan) -> Iterator[Misfit]:
    """What to say about operators that the Edge TPU has, but not for shapes such as these."""
    device = TARGETS["edge_tpu"]
    nodes = {node.name: node for node in plan.graph.nodes}
    for part in plan.layers:
        for op in part.ops if part.name in nodes else ():
            if part.role is Role.FLOAT or not device.accelerates(op, part.bits):
                continue
            if any(STAND_INS.get(other) == op for other in part.ops):
                continue  # It stands in on other devices.
            node = nodes[part.name]
            # A plan's shapes have no size for the batch, which is one there.
            source, result = (refs[0].shape[1:] for refs in (node.inputs, node.outputs))
            values = [ref.shape[1:] for ref in (*node.inputs, *node.outputs)]
            axes = next(filter(None, map(edge_tpu_shapes.too_many_axes, values)), None)
            if problem := axes or edge_tpu_shapes.shape_limit(op, source, result):
                yield Misfit(
                    layer=part.origin,
                    operators=(op,),
                    blocking=False,
                    reason=f"runs, but not on {device.accelerator}, for it {problem}",
                    replacement=None,
                    remedy="use other shapes if that is too slow",
                )


def _unfit(part: LayerPlan, layer: Any, target: Target, bits: int) -> dict[str, bool]:
    table = rule_for(layer, part.name).is_table(bits) and part.role is Role.INTEGER
    return target.unfit(part.ops, table, bits)
