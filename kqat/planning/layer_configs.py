"""Graph and policy to one config, and one row of the registry, per layer."""

from collections.abc import Mapping
from typing import Any

from kqat.base import PolicyError
from kqat.config import QuantizeConfig, QuantizePolicy
from kqat.graph import Graph
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
    chosen = [n for n in graph.nodes if (c := configs[n.name]) and c.recurrence == "fused"]
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
