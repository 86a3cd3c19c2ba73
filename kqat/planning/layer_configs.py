"""Graph and policy to what is asked of each layer: its config, its row of the registry, the grid of
each of its weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kqat.base import PolicyError
from kqat.config import QuantizeConfig, QuantizePolicy, RecurrenceForm
from kqat.graph import Graph
from kqat.grids import MaxAbs, QuantSpec, StepMethod
from kqat.registry import LayerRule, Output, channel_axes, is_custom, row_of_class, rule_for


def assign_configs(
    graph: Graph, policy: QuantizePolicy
) -> tuple[dict[str, QuantizeConfig | None], dict[str, QuantizeConfig], tuple[str, ...]]:
    """Configs of the nodes, configs that rules give to model inputs, and rules that matched none.

    An input without a rule of its own takes the config of the first layer that reads it, a later
    call of a layer that of the first.
    """
    configs: dict[str, QuantizeConfig | None] = {}
    used: set[int | None] = set()
    by_layer: dict[int, tuple[str, QuantizeConfig | None]] = {}
    for node in graph.nodes:
        index = policy.match(node.name, node.layer)
        used.add(index)
        config = policy.default if index is None else policy.rules[index][1]
        first, earlier = by_layer.setdefault(id(node.layer), (node.name, config))
        if index is None:
            config = earlier
        if earlier != config:
            raise PolicyError(
                f"Expected one config for the calls '{first}' and '{node.name}' of one layer: its "
                f"weights are quantized once. Received: {earlier} and {config}."
            )
        configs[node.name] = config
    input_configs = {}
    for name in graph.input_names:
        index = policy.match(name, None)
        if index is not None and policy.rules[index][1] is not None:
            used.add(index)
            input_configs[name] = policy.rules[index][1]
    unused = tuple(str(key) for i, (key, _) in enumerate(policy.rules) if i not in used)
    return configs, input_configs, unused


def fused_nodes(graph: Graph, configs: Mapping[str, QuantizeConfig | None]) -> frozenset[str]:
    """Names of the nodes whose config says `recurrence="fused"`.

    Raises:
        PolicyError: if such a config has no recurrent layer.
    """
    chosen = [
        n for n in graph.nodes if (c := configs[n.name]) and c.recurrence is RecurrenceForm.FUSED
    ]
    recurrent = {id(configs[node.name]) for node in chosen if _is_recurrent(node.layer)}
    for node in chosen:
        if id(configs[node.name]) not in recurrent:
            raise PolicyError(
                f"Expected a recurrent layer for a config with recurrence='fused'. Received: "
                f"'{node.name}' of type {type(node.layer).__name__}. Use recurrence='unrolled'."
            )
    return frozenset(node.name for node in chosen)


def _is_recurrent(layer: Any) -> bool:
    """Whether a config decides how the layer, or the one that it wraps, runs along time."""
    rule = row_of_class(type(getattr(layer, "layer", layer)))
    return rule is not None and rule.decompose_fused is not None


def stays_whole(layer: Any, config: QuantizeConfig | None) -> bool:
    """Whether a layer is not opened up: it is float, or a custom one with its weights named."""
    return config is None or (is_custom(layer) and isinstance(config.weights, Mapping))


def row_for(layer: Any, name: str, config: QuantizeConfig | None) -> LayerRule | None:
    """The row of `layer` under its config; `None` where it is float.

    The scales per channel of a custom layer that stays whole lie along the last axis of its
    weights, where their specs say no other.
    """
    if config is None or not stays_whole(layer, config):
        return None if config is None else rule_for(layer, name)
    weights = {weight: channel_axes(spec.axis) for weight, spec in config.weight_items()}
    return LayerRule(output=Output.OWN, weights=weights)


def weight_grids(
    layer_name: str, layer: Any, rule: LayerRule, config: QuantizeConfig
) -> dict[str, QuantSpec]:
    """The grid of each weight of a layer, with concrete axes.

    Raises:
        PolicyError: if the config names no such variable, leaves one out, or asks for scales
            along axes for which integer kernels have none.
    """
    if not rule.weights:
        return {}
    asked = dict(config.weight_items())
    if "*" in asked:
        spec = asked["*"]
        if _widened(rule, config):
            spec = dataclasses.replace(spec, bits=8)
        asked = dict.fromkeys(rule.weights, spec)
    if set(asked) != set(rule.weights):
        raise PolicyError(
            f"Expected grids for the weights {sorted(rule.weights)} of layer '{layer_name}' of "
            f"type {type(layer).__name__}. Received: {sorted(asked)}. A layer with float weights "
            "cannot compute on integers; to leave it float give None as its config."
        )
    resolved = {}
    for name, spec in asked.items():
        axes = rule.weights[name]
        if spec.axis == "channel":
            spec = dataclasses.replace(spec, axis=axes)
        elif spec.axis is not None:
            given = spec.axis if isinstance(spec.axis, tuple) else (spec.axis,)
            _check_axes(f"'{name}' of layer '{layer_name}'", getattr(layer, name), given, axes)
            spec = dataclasses.replace(spec, axis=axes)
        # Rows ship on the output's grid: eight bits with the usual step need none of their own.
        if spec.bits < 8 or config.weight_step != MaxAbs() or not rule.table_of_rows:
            resolved[name] = spec
    return resolved


def weight_step(rule: LayerRule, config: QuantizeConfig) -> StepMethod:
    """How the steps of a layer's weight grids are found."""
    return MaxAbs() if _widened(rule, config) else config.weight_step


def _widened(rule: LayerRule, config: QuantizeConfig) -> bool:
    """Whether weights get 8 bits though the config gives fewer to all: see `LayerRule.operand`."""
    spec = dict(config.weight_items()).get("*")
    return rule.operand and spec is not None and spec.bits < 8


def _check_axes(
    label: str, weight: Any, given: tuple[int, ...], axes: tuple[int, ...] | None
) -> None:
    rank = len(weight.shape)
    if axes is None or {a % rank for a in given} != {a % rank for a in axes}:
        raise PolicyError(
            f"Expected scales of {label} per tensor or along axes {axes}, "
            f"where integer kernels have them. Received: axes {given}. Use axis='channel'."
        )
