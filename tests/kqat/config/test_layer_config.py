"""What the user asks for: configs, presets and the order of rules."""

import json
from typing import Any

import keras
import pytest

from kqat.base.errors import KqatError, PolicyError
from kqat.config.layer_config import (
    PRESETS,
    QuantizeConfig,
    QuantizePolicy,
    is_foreign_config,
    resolve_config,
)
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import MovingAverage
from kqat.grids.spec import INT8_ACTIVATION, INT8_WEIGHTS, QuantSpec

W4 = QuantSpec(bits=4, symmetric=True, narrow_range=True, axis="channel")
CONFIGS = (
    QuantizeConfig(),
    QuantizeConfig(weights=None),
    QuantizeConfig(weights=W4, activation_range=MinMax()),
    QuantizeConfig(weights={"kernel": W4, "alpha": QuantSpec(symmetric=True)}),
    QuantizeConfig(weights={"gain": QuantSpec(symmetric=True, axis=(0, -1))}),
    QuantizeConfig(activation_range=Fixed(-1.0, 1.0)),
)


class ForeignConfig:
    """Speaks tfmot's protocol, by name at least."""

    def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
        return []

    def get_output_quantizers(self, layer: Any) -> list[Any]:
        return []


def test_default_is_int8() -> None:
    config = QuantizeConfig()
    assert config.weights == INT8_WEIGHTS
    assert config.activation == INT8_ACTIVATION
    assert config.activation_range == MovingAverage(0.99)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_dict_comes_back_through_json(config: QuantizeConfig) -> None:
    assert QuantizeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("weights", "items"),
    [
        (None, []),
        ({}, []),
        (W4, [("*", W4)]),
        ({"*": W4}, [("*", W4)]),
        ({"kernel": W4, "alpha": INT8_WEIGHTS}, [("kernel", W4), ("alpha", INT8_WEIGHTS)]),
    ],
)
def test_weight_items(weights: Any, items: list[tuple[str, QuantSpec]]) -> None:
    config = QuantizeConfig(weights=weights)
    assert list(config.weight_items()) == items
    assert QuantizeConfig.from_dict(config.to_dict()) == config


def test_config_keeps_no_hold_of_the_users_mapping() -> None:
    weights = {"kernel": W4}
    config = QuantizeConfig(weights=weights)
    weights["bias"] = W4
    assert list(config.weight_items()) == [("kernel", W4)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "int8"}, r"Expected weights\['\*'\] to be a QuantSpec. Received: 'int8'"),
        ({"weights": {"kernel": 8}}, r"Expected weights\['kernel'\] to be a QuantSpec. .*: 8"),
        (
            {"weights": {"*": W4, "kernel": W4}},
            r"Expected either '\*' or names of variables, not both. Received: weights=",
        ),
        (
            {"weights": QuantSpec()},
            r"symmetric grid for weights\['\*'\]: .* Use symmetric=True",
        ),
        (
            {"weights": {"kernel": QuantSpec(bits=9, symmetric=True)}},
            r"at most 8 bits for weights\['kernel'\].* Received: bits=9",
        ),
        ({"activation": None}, "activation to be a QuantSpec. Received: None. To leave a layer"),
        ({"activation": QuantSpec(bits=4)}, "activation grid of 8 bits .* Received: .*bits=4"),
        (
            {"activation": QuantSpec(symmetric=True, axis=-1)},
            "one scale per tensor.* Received: .*axis=-1",
        ),
        (
            {"activation": QuantSpec(narrow_range=True)},
            "all 256 integers.* Received: .* Use narrow_range=False",
        ),
        (
            {"activation_range": "minmaks"},
            r"activation_range: Expected one of .* Received: 'minmaks'. Did you mean 'minmax'",
        ),
        (
            {"activation_range": "fixed"},
            r"Expected a range for the range method 'fixed'. .* Give kqat.Fixed\(low, high\)",
        ),
        (
            {"activation_range": 8},
            r"activation_range to be one of \['entropy', 'fixed'.* Received: 8",
        ),
        ({"activation_range": MinMax}, "activation_range to be one of .* Received: <class"),
    ],
)
def test_configs_that_cannot_be_carried_out_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        QuantizeConfig(**fields)


def test_rules_are_pairs_or_a_mapping() -> None:
    """A mapping ended in an error of Python."""
    assert QuantizePolicy(rules={"a": None}).rules == (("a", None),)
    for rules in ([("a",)], ["ab"], [("a", None, 8)]):
        with pytest.raises(PolicyError, match="Expected rules as pairs"):
            QuantizePolicy(rules=rules)


