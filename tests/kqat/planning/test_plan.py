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
        layers.AveragePooling2D(2, name="pool"),
        layers.Dropout(0.5, name="drop"),
        layers.Flatten(name="flat"),
        layers.Dense(3, activation="softmax", name="head"),
    )
    assert str(plan).splitlines() == [
        "plan of model",
        "layer         type                becomes            weights  output scale",
        "------------  ------------------  -----------------  -------  ------------",
        "conv          Conv2D              integer            int8/ch",
        "norm          BatchNormalization  folded into above",
        "relu          Activation          fused into above            own",
        "pool          AveragePooling2D    integer                     as input",
        "drop          Dropout             nothing",
        "flat          Flatten             integer                     as input",
        "head          Dense               integer            int8/ch  own",
        "head_softmax  Activation          integer                     0 to 0.9961",
    ]


def test_values_that_share_a_scale_are_listed_below_the_table() -> None:
    x = keras.Input((6, 6, 3), name="image")
    left, right = (layers.Conv2D(3, 1, activation="relu", name=n)(x) for n in ("left", "right"))
    model = keras.Model(x, layers.Concatenate(name="join")([left, right]), name="model")
    plan = kqat.plan(model, {"*": "int16x8", "join": None})
    assert str(plan).splitlines()[3:] == [
        "right       Conv2D       integer           int8/ch",
        "left        Conv2D       integer           int8/ch",
        "left_relu   Activation   fused into above           shared 1, int16",
        "right_relu  Activation   fused into right           shared 1, int16",
        "join        Concatenate  integer                    as input",
        "shared 1: one scale for left_relu, right_relu",
        "rule decides nothing: join",
    ]


def test_packed_weights_and_misfits_are_said_below_the_table() -> None:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="dense")], name="model")
    plan = kqat.plan(model, "w3a8", target="ethos_u55")
    assert str(plan).splitlines()[3:] == [
        "dense  Dense  integer  3-bit in int4/ch lsq  own",
        "int4: packed two a byte where the target has the kernel, else stored as int8",
        "target ethos_u55: layer 'dense' (FULLY_CONNECTED) stores its 3-bit weights as",
        "  int8: this target has no kernel for packed weights",
    ]


LONG = "stage_with_a_name_that_says_everything_block_{}_depthwise"


@pytest.mark.parametrize(
    ("classes", "policy", "loss"),
    [(1000, "int16x8", "5.8%"), (1000, "int8", None), (100, "int16x8", None)],
)
def test_a_softmax_whose_kernel_sums_too_much_is_said_before_training(
    classes: int, policy: str, loss: str | None
) -> None:
    flat, head = layers.Flatten(), layers.Dense(classes, "softmax", name="head")
    found = [note for note in plan_of(flat, head, policy=policy).notes() if "too small" in note]
    assert [note.startswith("head_softmax: ") and f"up to {loss}" in note for note in found] == (
        [True] if loss else []
    )


@pytest.mark.parametrize("width", [64, 80, 200])
def test_a_line_fits_and_names_are_shortened_and_told_apart(width: int) -> None:
    chain = [
        layer
        for i in range(3)
        for layer in (
            layers.DepthwiseConv2D(1, name=LONG.format(i)),
            layers.BatchNormalization(name=f"{LONG.format(i)}_norm"),
        )
    ]
    plan = plan_of(*chain, layers.ReLU(6.0, name="end"))
    lines = plan.text(width).splitlines()
    assert len(lines) == 3 + 7  # one line a layer
    assert max(map(len, lines)) <= width
    names = [line.split()[0] for line in lines[3:]]
    for name, layer in zip(names, plan.layers, strict=True):
        head, *others = name.split("…")
        assert others or name == layer.name
        assert layer.name.startswith(head) and all(part in layer.name for part in others)
    assert len(set(names)) == len(plan.layers)
    assert (width < 200) == any("…" in name for name in names)


def test_a_list_of_names_breaks_between_names() -> None:
    x = keras.Input((4, 4, 2), name="image")
    parts = [layers.Conv2D(2, 1, name=f"convolution-number-{i}")(x) for i in range(6)]
    plan = kqat.plan(keras.Model(x, layers.Concatenate(name="join")(parts), name="model"))
    text = plan.text(60)
    assert max(map(len, text.splitlines())) <= 60
    words = text.replace(",", " ").split()
    assert all(words.count(f"convolution-number-{i}") >= 1 for i in range(6))


def test_a_plan_is_kept_as_json(tmp_path: Path) -> None:
    plan = plan_of(
        layers.Conv2D(2, 3, activation="relu", name="a"),
        layers.Conv2D(2, 3, name="b"),
        policy={"b": None, "b*": None},
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
        "gradient": None,
        "sources": ["a_relu"],
    }
    assert table["unused_rules"] == ["b*"]


def test_a_plan_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    plan = plan_of(layers.Conv2D(2, 3))
    with pytest.raises(FileNotFoundError, match="missing"):
        plan.save(tmp_path / "missing" / "plan.json")
    assert list(tmp_path.iterdir()) == []
