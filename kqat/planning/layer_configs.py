"""Graph and policy to what is asked of each layer: its config, its row of the registry, the grid of
each of its weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kqat.base import PolicyError
from kqat.config import QuantizeConfig, QuantizePolicy, RecurrenceForm
from kqat.graph import Graph
from kqat.grids import MaxAbs, QuantSpec, StepMethod, nearest_name
from kqat.registry import LayerRule, Output, channel_axes, is_custom, row_of_class, rule_for

# A message lists so many names of layers at most.
_NAMES = 12


def assign_configs(
    graph: Graph, policy: QuantizePolicy, model_name: str
) -> tuple[dict[str, QuantizeConfig | None], dict[str, QuantizeConfig], tuple[str, ...]]:
    """Configs of the nodes, configs that rules give to model inputs, and rules that decide nothing.

    An input without a rule of its own takes the config of the first layer that reads it, a later
    call of a layer that of the first. A rule decides nothing if it is for a class of which the
    model has no layer, or if earlier rules decide about all that it matches.

    Raises:
        PolicyError: if a name pattern matches no layer and no input, or one layer gets two configs.
    """
    _check_patterns(graph, policy, model_name)
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
                f"weights are quantized once. Received: {earlier} and {config}. Give both calls "
                "the same config."
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


def _check_patterns(graph: Graph, policy: QuantizePolicy, model_name: str) -> None:
    """Checks that the pattern of every rule matches something that the rule can decide about.

    A rule for a class may match nothing: a class cannot be misspelt, and policies for many models
    name classes.
    """
    layers, inputs = [node.name for node in graph.nodes], graph.input_names
    for key, value in policy.rules:
        if not isinstance(key, str):
            continue
        rule = QuantizePolicy(default=None, rules=((key, None),))
        if any(rule.match(name, None) is not None for name in layers):
            continue
        if not any(rule.match(name, None) is not None for name in inputs):
            known = list(dict.fromkeys((*layers, *inputs)))
            more = f" and {len(known) - _NAMES} more" if len(known) > _NAMES else ""
            raise PolicyError(
                f"Expected names or patterns of layers of '{model_name}'. Received: {key!r}, which "
                f"matches none.{_nearest(key, known)} They are {', '.join(known[:_NAMES])}{more}."
            )
        if value is None:
            raise PolicyError(
                f"Expected a config for '{key}', an input of '{model_name}'. Received: None. An "
                "input is float where the layers that read it are: name these."
            )


def _nearest(pattern: str, names: list[str]) -> str:
    """A sentence with the name that is meant: also of a layer in a nested model, or of all of one.

    Names of layers in a nested model begin with the model's.
    """
    wanted = pattern.rstrip("*")
    inner = [name for name in names if name.endswith(f"_{wanted}")]
    if any(name.startswith(f"{wanted}_") for name in names):
        inner.append(f"{wanted}_*")
    return f" Did you mean {inner[0]!r}?" if inner else nearest_name(wanted, names)


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


def row_for(
    layer: Any,
    name: str,
    config: QuantizeConfig | None,
    options: Mapping[str, Any] | None = None,
) -> LayerRule | None:
    """The row of `layer` under its config; `None` where it is float.

    `options` are the keyword arguments of the call.

    The scales per channel of a custom layer that stays whole lie along the last axis of its
    weights, where their specs say no other.
    """
    if config is None or not stays_whole(layer, config):
        return None if config is None else rule_for(layer, name, options)
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
        more = sorted(set(asked) - set(rule.weights))
        raise PolicyError(
            f"Expected grids for the weights {sorted(rule.weights)} of layer '{layer_name}' of "
            f"type {type(layer).__name__}. Received: {sorted(asked)}. "
            + (
                f"Leave {' and '.join(more)} out; the grid of a bias is that of its sum."
                if more and set(rule.weights) <= set(asked)
                else "A layer with float weights cannot compute on integers; to leave it float "
                "give None as its config."
            )
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
    step: StepMethod = config.weight_step
    return MaxAbs() if _widened(rule, config) else step


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
            f"where integer kernels have them. Received: axes {given}. Use axis='channel'. (A "
            "scale per group of weights has kernels for float activations only: see "
            "benchmarks/blockwise_probe.py.)"
        )