def test_the_refusal_is_an_error_of_this_project_and_a_value_error() -> None:
    assert issubclass(PolicyError, KqatError)
    assert issubclass(PolicyError, ValueError)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_their_names_give(name: str) -> None:
    assert resolve_config(name) is PRESETS[name]
    assert QuantizePolicy.of(name) == QuantizePolicy(default=PRESETS[name])


def test_policy_of_what_users_write() -> None:
    config, foreign = QuantizeConfig(weights=W4), ForeignConfig()
    assert QuantizePolicy.of(config).default is config
    assert QuantizePolicy.of(foreign).default is foreign
    assert QuantizePolicy.of(None).default is None
    policy = QuantizePolicy.of({"stem*": None, keras.layers.Dense: "int8", "head": config})
    assert policy.default is PRESETS["int8"]
    assert policy.rules == (
        ("stem*", None),
        (keras.layers.Dense, PRESETS["int8"]),
        ("head", config),
    )
    assert QuantizePolicy.of(policy) is policy


def test_presets_in_rules_resolve_however_the_policy_is_made() -> None:
    policy = QuantizePolicy(default="int8", rules=(("head", "int8"),))  # type: ignore[arg-type]
    assert policy == QuantizePolicy.of({"head": PRESETS["int8"]})


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("int7", r"Expected one of the presets \['binary'.*\]. Received: 'int7'"),
        ({"head": "int7"}, r"Expected one of the presets .* Received: 'int7'"),
        (8, "Expected None, a preset's name, a QuantizeConfig .* Received: 8"),
        ({"head": INT8_WEIGHTS}, "Expected None, a preset's name.* Received: QuantSpec"),
        ({8: None}, "rule's key to be a name pattern or a layer class. Received: 8"),
        ({keras.layers.ReLU(): None}, "rule's key to be a name pattern or .* Received: <ReLU"),
    ],
)
def test_policies_that_cannot_be_carried_out_are_refused(policy: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        QuantizePolicy.of(policy)


@pytest.mark.parametrize(
    ("rules", "name", "expected"),
    [
        ((), "conv", None),
        (("conv",), "conv", 0),
        (("conv",), "conv_1", None),
        (("conv",), "Conv", None),
        (("stem*", "conv*"), "conv_1", 1),
        (("*", "conv"), "conv", 0),
        (("conv", "*"), "conv", 0),
        (("conv_?",), "conv_1", 0),
        (("conv_[12]",), "conv_3", None),
        (("block/*",), "block/conv/inner", 0),
        ((keras.layers.Dense, keras.layers.Conv2D), "conv", 1),
        ((keras.layers.Layer, "conv"), "conv", 0),
        (("dense*", keras.layers.Conv2D, "conv"), "conv", 1),
        ((keras.layers.Conv1D,), "conv", None),
    ],
)
def test_first_rule_that_matches_decides(
    rules: tuple[Any, ...], name: str, expected: int | None
) -> None:
    policy = QuantizePolicy(rules=tuple((key, None) for key in rules))
    assert policy.match(name, keras.layers.Conv2D(1, 1)) == expected


def test_rules_for_a_class_hold_for_its_subclasses() -> None:
    class MyDense(keras.layers.Dense):
        """A user's own."""

    policy = QuantizePolicy.of({MyDense: None, keras.layers.Dense: "int8"})
    assert policy.match("x", MyDense(1)) == 0
    assert policy.match("x", keras.layers.Dense(1)) == 1


def test_foreign_configs_speak_the_whole_protocol() -> None:
    assert is_foreign_config(ForeignConfig())
    assert not is_foreign_config(QuantizeConfig())

    class Half:
        """One method of two."""

        def get_output_quantizers(self, layer: Any) -> list[Any]:
            return []

    assert not is_foreign_config(Half())
    with pytest.raises(PolicyError, match=r"a tfmot QuantizeConfig\. Received: <"):
        resolve_config(Half())


def test_a_scheme_of_tfmot_is_told_from_a_config() -> None:
    class Scheme:
        def get_quantize_registry(self) -> None: ...

    with pytest.raises(PolicyError, match=r"'int8' or 'w4a8' in place of a scheme of tfmot"):
        QuantizePolicy.of(Scheme())
