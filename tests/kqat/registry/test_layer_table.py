"""A new Keras layer is one row: everything that asks about layers asks that row."""

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from kqat import LayerRule, Output
from kqat.base import UnsupportedLayerError
from kqat.registry import LayerFacts, row_of_class
from kqat.registry.layer_table import LAYERS, REGISTERED, stock_facts

ROOT = Path(__file__).parents[3]
# What a process needs to load the model: the layers, but no row of the registry.
DEFINITIONS = '''
import keras
from keras import layers as L

@keras.saving.register_keras_serializable("rows")
class Filters(L.Conv2D):
    """A convolution by another name."""

@keras.saving.register_keras_serializable("rows")
class Cubic(L.Layer):
    """A function of each number."""

    def call(self, x):
        return x * x * x

@keras.saving.register_keras_serializable("rows")
class Largest(L.MaxPooling2D):
    """Values as they come in."""

@keras.saving.register_keras_serializable("rows")
class Noise(L.Layer):
    """Nothing, in inference."""

    def call(self, x, training=False):
        return x + 1.0 if training else x

@keras.saving.register_keras_serializable("rows")
class Sum(L.Layer):
    """Called with two arguments."""

    def call(self, a, b):
        return a + b
'''
LATER = (
    DEFINITIONS
    + """
import numpy as np, tflite_export
from pathlib import Path
qat = keras.models.load_model("qat.keras")
x = np.load("x.npy")
np.save("y.npy", qat.predict(x, verbose=0))
Path("model.tflite").write_bytes(tflite_export.convert(qat, target="tflite_micro"))
qat.compile("sgd", "mse")
before = [np.array(v) for v in qat.trainable_variables]
qat.fit(x, np.zeros((len(x), *qat.output.shape[1:])), epochs=1, verbose=0)
assert any(np.any(a != np.asarray(b)) for a, b in zip(before, qat.trainable_variables))
"""
)


@pytest.fixture
def own() -> Iterator[dict[str, Any]]:
    """Five layers of a user's, each with a row."""
    made: dict[str, Any] = {}
    exec(DEFINITIONS, made)
    rules = {
        "Filters": LayerRule(
            output=Output.OWN,
            ops=("CONV_2D",),
            weights={"kernel": (-1,)},
            takes_normalization=True,
            takes_clamp=True,
        ),
        "Cubic": LayerRule(output=Output.OWN, table=True),
        "Largest": LayerRule(output=Output.SAME, ops=("MAX_POOL_2D",)),
        "Noise": LayerRule(output=Output.VANISHES),
        "Sum": LayerRule(output=Output.OWN, ops=("ADD",)),
    }
    for name, rule in rules.items():
        kqat.register_layer(made[name], rule)
    yield made
    for name in rules:
        REGISTERED.pop(made[name], None)


@pytest.mark.slow
def test_a_new_layer_is_one_row(own: dict[str, Any], tmp_path: Path) -> None:
    x = keras.Input((8, 8, 3), name="image")
    y = L.BatchNormalization(name="norm")(own["Filters"](4, 3, name="filters")(x))
    y = own["Noise"](name="noise")(L.ReLU(name="relu")(y))
    y = own["Largest"](2, name="largest")(own["Cubic"](name="cubic")(y))
    y = own["Sum"](name="sum")(y, y)
    model = keras.Model(x, L.GlobalAveragePooling2D(name="mean")(y))
    data = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)

    one_scale = kqat.QuantSpec(bits=8, symmetric=True, narrow_range=True, axis=None)
    policy = kqat.QuantizeConfig(weights=one_scale)
    plan = kqat.plan(model, policy)
    rows = {layer.name: layer for layer in plan.layers}
    assert (rows["filters"].normalization, rows["filters"].ops) == ("norm", ("CONV_2D",))
    assert (rows["relu"].role, rows["noise"].role) == ("clamp", "training only")
    assert rows["largest"].ops == ("MAX_POOL_2D",)

    qat = kqat.quantize_model(model, policy, calibration_data=data)
    assert qat.get_layer("quant_filters").fold_factor("kernel").shape == (1, 1, 1, 4)
    blob = tflite_export.convert(qat, target="tflite_micro")
    report = tflite_export.verify(qat, blob, data, runtimes=["litert_reference"])
    operators = {"CONV_2D", "CAST", "ADD", "GATHER", "MAX_POOL_2D", "MEAN"}
    assert (set(report.operators), report.float_operators) == (operators, 0)
    assert report.on("litert_reference").max_steps <= 1
    assert report.on("litert_reference").unmatched == ()
    stripped = kqat.strip(qat)
    assert {type(layer) for layer in stripped.layers} >= {own["Cubic"], own["Sum"], own["Largest"]}

    qat.save(tmp_path / "qat.keras")
    np.save(tmp_path / "x.npy", data)
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(LATER)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "model.tflite").read_bytes() == blob
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), qat.predict(data, verbose=0))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


