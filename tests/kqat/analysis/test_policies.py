"""The policy that a QAT model was made with is found again, and reads as Python."""

import warnings
from typing import Any

import keras
import pytest
from keras import layers

import kqat
from kqat.analysis.policies import (
    Users,
    call_text,
    config_text,
    policy_lines,
    policy_of,
    with_rules,
)
from kqat.graph import Graph, trace
from tests.kqat.planning.test_tied_weights import KINDS


@pytest.fixture(scope="module")
def residual() -> tuple[keras.Model, Graph]:
    """A block with a normalization, an activation of its own, a sum and layers without weights."""
    x = keras.Input((6, 6, 3), name="image")
    y = layers.Conv2D(4, 3, padding="same", use_bias=False, name="e1")(x)
    y = layers.ReLU(name="e1_relu")(layers.BatchNormalization(name="e1_bn")(y))
    z = layers.Conv2D(4, 3, padding="same", activation="relu", name="e2")(y)
    y = layers.MaxPooling2D(name="pool")(layers.Add(name="skip")([y, z]))
    y = layers.Dense(4, activation="softmax", name="head")(layers.Flatten(name="flat")(y))
    model = keras.Model(x, y, name="residual")
    return model, trace(model)


FIVE = kqat.QuantSpec(bits=5, symmetric=True, narrow_range=True, axis="channel")
POLICIES: list[Any] = [
    "w4a8",
    {"e1*": "int16x8"},
    {"e2": "w4a8", "pool": "int16x8", "skip": "int16x8"},
    {"e1*": None, "head": "ternary"},
    kqat.QuantizePolicy(None, (("e1*", "int8"), ("e2", "w2a8"))),
    {
        "e1": kqat.QuantizeConfig(weights=FIVE, weight_step="lsq"),
        "e2": kqat.QuantizeConfig(activation_range=kqat.Fixed(0.0, 1.5)),
    },
]


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_a_policy_is_found_again(policy: Any, residual: tuple[keras.Model, Graph]) -> None:
    model, graph = residual
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        qat = kqat.quantize_model(model, policy)
    found = policy_of(graph, qat)
    assert found is not None
    decided = {str(kqat.plan(model, one)) for one in (policy, found)}
    assert len(decided) == 1
    again = eval("".join(policy_lines(found)), {"kqat": kqat})
    assert kqat.QuantizePolicy.of(again) == found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two heads", "decoder", "within TimeDistributed"])
def test_tied_layers_have_one_rule_each_for_one_config(kind: str) -> None:
    model = KINDS[kind][0]()
    (tied,) = kqat.plan(model).tied
    others = {node.name: "w4a8" for node in trace(model).nodes if node.name not in tied}
    for policy in ({**dict.fromkeys(tied, "w4a8")}, {**others, **dict.fromkeys(tied, "ternary")}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            qat = kqat.quantize_model(model, policy)
        found = policy_of(trace(model), qat)
        assert found is not None
        assert str(kqat.plan(model, found)) == str(kqat.plan(model, policy))
        # A rule for one of them is a rule for all.
        users = Users(trace(model), found)
        rules = users.for_all_tied({tied[-1]: kqat.QuantizeConfig()})
        assert set(rules) == set(tied)
        plan = kqat.plan(model, with_rules(found, rules))
        bits = {w.bits for p in plan.layers if p.origin in tied for w in p.weights.values()}
        assert bits == {8}


def test_a_policy_with_more_rules_is_printed_as_it_is_pasted() -> None:
    base = kqat.QuantizePolicy("w4a8", (("a", "int8"), ("b[1]", None)))
    more = with_rules(base, {"a": kqat.QuantizeConfig(activation_range=kqat.MinMax())})
    lines = policy_lines(more)
    assert lines[0] == "kqat.QuantizePolicy('w4a8', ("
    assert "('a', kqat.QuantizeConfig(activation_range='minmax'))," in lines
    call = call_text("made", "dict", [[f"{name}=1"] for name in "abc"] + [["p=", *lines][1:]][:0])
    assert call == "made = dict(a=1, b=1, c=1)"
    long = call_text("made", "tuple.__call__", [policy_lines(more)])
    assert long.startswith(
        "made = tuple.__call__(\n    kqat.QuantizePolicy('w4a8', (\n        ('a'"
    )
    assert max(map(len, long.splitlines())) <= 80
    assert eval("".join(lines), {"kqat": kqat}) == more
    assert config_text(None) == "None"
