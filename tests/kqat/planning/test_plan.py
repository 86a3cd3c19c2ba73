"""A plan as data: it prints as a table and is kept as JSON."""

import json
from pathlib import Path
from typing import Any

import keras
import pytest
from keras import layers

import kqat
from kqat import QuantSpec
from kqat.planning.plan import Plan


def plan_of(*chain: layers.Layer, policy: Any = "int8") -> Plan:
    model = keras.Sequential([keras.Input((6, 6, 3), name="image"), *chain], name="model")
    return kqat.plan(model, policy)


def test_a_plan_prints_as_a_table() -> None:
    plan = plan_of(
        layers.Conv2D(2, 3, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
    )
    assert str(plan).splitlines() == [
        "plan of model",
        "layer  type                role     weights           output range  note",
        "-----  ------------------  -------  ----------------  ------------  ---------------",
        "conv   Conv2D              integer  int8 per channel                own range",
        "norm   BatchNormalization  folded                                   into conv",
        "relu   Activation          clamp                      relu          fused into norm",
    ]


def test_a_plan_is_kept_as_json(tmp_path: Path) -> None:
    plan = plan_of(
        layers.Conv2D(2, 3, activation="relu", name="a"),
        layers.Conv2D(2, 3, name="b"),
        policy={"b": None, "z": None},
    )
    plan.save(tmp_path / "plan.json")
    table = json.loads((tmp_path / "plan.json").read_text())
    assert table == json.loads(plan.to_json())
    assert table["model"] == "model"
    assert (table["inputs"], table["outputs"]) == (["image"], ["b"])
    assert [(entry["name"], entry["role"]) for entry in table["layers"]] == [
        ("a", "integer"),
        ("a_relu", "clamp"),
        ("b", "float"),
    ]
    assert table["groups"][1] == {
        "name": "a_relu_quantizer",
        "spec": QuantSpec().to_dict(),
        "range": {"name": "moving_average", "decay": 0.99},
        "clamp": "relu",
        "sources": ["a_relu"],
    }
    assert table["unused_rules"] == ["z"]


def test_a_plan_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    plan = plan_of(layers.Conv2D(2, 3))
    with pytest.raises(FileNotFoundError, match="missing"):
        plan.save(tmp_path / "missing" / "plan.json")
    assert list(tmp_path.iterdir()) == []
