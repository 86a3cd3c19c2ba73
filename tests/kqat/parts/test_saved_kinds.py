"""Enumerations in the configs of layers: saved as plain strings, read back from files of before."""

import enum
import json
from typing import Any

import keras
import pytest

import kqat
from kqat.grids import Clamp, MovingAverage, QuantSpec
from kqat.parts import (
    IndexOperation,
    LstmState,
    Marker,
    Reduce,
    WithConstant,
)
from kqat.training import ActivationQuantizer


@pytest.mark.parametrize(
    ("layer", "key", "word"),
    [
        (Reduce("mean", [1]), "kind", "mean"),
        (IndexOperation("argmax", {"axis": 1}), "kind", "argmax"),
        (WithConstant("hide", [1]), "kind", "hide"),
        (LstmState("carry", 3), "kind", "carry"),
        (Marker("site", 2), "kind", "site"),
        (ActivationQuantizer(QuantSpec(), MovingAverage(), clamp="relu6"), "clamp", "relu6"),
    ],
)
def test_a_layer_saves_a_plain_string(layer: Any, key: str, word: str) -> None:
    saved = layer.get_config()[key]
    assert (saved, type(saved)) == (word, str)
    again = getattr(type(layer).from_config(json.loads(json.dumps(layer.get_config()))), key)
    assert isinstance(again, enum.Enum) and again == word


def test_a_layer_is_read_back_by_its_name_of_before() -> None:
    saved = {
        "module": "kqat.primitives",
        "class_name": "Count",
        "registered_name": "kqat>Count",
        "config": {"name": "best", "kind": "argmax", "options": {"axis": 1}},
    }
    layer = keras.saving.deserialize_keras_object(saved)
    assert isinstance(layer, IndexOperation)
    assert keras.saving.serialize_keras_object(layer)["registered_name"] == "kqat>Count"


def test_a_config_saves_and_shows_plain_strings() -> None:
    config = kqat.QuantizeConfig(recurrence="fused")
    saved = config.to_dict()["recurrence"]
    assert (saved, type(saved)) == ("fused", str)
    assert kqat.QuantizeConfig.from_dict(config.to_dict()) == config
    assert "recurrence='fused'" in repr(config)
    assert f"{Clamp.RELU!r} {Clamp.RELU}" == "'relu' relu"
