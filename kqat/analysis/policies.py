"""The policy that a QAT model was made with, read off its grids, and policies as Python text."""

import dataclasses
import glob
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from kqat.base import KqatError
from kqat.config import PRESETS, QuantizeConfig, QuantizePolicy, resolve_config
from kqat.graph import Graph, Ref, trace
from kqat.grids import INT8_ACTIVATION, INT16_ACTIVATION, QuantSpec, named_range, named_step
from kqat.parts import PrecisionBoundary
from kqat.planning import Plan, make_plan
from kqat.training import ActivationQuantizer, QuantizedRecurrence, QuantizeWrapper, all_layers

# A line of code that is longer is broken.
_WIDTH = 80

Facts = Mapping[str, Any]


def policy_of(base: Graph, qat: keras.Model) -> QuantizePolicy | None:
    """A policy that gives every layer the grids that it has in a QAT model.

    The preset that explains most, and a rule for each layer that it does not.

    Args:
        base: graph of the float model that `qat` was made of.
        qat: the QAT model.

    Returns:
        The policy, checked: its plan has the same grids. `None` where none was found.
    """
    wanted = _facts_of_model(qat)
    plans = {name: plan for name in PRESETS if (plan := _plan(base, QuantizePolicy.of(name)))}
    facts = {name: _facts_of_plan(plan) for name, plan in plans.items()}
    if not facts:
        return None
    default = max(facts, key=lambda name: _agreeing(facts[name], wanted))
    plan = plans[default]
    widths = _widths(trace(qat), {layer.name: layer.origin for layer in plan.layers})
    rules: dict[str, QuantizeConfig | None] = {}
    by_user = _keys_by_user(plan)
    for users in dict.fromkeys(map(plan.of_one_config, by_user)):
        keys = list(dict.fromkeys(key for user in users for key in by_user.get(user, ())))
        width = max((widths[user] for user in users if user in widths), default=None)
        if not _explains(facts[default], default, keys, width, wanted):
            config = _config_for([k for k in keys if k in wanted], width, facts, wanted)
            rules |= dict.fromkeys(users, config)
    policy = QuantizePolicy(PRESETS[default], _as_rules(rules))
    plan = _plan(base, policy)
    return policy if plan is not None and _facts_of_plan(plan) == wanted else None


class Users:
    """The layers of the user's model, which rules can name.

    `names` has, for each part of the plan of a policy, the name of the user's layer; it is empty
    where the policy has no plan.
    """

    def __init__(self, base: Graph, policy: QuantizePolicy) -> None:
        self._plan = _plan(base, policy)
        layers = () if self._plan is None else self._plan.layers
        self.names = {layer.name: layer.origin for layer in layers}

    def for_all_tied(self, rules: Mapping[str, QuantizeConfig]) -> dict[str, QuantizeConfig]:
        """Rules for layers by name, with the same ones for the layers that are tied to them."""
        found: dict[str, QuantizeConfig] = {}
        for user, config in rules.items():
            group = (user,) if self._plan is None else self._plan.of_one_config(user)
            found |= {name: config for name in group if name not in found}
        return found


def with_rules(policy: QuantizePolicy, rules: Mapping[str, QuantizeConfig]) -> QuantizePolicy:
    """The policy with rules for layers, by name, before its own."""
    new = _as_rules(rules)
    keys = {key for key, _ in new}
    kept = tuple((key, config) for key, config in policy.rules if key not in keys)
    return QuantizePolicy(policy.default, (*new, *kept))


def config_of(policy: QuantizePolicy, base: Graph, user: str) -> QuantizeConfig | None:
    """What a policy says of a layer, or of an input of the model."""
    layer = next((node.layer for node in base.nodes if node.name == user), None)
    index = policy.match(user, layer)
    config = policy.default if index is None else policy.rules[index][1]
    return config if isinstance(config, QuantizeConfig) else None


def _as_rules(rules: Mapping[str, QuantizeConfig | None]) -> tuple[tuple[str, Any], ...]:
    return tuple((glob.escape(name), config) for name, config in rules.items())


def _plan(base: Graph, policy: QuantizePolicy) -> Plan | None:
    try:
        return make_plan(base, policy, "model")
    except KqatError:
        return None


