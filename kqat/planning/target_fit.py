"""Which layers of a model do not fit a device, and the model in which they are replaced."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.devices import (
    NEAREST,
    NEVER_PACKED,
    PACKED,
    PACKED_BITS,
    TARGETS,
    Misfit,
    Target,
    edge_tpu_shapes,
)
from kqat.graph import Graph, Node, activation_name, duplicate, rebuild
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
    slow = [
        misfit(origin, ops, functions.get(origin), target, bits)
        for (origin, bits), ops in unfit.items()
        if ops
    ]
    more = [m for part in parts for m in _unpacked(part, target)]
    if target.name == "edge_tpu":
        more += _limited(plan)
    return (*slow, *dict.fromkeys(more))


def _layers(plan: Plan) -> dict[str, Any]:
    """The layers of a plan and of its recurrences' steps, by the names of their nodes."""
    made = {node.name: node.layer for node in plan.graph.nodes}
    for step in plan.steps.values():
        made |= _layers(step)
    return made


def misfit(
    layer: str, ops: Mapping[str, bool], function: str | None, target: Target, bits: int = 8
) -> Misfit:
    """What to say about a layer some of whose operators do not fit.

    Args:
        layer: its name.
        ops: the operators that are not on the accelerator, and whether anything runs them.
        function: the layer's activation, where it has one.
        target: the device.
        bits: width of the layer's activations.
    """
    nearest = (name for name in NEAREST.get(function or "", ()) if _fits(name, target, bits))
    replacement = next(nearest, None)
    if replacement is not None:
        remedy = f"use {replacement} for {function}, as kqat.adapt does, and train on"
    elif bits > 8 and set(ops) == {"QUANTIZE"}:
        remedy = "give the layers on both sides of it one width"
    elif bits > 8 and all(target.is_fast(op) for op in ops):
        remedy = "give it 'int8' in the policy, for which the kernel is there"
    elif target.accelerator:
        remedy = "use other layers if that is too slow"
    else:
        remedy = "use another layer, or leave it float"
    blocking = not all(ops.values())
    width = f" on int{bits}" if bits > 8 else ""
    lacking = "does not run there" if blocking else f"runs, but not on {target.accelerator}"
    return Misfit(
        layer=layer,
        operators=tuple(sorted(ops)),
        blocking=blocking,
        reason=lacking + width,
        replacement=replacement,
        remedy=remedy,
    )


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


def with_replacements(graph: Graph, found: Sequence[Misfit], name: str) -> keras.Model:
    """A copy of the model `graph` was traced from, with the activations that `found` names."""
    chosen = {misfit.layer: misfit.replacement for misfit in found if misfit.replacement}
    copies: dict[int, Any] = {}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        # Calls of one layer share its weights, and so must the copy's.
        if id(node.layer) not in copies:
            copies[id(node.layer)] = _replaced(node, chosen.get(node.name))
        return copies[id(node.layer)](*args, **kwargs)

    return rebuild(graph, call, name, graph.output_names)


def _replaced(node: Node, activation: str | None) -> Any:
    layer = node.layer
    if activation is None:
        return duplicate(layer, node.name)
    alone = layers.ELU | layers.LeakyReLU
    if isinstance(layer, keras.layers.Layer) and not isinstance(layer, alone):
        return duplicate(layer, node.name, activation=activation)
    return layers.Activation(activation, name=node.name)


def _unpacked(part: LayerPlan, target: Target) -> Iterator[Misfit]:
    """What to say about weights of so few bits that they could be packed, and will not be."""
    for spec in part.weights.values():
        packable = [op for op in part.ops if op in (*PACKED[PACKED_BITS], *NEVER_PACKED)]
        if spec.bits > PACKED_BITS or not packable:
            continue
        if target.packs(packable[0], spec.axis is None, part.bits):
            continue
        yield Misfit(
            layer=part.origin,
            operators=(packable[0],),
            blocking=False,
            reason=f"stores its {spec.bits}-bit weights as int8",
            replacement=None,
            remedy="this target has no kernel for packed weights",
        )


def _limited(plan: Plan) -> Iterator[Misfit]:
    """What to say about operators that the Edge TPU has, but not for shapes such as these."""
    device = TARGETS["edge_tpu"]
    nodes = {node.name: node for node in plan.graph.nodes}
    for part in plan.layers:
        for op in part.ops if part.name in nodes else ():
            if part.role is Role.FLOAT or not device.accelerates(op, part.bits):
                continue
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


def _fits(function: str, target: Target, bits: int) -> bool:
    rule = ACTIVATIONS[function]
    return not target.unfit(rule.ops, rule.is_table(bits), bits)
