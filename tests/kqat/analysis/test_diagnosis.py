"""Three planted faults, each of which a diagnosis names, with what helps."""

import json
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat.analysis import Cause, Diagnosis


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(96, *shape)).astype(np.float32)


def outlying() -> tuple[keras.Model, keras.Model, np.ndarray]:
    """A normalization with one channel that is 100 times as large as the others."""
    x = keras.Input((12,), name="x")
    y = layers.Dense(24, activation="relu", name="before")(x)
    y = layers.LayerNormalization(name="norm")(y)
    model = keras.Model(x, layers.Dense(6, name="head")(y), name="outlying")
    gamma = np.ones(24, np.float32)
    gamma[7] = 100.0
    model.get_layer("norm").gamma.assign(gamma)
    kernel = np.array(model.get_layer("head").kernel)
    kernel[7] /= 50.0
    model.get_layer("head").kernel.assign(kernel)
    x = data(12)
    return model, kqat.quantize_model(model, calibration_data=x), x


def clipped() -> tuple[keras.Model, keras.Model, np.ndarray]:
    """A convolution whose range was given for smaller values than it has."""
    chain = [
        layers.Conv2D(8, 3, activation="relu", name="first"),
        layers.Conv2D(8, 3, name="cut"),
        layers.ReLU(name="relu"),
        layers.GlobalAveragePooling2D(name="pool"),
        layers.Dense(4, name="head"),
    ]
    model = keras.Sequential([keras.Input((10, 10, 3), name="x"), *chain], name="clipped")
    x = data(10, 10, 3)
    kernel = model.get_layer("cut").kernel
    kernel.assign(kernel * 4.0)
    narrow = kqat.QuantizeConfig(activation_range=kqat.Fixed(0.0, 1.0))
    with pytest.warns(kqat.CalibrationWarning, match="clipped"):
        qat = kqat.quantize_model(model, {"relu": narrow}, calibration_data=x)
    return model, qat, x


def joined() -> tuple[keras.Model, keras.Model, np.ndarray]:
    """Boxes in pixels and scores below one, in one output."""
    x = keras.Input((16,), name="x")
    y = layers.Dense(24, activation="relu", name="features")(x)
    boxes = layers.Rescaling(300.0, name="pixels")(layers.Dense(4, name="boxes")(y))
    scores = layers.Dense(6, activation="sigmoid", name="scores")(y)
    model = keras.Model(x, layers.Concatenate(name="both")([boxes, scores]), name="joined")
    x = data(16)
    with pytest.warns(kqat.CalibrationWarning, match="unlike"):
        qat = kqat.quantize_model(model, calibration_data=x)
    return model, qat, x


@pytest.fixture(scope="module")
def diagnoses() -> dict[str, Diagnosis]:
    """The diagnosis of each planted fault."""
    found = {}
    for make in (outlying, clipped, joined):
        keras.utils.set_random_seed(0)
        found[make.__name__] = kqat.diagnose(*make(), remedies=False)
    return found


FAULTS = [
    ("outlying", Cause.OUTLIER_CHANNEL, "norm", "channel 7 of 24"),
    ("clipped", Cause.CLIPPING, "relu", r"outside \[0, 1\]"),
    ("joined", Cause.SHARED_SCALE, "scores_sigmoid", "the scale of 'both'"),
]


@pytest.mark.parametrize(("name", "cause", "layer", "words"), FAULTS)
def test_a_planted_fault_is_named(
    name: str, cause: Cause, layer: str, words: str, diagnoses: dict[str, Diagnosis]
) -> None:
    found = diagnoses[name]
    first = found.findings[0]
    assert (first.cause, first.layer) == (cause, layer)
    assert [f for f in found.findings if f.cause is cause and f.layer != layer] == []
    assert re.search(words, first.text)
    assert first.layer in str(found) and str(first.cause) in str(found)


@pytest.mark.slow
def test_what_helps_is_tried_and_measured() -> None:
    diagnoses = {}
    for make in (outlying, clipped, joined):
        keras.utils.set_random_seed(0)
        diagnoses[make.__name__] = kqat.diagnose(*make())
    best = {name: found.remedies[0] for name, found in diagnoses.items()}
    smooth = next(r for r in diagnoses["outlying"].remedies if "smooth_quant" in r.name)
    assert smooth.helps and smooth.gain_db > 6.0
    assert best["clipped"].name == "a range over all that was seen for 'relu'"
    assert best["clipped"].gain_db > 20.0
    wide = next(r for r in diagnoses["joined"].remedies if "int16x8" in r.name)
    assert "'both'" in wide.name
    assert wide.gain_db > 20.0
    # What cannot be tried says why.
    left = [r for r in diagnoses["joined"].remedies if r.sqnr_db is None]
    assert left and all(r.note.startswith("Expected") for r in left)