def _facts_of_model(qat: keras.Model) -> Facts:
    """What a policy decides, by a key for each grid."""
    found: dict[str, Any] = {}
    for layer in all_layers(qat):
        if isinstance(layer, QuantizeWrapper) and layer.weight_specs:
            found[f"weights of {layer.layer.name}"] = (
                tuple(sorted(layer.weight_specs.items())),
                layer.weight_step,
            )
        elif isinstance(layer, ActivationQuantizer):
            found[f"values of {layer.name}"] = layer.spec, layer.range_method
    return found


def _facts_of_plan(plan: Plan) -> Facts:
    found: dict[str, Any] = {}
    names = {node.name: str(node.layer.name) for node in _nodes(plan)}
    for layer in plan.layers:
        if layer.weights:
            key = f"weights of {names.get(layer.name, layer.name)}"
            found.setdefault(key, (tuple(sorted(layer.weights.items())), layer.weight_step))
    for group in plan.groups:
        found[f"values of {group.name}"] = group.spec, group.range_method
    return found


def _nodes(plan: Plan) -> Iterator[Any]:
    yield from plan.graph.nodes
    for step in plan.steps.values():
        yield from _nodes(step)


def _agreeing(facts: Facts, wanted: Facts) -> int:
    return sum(wanted.get(key) == value for key, value in facts.items())


def _keys_by_user(plan: Plan) -> dict[str, list[str]]:
    """The user's layers -> the keys of the grids that their configs decide."""
    origins = {layer.name: layer.origin for layer in plan.layers}
    layers = {node.name: str(node.layer.name) for node in _nodes(plan)}
    keys: dict[str, list[str]] = {}
    for layer in plan.layers:
        own = keys.setdefault(layer.origin, [])
        if layer.weights:
            own.append(f"weights of {layers.get(layer.name, layer.name)}")
    for group in plan.groups:
        for source in group.sources:
            if source in origins:
                keys[origins[source]].append(f"values of {group.name}")
    return keys


def _widths(graph: Graph, origins: Mapping[str, str]) -> dict[str, int]:
    """The user's layers -> the bits of what they read and write; 0 of those that are float."""
    producers = graph.producers()
    found: dict[str, int] = {}

    def width(ref: Ref) -> int:
        """The bits of a value; 0 of a float."""
        maker = producers.get(ref)
        if maker is None or isinstance(maker.layer, PrecisionBoundary):
            return 0
        if isinstance(maker.layer, ActivationQuantizer):
            return int(maker.layer.spec.bits)
        floats = [one for one in maker.inputs if not one.holds_indexes]
        return width(floats[0]) if floats else 0

    for node in graph.nodes:
        layer: Any = node.layer
        floats = [ref for ref in node.inputs if not ref.holds_indexes]
        bits = width(floats[0]) if floats else 0
        names = [node.name]
        if isinstance(layer, QuantizeWrapper):
            names = [part.name for part in (layer.layer, *layer.between, *layer.normalizations)]
        elif isinstance(layer, ActivationQuantizer):
            maker = producers.get(node.inputs[0])
            if maker is not None and isinstance(maker.layer, PrecisionBoundary):
                continue  # what a float layer made
            names, bits = [layer.label], layer.spec.bits
        elif isinstance(layer, QuantizedRecurrence):
            names = [layer.label]
        for name in names if floats else ():
            user = origins.get(name, name)
            found[user] = max(bits, found.get(user, 0))
    return found


def _explains(
    found: Facts, preset: str, keys: Iterable[str], width: int | None, wanted: Facts
) -> bool:
    """Whether a layer under a preset has the grids that are wanted."""
    if width is not None and resolve_config(preset).activation.bits != width:
        return False  # of 0 bits is no preset
    return all(found.get(key, wanted[key]) == wanted[key] for key in keys if key in wanted)


def _config_for(
    keys: list[str], width: int | None, facts: Mapping[str, Facts], wanted: Facts
) -> QuantizeConfig | None:
    """The config under which a layer would have the grids that are wanted; `None`: it is float."""
    if width == 0:
        return None
    fits = [name for name, found in facts.items() if _explains(found, name, keys, width, wanted)]
    if fits:
        config = resolve_config(fits[0])
        assert isinstance(config, QuantizeConfig)
        return config
    changed: dict[str, Any] = {"activation": INT16_ACTIVATION if width == 16 else INT8_ACTIVATION}
    for key in keys:
        if key.startswith("weights"):
            specs, step = wanted[key]
            several = {name: _of_channels(spec) for name, spec in specs}
            one = set(several.values())
            changed["weights"] = one.pop() if len(one) == 1 else several
            changed["weight_step"] = step
        else:
            changed["activation"], changed["activation_range"] = wanted[key]
    try:
        return QuantizeConfig(**changed)
    except KqatError:
        return QuantizeConfig(activation=changed["activation"])