def test_the_documentation_lists_a_registered_layer(own: dict[str, Any]) -> None:
    assert {"Filters", "Cubic", "Sum"} <= set(kqat.supported_layers())
    assert row_of_class(own["Cubic"]).table


@pytest.fixture
def restored() -> Iterator[None]:
    """Rows of stock layers go when a test ends."""
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def refusing(layer: Any) -> str:
    return "not in our products"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "make",
    [
        lambda: L.Resizing(4, 4),
        lambda: L.Activation("relu"),
        lambda: L.Lambda(lambda x: x * 2.0),
        lambda: L.Dropout(0.5),
        lambda: L.BatchNormalization(),
        lambda: L.MaxPooling2D(),
        lambda: L.TimeDistributed(L.Dense(2)),
    ],
)
def test_a_row_for_a_stock_layer_takes_effect(make: Any) -> None:
    layer = make()
    kqat.register_layer(type(layer), LayerRule(output=Output.OWN, refuse=refusing))
    model = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(4, 3), layer])
    with pytest.raises(UnsupportedLayerError, match="not in our products"):
        kqat.plan(model)


@pytest.mark.usefixtures("restored")
def test_a_qat_model_keeps_the_stock_row_that_it_was_planned_with() -> None:
    model = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(4, 3), L.MaxPooling2D(name="pool")])
    data = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=data)
    blob = tflite_export.convert(qat)
    kqat.register_layer(L.MaxPooling2D, LayerRule(output=Output.OWN, refuse=refusing))
    assert tflite_export.convert(qat) == blob


@pytest.mark.parametrize(
    ("layer_class", "message"),
    [
        (keras.Sequential, "Received: Sequential"),
        (L.InputLayer, "Received: InputLayer"),
        (int, "Received: int"),
        ("Dense", "Received: 'Dense'"),
    ],
)
def test_a_row_that_could_not_take_effect_is_refused(layer_class: Any, message: str) -> None:
    before = dict(REGISTERED)
    with pytest.raises(UnsupportedLayerError, match=message):
        kqat.register_layer(layer_class, LayerRule(output=Output.OWN))
    with pytest.raises(UnsupportedLayerError, match="Expected a LayerRule"):
        kqat.register_layer(L.Dense, "a row")  # type: ignore[arg-type]
    assert before == REGISTERED


def test_facts_come_back_from_json() -> None:
    for layer_class, rule in LAYERS.items():
        facts = LayerFacts.of(rule)
        again = LayerFacts.from_dict(json.loads(json.dumps(facts.to_dict())))
        assert again == facts, layer_class


def test_facts_say_when_a_kernel_is_wrong() -> None:
    facts = stock_facts(L.Activation("sigmoid"))
    assert facts is not None and not math.isinf(facts.largest_input_scale)
    assert not facts.ships_as_table(8, 4.0)
    assert facts.ships_as_table(8, 4.5)
    assert not facts.ships_as_table(16, 4.5)