def test_the_clipped_layer_costs_most(diagnoses: dict[str, Diagnosis]) -> None:
    found = diagnoses["clipped"]
    worst = found.worst(1)[0]
    assert (worst.name, worst.what) == ("relu", "values")
    assert worst.share > 0.9
    # Calibration moves the means of the layers behind it back, which alone does not show.
    assert worst.isolated_db - 1.0 < found.total_db < 20.0
    assert sum(layer.share for layer in found.layers) == pytest.approx(1.0)
    along = [layer.cumulative_db for layer in found.layers if layer.what == "values"]
    place = next(i for i, x in enumerate(along) if x < 30.0)
    assert found.layers[place + sum(x.what != "values" for x in found.layers[: place + 2])] == worst


def test_isolated_losses_are_those_of_a_model_that_rounds_nothing_else() -> None:
    keras.utils.set_random_seed(0)
    chain = [layers.Dense(8, activation="relu", name="a"), layers.Dense(3, name="b")]
    model = keras.Sequential([keras.Input((5,), name="x"), *chain])
    x = data(5)
    qat = kqat.quantize_model(model, "w3a8", calibration_data=x)
    found = {
        (row.name, row.what): row.isolated_db
        for row in kqat.diagnose(model, qat, x, remedies=False).layers
    }
    kernel: Any = qat.get_layer("quant_a").rounded("kernel")
    a, b = (model.get_layer(name) for name in "ab")
    shown = x[::2]
    want = model(shown).numpy()
    got = np.maximum(shown @ np.asarray(kernel) + np.asarray(a.bias), 0.0) @ b.kernel + b.bias
    by_hand = 10 * np.log10(np.mean(want**2) / np.mean((want - got) ** 2))
    assert found["a", "weights"] == pytest.approx(by_hand, abs=0.3)


def test_a_good_model_has_no_cause_and_its_report_is_kept(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(8, activation="relu", name="<a>"), layers.Dense(3)]
    )
    x = data(5)
    found = kqat.diagnose(model, kqat.quantize_model(model, calibration_data=x), x, remedies=False)
    assert found.findings == ()
    assert "no single cause" in str(found)
    assert found.total_db > 30.0 and found.float_db > 30.0
    assert found.agreement is not None and found.agreement > 0.9
    found.save(tmp_path / "found.json")
    table = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in table["layers"]] == [row.name for row in found.layers]
    found.save_html(tmp_path / "found.html")
    page = (tmp_path / "found.html").read_text()
    assert "&lt;a&gt;" in page and "<a>" not in page
    assert f"{found.total_db:.1f} dB" in page


def test_a_bias_that_int32_does_not_hold_is_named() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(8, name="dead"), layers.Dense(3, name="head")]
    )
    dead = model.get_layer("dead")
    kernel = np.array(dead.kernel)
    kernel[:, 2] *= 1e-9
    dead.kernel.assign(kernel)
    dead.bias.assign(np.full(8, 0.5))
    x = data(5)
    qat = kqat.quantize_model(model, calibration_data=x)
    found = kqat.diagnose(model, qat, x, remedies=False)
    overflow = [f for f in found.findings if f.cause is Cause.BIAS_OVERFLOW]
    assert [f.layer for f in overflow] == ["dead"]
    assert "1 of 8 channels" in overflow[0].text


def test_few_bits_and_a_starved_grid_are_named() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,), name="x"), layers.Dense(16, name="few"), layers.Dense(3, name="head")]
    )
    x = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    # One large value in each channel, so that no channel stands out.
    for channel in range(64):
        x[2 * channel, channel] = 300.0 * (-1) ** channel
    qat = kqat.quantize_model(model, {"few": "w2a8"}, calibration_data=x, calibration="minmax")
    found = kqat.diagnose(model, qat, x, remedies=False)
    causes = {(f.cause, f.layer) for f in found.findings}
    assert {(Cause.FEW_BITS, "few"), (Cause.STARVED_GRID, "x")} <= causes
    assert not any(cause is Cause.OUTLIER_CHANNEL for cause, _ in causes)
    more = kqat.diagnose(model, qat, x).remedies
    assert next(r for r in more if r.name == "'int8' for the weights of 'few'").helps


def test_models_that_do_not_match_are_refused() -> None:
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    other = keras.Sequential([keras.Input((5,)), layers.Dense(4)])
    x = data(5)
    qat = kqat.quantize_model(model, calibration_data=x)
    with pytest.raises(kqat.ModelError, match="Expected the float model that"):
        kqat.diagnose(other, qat, x)
    with pytest.raises(kqat.ModelError, match="Expected a QAT model to diagnose"):
        kqat.diagnose(model, model, x)
    with pytest.raises(kqat.CalibrationError, match="at least two samples"):
        kqat.diagnose(model, qat, x[:1])
    with pytest.warns(kqat.RangeWarning):
        raw = kqat.quantize_model(model)
    with pytest.raises(kqat.CalibrationError, match="has no range"):
        kqat.diagnose(model, raw, x)
