"""What the user asks for: `QuantizeConfig` for one layer, `QuantizePolicy` for a model, presets.

A policy is a default config and a list of rules. The first rule that matches a layer decides.
"""

import dataclasses
import fnmatch
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import keras

from kqat.base import PolicyError, SpecError, TextEnum, write_file
from kqat.grids import (
    INT8_ACTIVATION,
    INT8_WEIGHTS,
    INT16_ACTIVATION,
    RANGE_METHODS,
    STEP_METHODS,
    Binary,
    GradientEstimator,
    LearnedRangeMethod,
    LearnedStep,
    LearnedTernary,
    MaxAbs,
    MovingAverage,
    QuantSpec,
    Ternary,
    gradient_estimator,
    gradient_from_dict,
    gradient_to_dict,
    named_range,
    named_step,
    nearest_name,
    range_method_from_dict,
    range_method_to_dict,
    step_method_from_dict,
    step_method_to_dict,
)

WeightSpecs = QuantSpec | Mapping[str, QuantSpec] | None


class RecurrenceForm(TextEnum):
    """How an LSTM ships: as operators for every step, or as one operator."""

    UNROLLED = "unrolled"
    FUSED = "fused"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How one layer is quantized.

    Args:
        weights: the grid of the layer's weights. One `QuantSpec` serves every variable that the
            registry names for the layer class. A mapping such as `{"kernel": QuantSpec(...)}`
            names the variables (attributes of the layer), which a custom layer needs. One spec
            of less than 8 bits leaves 8 to operands of elementwise kernels (a constant that is
            added or multiplied, PReLU's slopes), which cannot read fewer; the plan shows it.
        weight_step: how the step of each of these grids is found: a method, or its name in
            `STEP_METHODS`, as `"lsq"`, for its defaults.
        activation: the grid of the layer's output: 8 bits, or 16 bits and symmetric. It also
            decides the width of the layer's kernel.
        activation_range: how the range of the output is found: a method, or its name in
            `RANGE_METHODS`, as `"lsq_plus"`, for its defaults.
        recurrence: how an LSTM ships: `"unrolled"` as operators for every step, or `"fused"` as
            one UNIDIRECTIONAL_SEQUENCE_LSTM. That operator is small and has one scale for each
            weight of a gate. It keeps its states from one invocation to the next, so the device
            must reset the interpreter before each sequence.
        weight_gradient, activation_gradient: what stands for the derivative of rounding: an
            estimator, its name in `GRADIENTS` (`"identity"`, `"clipped"`, `"ewgs"`, `"noise"`), or
            a registered function, see `kqat.grids.gradients.estimator`. `None` is what the method
            of the step or range says: identity for most steps, clipped for learned ones and ranges.

    Raises:
        PolicyError: if a field has a wrong type, or no kernel has these bit widths together.
        SpecError: if `weight_step` cannot use a weight's grid.
    """

    weights: WeightSpecs = INT8_WEIGHTS
    weight_step: Any = MaxAbs()
    activation: QuantSpec = INT8_ACTIVATION
    activation_range: Any = MovingAverage()
    recurrence: RecurrenceForm | Literal["unrolled", "fused"] = RecurrenceForm.UNROLLED
    weight_gradient: Any = None
    activation_gradient: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.weights, Mapping):
            object.__setattr__(self, "weights", _single(self.weights))
        self._resolve("weight_step", named_step)
        self._resolve("activation_range", named_range)
        for name in ("weight_gradient", "activation_gradient"):
            try:
                object.__setattr__(self, name, gradient_estimator(getattr(self, name)))
            except SpecError as error:
                raise PolicyError(f"{name}: {error}") from error
        if type(self.weight_step) not in STEP_METHODS.values():
            raise PolicyError(
                f"Expected weight_step to be one of {sorted(STEP_METHODS)}. "
                f"Received: {self.weight_step!r}."
            )
        for name, spec in self.weight_items():
            _check_weight_spec(name, spec)
            self.weight_step.check(spec)
        self._check_noise()
        if not isinstance(self.activation, QuantSpec):
            raise PolicyError(
                f"Expected activation to be a QuantSpec. Received: {self.activation!r}. "
                "To leave a layer float, give None in place of the whole config."
            )
        _check_activation_spec(self.activation)
        if isinstance(self.activation_range, LearnedRangeMethod):
            self.activation_range.check_grid(self.activation)
        if type(self.activation_range) not in RANGE_METHODS.values():
            raise PolicyError(
                f"Expected activation_range to be one of {sorted(RANGE_METHODS)}. "
                f"Received: {self.activation_range!r}."
            )
        if self.recurrence not in tuple(RecurrenceForm):
            raise PolicyError(
                f"Expected recurrence='unrolled' or 'fused'. Received: {self.recurrence!r}."
            )
        object.__setattr__(self, "recurrence", RecurrenceForm(self.recurrence))
        if self.recurrence is RecurrenceForm.FUSED and self.activation.bits != 8:
            raise PolicyError(
                "Expected activations of 8 bits for recurrence='fused': its operator is verified "
                f"with 8 bits only. Received: bits={self.activation.bits}. Use "
                "recurrence='unrolled'."
            )

    def _resolve(self, field: str, named: Callable[[str], Any]) -> None:
        """Puts the method of a name in the place of the name."""
        name = getattr(self, field)
        if isinstance(name, str):
            try:
                object.__setattr__(self, field, named(name))
            except SpecError as error:
                raise PolicyError(f"{field}: {error}") from error

    def _check_noise(self) -> None:
        noise = isinstance(self.weight_gradient, GradientEstimator) and (
            self.weight_gradient.ADDS_NOISE
        )
        if noise and isinstance(self.weight_step, Ternary | LearnedTernary | Binary):
            raise PolicyError(
                f"Expected weight_step with integers in equal steps for noise in the place of "
                f"rounding. Received: {self.weight_step}, which has two or three values. Use "
                "weight_gradient='clipped' with it, or weight_step='lsq'."
            )

    def weight_items(self) -> Iterator[tuple[str, QuantSpec]]:
        """Pairs of variable name and spec; the name is `"*"` if one spec serves all variables."""
        if isinstance(self.weights, Mapping):
            yield from self.weights.items()
        elif self.weights is not None:
            yield "*", self.weights

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types."""
        weights = {name: spec.to_dict() for name, spec in self.weight_items()}
        return {
            "weights": weights,
            "weight_step": step_method_to_dict(self.weight_step),
            "activation": self.activation.to_dict(),
            "activation_range": range_method_to_dict(self.activation_range),
            "recurrence": RecurrenceForm(self.recurrence).value,
            "weight_gradient": gradient_to_dict(self.weight_gradient),
            "activation_gradient": gradient_to_dict(self.activation_gradient),
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "QuantizeConfig":
        """The inverse of `to_dict`."""
        weights: Any = {name: QuantSpec(**spec) for name, spec in config["weights"].items()}
        if set(weights) == {"*"}:
            weights = weights["*"]
        return cls(
            weights=weights or None,
            weight_step=step_method_from_dict(config["weight_step"]),
            activation=QuantSpec(**config["activation"]),
            activation_range=range_method_from_dict(config["activation_range"]),
            recurrence=config["recurrence"],
            weight_gradient=gradient_from_dict(config.get("weight_gradient")),
            activation_gradient=gradient_from_dict(config.get("activation_gradient")),
        )


def _check_activation_spec(spec: QuantSpec) -> None:
    if spec.axis is not None or spec.bits not in (8, 16):
        raise PolicyError(
            "Expected an activation grid of 8 bits or 16 bits, with one scale per tensor: integer "
            f"kernels take no other. Received: {spec}. Use bits=8 and axis=None."
        )
    if spec.bits == 16 and not spec.symmetric:
        raise PolicyError(
            f"Expected a symmetric activation grid of 16 bits: int16 kernels take no zero point. "
            f"Received: {spec}. Use symmetric=True."
        )
    if spec.narrow_range:
        raise PolicyError(
            f"Expected an activation grid with all {2**spec.bits} integers: integer kernels clamp "
            f"at {spec.qmin}. Received: {spec}. Use narrow_range=False."
        )


def _single(weights: Mapping[str, QuantSpec]) -> WeightSpecs:
    """The form in which `from_dict` returns `weights`: a single "*" entry becomes its spec."""
    if "*" not in weights:
        return dict(weights) or None
    if len(weights) > 1:
        raise PolicyError(
            f"Expected either '*' or names of variables, not both. Received: "
            f"weights={dict(weights)}."
        )
    return weights["*"]


def _check_weight_spec(name: str, spec: QuantSpec) -> None:
    if not isinstance(spec, QuantSpec):
        raise PolicyError(f"Expected weights[{name!r}] to be a QuantSpec. Received: {spec!r}.")
    if not spec.symmetric:
        raise PolicyError(
            f"Expected a symmetric grid for weights[{name!r}]: integer kernels take no weight "
            f"zero point. Received: {spec}. Use symmetric=True."
        )
    if spec.bits > 8:
        raise PolicyError(
            f"Expected at most 8 bits for weights[{name!r}]: integer kernels take no wider "
            f"weights. Received: bits={spec.bits}. Use bits=8."
        )


def _weights(bits: int) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=True, narrow_range=bits > 1, axis="channel")


PRESETS: dict[str, QuantizeConfig] = {
    "int8": QuantizeConfig(),
    "int16x8": QuantizeConfig(activation=INT16_ACTIVATION),
    "w4a8": QuantizeConfig(weights=_weights(4), weight_step=LearnedStep()),
    "w3a8": QuantizeConfig(weights=_weights(3), weight_step=LearnedStep()),
    "w2a8": QuantizeConfig(weights=_weights(2), weight_step=LearnedStep()),
    "ternary": QuantizeConfig(weights=_weights(2), weight_step=Ternary()),
    "binary": QuantizeConfig(weights=_weights(1), weight_step=Binary()),
}

# In a saved policy the name of a layer class begins with this.
_LAYER_CLASS = "keras.layers."

RuleKey = str | type
ConfigLike = Any  # None, a preset's name, a QuantizeConfig, or a config that `kqat.tfmot` converts


@dataclasses.dataclass(frozen=True)
class QuantizePolicy:
    """A default config, and a list of rules for the layers that need another config.

    A rule's key is a name pattern (`"stem*"`, as in `fnmatch`) or a layer class. Its value is a
    config, the name of a preset, or `None` to leave the layer float. The first match decides.

    Raises:
        PolicyError: if a key or a value is something else.
    """

    default: QuantizeConfig | None = PRESETS["int8"]
    rules: tuple[tuple[RuleKey, Any], ...] = ()

    def __post_init__(self) -> None:
        rules = tuple((_key(key), resolve_config(value)) for key, value in _pairs(self.rules))
        object.__setattr__(self, "default", resolve_config(self.default))
        object.__setattr__(self, "rules", rules)

    @classmethod
    def of(cls, policy: Any) -> "QuantizePolicy":
        """A policy from a preset's name, a config, a mapping of rules, or a policy.

        Raises:
            PolicyError: if `policy` is something else.
        """
        if isinstance(policy, QuantizePolicy):
            return policy
        if isinstance(policy, Mapping):
            return cls(rules=tuple(policy.items()))
        return cls(default=policy)

    def to_json(self) -> str:
        """The policy as JSON text.

        Raises:
            PolicyError: if a rule names a layer class that is not Keras's own, or holds a tfmot
                config: neither can be told by name.
        """
        rules = [
            {"key": _key_to_text(key), "config": _config_to_dict(key, value)}
            for key, value in self.rules
        ]
        table = {"default": _config_to_dict("default", self.default), "rules": rules}
        return json.dumps({"kqat_policy": 1, **table}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "QuantizePolicy":
        """The inverse of `to_json`.

        Raises:
            PolicyError: if `text` is no such policy.
        """
        try:
            table = json.loads(text)
            known = table["kqat_policy"] == 1
        except (ValueError, KeyError, TypeError) as error:
            raise PolicyError(
                f"Expected the JSON of a kqat.QuantizePolicy. Received: {text[:60]!r}."
            ) from error
        if not known:
            raise PolicyError(
                f"Expected a policy of format 1. Received: {table['kqat_policy']!r}. Use the "
                "release of kqat that wrote it."
            )
        try:
            pairs = [(_key_from_text(r["key"]), _config_from(r["config"])) for r in table["rules"]]
            default = _config_from(table["default"])
        except (KeyError, TypeError) as error:
            raise PolicyError(
                f"Expected a default and rules, as QuantizePolicy.save writes them. Received: "
                f"{error!r} in the policy. Write it again."
            ) from error
        return QuantizePolicy(default=default, rules=tuple(pairs))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to `path`, whole or not at all; `load` reads it.

        Raises:
            PolicyError: as `to_json`.
        """
        write_file(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "QuantizePolicy":
        """The policy that `save` wrote.

        Raises:
            PolicyError: if the file holds none.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except (PolicyError, UnicodeDecodeError) as error:
            raise PolicyError(f"In '{path}': {error}") from error

    def match(self, name: str, layer: Any) -> int | None:
        """Index of the first rule that matches the layer, or `None` if none does."""
        for index, (key, _) in enumerate(self.rules):
            if isinstance(key, str):
                matched = fnmatch.fnmatchcase(name, key)
            else:
                matched = isinstance(layer, key)
            if matched:
                return index
        return None


def resolve_config(value: ConfigLike) -> Any:
    """The config of a preset's name; a config or `None` is returned as it is.

    Raises:
        PolicyError: if there is no preset of that name, or the value is not a config.
    """
    if isinstance(value, str):
        if value not in PRESETS:
            raise PolicyError(
                f"Expected one of the presets {sorted(PRESETS)}. Received: {value!r}."
                + nearest_name(value, PRESETS)
            )
        return PRESETS[value]
    if value is None or isinstance(value, QuantizeConfig) or is_foreign_config(value):
        return value
    advice, received = "", repr(value)
    if callable(getattr(value, "get_quantize_registry", None)):
        # A scheme of tfmot, as its quantize_apply takes.
        received = f"{type(value).__name__}()"
        advice = (
            " Say 'int8' or 'w4a8' in place of a scheme of tfmot, and preserve='sparsity' or "
            "'clusters' for one that keeps zeros or clusters."
        )
    raise PolicyError(
        f"Expected None, a preset's name, a QuantizeConfig or a tfmot QuantizeConfig. "
        f"Received: {received}.{advice}"
    )


def is_foreign_config(value: Any) -> bool:
    """Whether `value` has the methods of tfmot's `QuantizeConfig`, which `kqat.tfmot` reads."""
    methods = ("get_weights_and_quantizers", "get_output_quantizers")
    return all(callable(getattr(value, method, None)) for method in methods)


def _key_to_text(key: RuleKey) -> str:
    if isinstance(key, str):
        return key
    if getattr(keras.layers, key.__name__, None) is not key:
        raise PolicyError(
            f"Expected name patterns or Keras's own layer classes in a policy to be saved. "
            f"Received: {key!r}. Name its layers by a pattern."
        )
    return f"{_LAYER_CLASS}{key.__name__}"


def _key_from_text(text: str) -> RuleKey:
    if not text.startswith(_LAYER_CLASS):
        return text
    name = text.removeprefix(_LAYER_CLASS)
    cls = getattr(keras.layers, name, None)
    if not isinstance(cls, type):
        raise PolicyError(f"Expected a class of keras.layers. Received: {name!r}.")
    return cls


def _config_to_dict(key: object, value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, QuantizeConfig):
        raise PolicyError(
            f"Expected configs of kqat in a policy to be saved. Received: {type(value).__name__} "
            f"for {key!r}. Give it a kqat.QuantizeConfig."
        )
    return value.to_dict()


def _config_from(value: dict[str, Any] | None) -> QuantizeConfig | None:
    return None if value is None else QuantizeConfig.from_dict(value)


def _pairs(rules: Any) -> list[tuple[Any, Any]]:
    """Rules, of which a mapping serves as well."""
    found = list(rules.items() if isinstance(rules, Mapping) else rules)
    for rule in found:
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise PolicyError(
                "Expected rules as pairs of a key (a name pattern or a layer class) and a config. "
                f"Received: {rule!r}. Write rules=[('stem*', None)]."
            )
    return found


def _key(key: Any) -> RuleKey:
    if isinstance(key, str | type):
        return key
    raise PolicyError(
        f"Expected a rule's key to be a name pattern or a layer class. Received: {key!r}."
    )
