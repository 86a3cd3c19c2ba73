"""Graph and policy to one config, and one row of the registry, per layer."""

from collections.abc import Mapping
from typing import Any

from kqat import rules
from kqat.config import QuantizeConfig, QuantizePolicy
from kqat.errors import PolicyError
from kqat.registry import LayerRule, Output, is_custom, rule_for
from kqat.tracing import Graph


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
    weights = {weight: rules.channel_axes(spec.axis) for weight, spec in config.weight_items()}
    return LayerRule(output=Output.OWN, weights=weights)
