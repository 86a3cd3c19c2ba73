"""A config and a row of the registry to the grid of each weight of a layer."""

import dataclasses
from typing import Any

from kqat.base import PolicyError
from kqat.config import QuantizeConfig
from kqat.grids import MaxAbs, QuantSpec
from kqat.registry import LayerRule


def resolve_weights(
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
        asked = dict.fromkeys(rule.weights, asked["*"])
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


def _check_axes(
    label: str, weight: Any, given: tuple[int, ...], axes: tuple[int, ...] | None
) -> None:
    rank = len(weight.shape)
    if axes is None or {a % rank for a in given} != {a % rank for a in axes}:
        raise PolicyError(
            f"Expected scales of {label} per tensor or along axes {axes}, "
            f"where integer kernels have them. Received: axes {given}. Use axis='channel'."
        )