def _of_channels(spec: QuantSpec) -> QuantSpec:
    """The grid as a user asks for it, whatever axes the channels lie along."""
    return spec if spec.axis is None else dataclasses.replace(spec, axis="channel")


def policy_lines(policy: QuantizePolicy) -> list[str]:
    """A policy as a Python expression, in lines of code of which each rule is one.

    Layer classes are given as `keras.layers.Dense`.
    """
    rules = [(_key_text(key), config_text(config)) for key, config in policy.rules]
    default = config_text(policy.default)
    if not rules:
        return [default]
    if policy.default == QuantizeConfig():
        return ["{", *(f"{key}: {config}," for key, config in rules), "}"]
    return [
        f"kqat.QuantizePolicy({default}, (",
        *(f"({key}, {config})," for key, config in rules),
        "))",
    ]


def _key_text(key: str | type) -> str:
    return repr(key) if isinstance(key, str) else f"keras.layers.{key.__name__}"


def config_text(config: Any) -> str:
    """A config as a Python expression: the preset's name, or a `kqat.QuantizeConfig`."""
    if config is None:
        return "None"
    for name, preset in PRESETS.items():
        if config == preset:
            return repr(name)
    given = [
        f"{field.name}={_value_text(field.name, getattr(config, field.name))}"
        for field in dataclasses.fields(QuantizeConfig)
        if getattr(config, field.name) != field.default
    ]
    return f"kqat.QuantizeConfig({', '.join(given)})"


def _value_text(field: str, value: Any) -> str:
    if isinstance(value, QuantSpec):
        given = [
            f"{one.name}={getattr(value, one.name)!r}"
            for one in dataclasses.fields(QuantSpec)
            if one.name == "bits" or getattr(value, one.name) != one.default
        ]
        return f"kqat.QuantSpec({', '.join(given)})"
    if isinstance(value, Mapping):
        items = (f"{key!r}: {_value_text(field, one)}" for key, one in value.items())
        return "{" + ", ".join(items) + "}"
    if value is None or isinstance(value, str):
        return repr(None if value is None else str(value))
    named = {"weight_step": named_step, "activation_range": named_range}.get(field)
    if named is not None:
        for name in _METHOD_NAMES:
            with_default = _named(named, name)
            if with_default == value and with_default is not None:
                return repr(name)
    return f"kqat.{value!r}"


_METHOD_NAMES = (
    "max_abs", "lsq", "mse", "tqt", "ternary", "ttq", "binary", "minmax", "percentile", "entropy",
    "moving_average", "last_value", "lsq_plus", "pact",
)  # fmt: skip


def _named(named: Any, name: str) -> Any:
    try:
        return named(name)
    except KqatError:
        return None


def call_text(result: str, function: str, arguments: Iterable[list[str]]) -> str:
    """A call as Python code that can be pasted: one line where it fits in 80 characters.

    Args:
        result: the name that takes the result; empty for none.
        function: what is called.
        arguments: each in the lines of its expression.
    """
    given = list(arguments)
    start = f"{result} = {function}(" if result else f"{function}("
    flat = ", ".join(_flat(lines) for lines in given)
    if len(start) + len(flat) + 1 <= _WIDTH:
        return f"{start}{flat})"
    body = []
    for lines in given:
        one = _flat(lines)
        if len(one) + 5 <= _WIDTH or len(lines) == 1:
            body.append(f"    {one},")
        else:
            inner = [f"        {line}" for line in lines[1:-1]]
            body += [f"    {lines[0]}", *inner, f"    {lines[-1]},"]
    return "\n".join([start, *body, ")"])


def _flat(lines: list[str]) -> str:
    """The lines of an expression as one."""
    if len(lines) < 3:
        return "".join(lines)
    inner = " ".join(lines[1:-1])
    # A tuple of one keeps its comma.
    keeps = lines[-1].startswith(")") and len(lines) == 3
    return f"{lines[0]}{inner if keeps else inner.removesuffix(',')}{lines[-1]}"
