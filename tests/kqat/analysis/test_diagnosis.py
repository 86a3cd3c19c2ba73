"""Three planted faults, each of which a diagnosis names, with what helps."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat.analysis import Cause, Diagnosis, Finding, LayerLoss
from kqat.analysis.diagnosis import _advised
from kqat.analysis.grid_use import rounded_tensors
from kqat.analysis.remedies import Remedy, _from_model, _on_qat, _Policies, key_of
from kqat.config import QuantizePolicy
from kqat.graph import trace
from tests.kqat.planning.test_tied_weights import KINDS, data_of


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


def applied(code: str, model: keras.Model, qat: keras.Model, data: np.ndarray) -> keras.Model:
    """What the code of an advice makes, run as it was printed."""
    copy = keras.models.clone_model(qat)
    copy.set_weights(qat.get_weights())
    names = {"kqat": kqat, "keras": keras, "model": model, "qat": copy, "data": data}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        exec(code, names)
    return cast(keras.Model, names.get("mended", copy))


def sqnr(want: np.ndarray, got: Any) -> float:
    """That of outputs, by hand."""
    difference = np.float64(want) - np.float64(got)
    return float(10 * np.log10(np.mean(np.float64(want) ** 2) / np.mean(difference**2)))


def of_outputs(want: Any, got: Any) -> float:
    """That of several outputs: of the mean of their noises."""
    noises = [10 ** (-sqnr(a, b) / 10) for a, b in zip(want, got, strict=True)]
    return float(-10 * np.log10(np.mean(noises)))


def scaled() -> tuple[keras.Model, keras.Model, np.ndarray]:
    """Large and small values that a Dense reads of one join."""
    x = keras.Input((16,), name="x")
    large = layers.Rescaling(300.0, name="large")(layers.Dense(8, name="before")(x))
    small = layers.Dense(8, activation="tanh", name="small")(x)
    both = layers.Concatenate(name="both")([large, small])
    model = keras.Model(x, layers.Dense(4, name="head")(both), name="scaled")
    head = model.get_layer("head")
    head.kernel.assign(head.kernel.numpy() / np.r_[np.full(8, 300.0), np.ones(8)][:, None])
    x = data(16)
    with pytest.warns(kqat.CalibrationWarning, match="unlike"):
        qat = kqat.quantize_model(model, {"both": "int8"}, calibration_data=x)
    return model, qat, x


def mixed() -> tuple[keras.Model, keras.Model, np.ndarray]:
    """A residual block with an outlier channel, of more than one preset, trained on."""
    x = keras.Input((8, 8, 3), name="image")
    y = layers.Conv2D(8, 3, padding="same", use_bias=False, name="e1")(x)
    y = layers.BatchNormalization(name="e1_bn")(y)
    y = layers.ReLU(name="e1_relu")(y)
    z = layers.Conv2D(8, 3, padding="same", activation="relu", name="e2")(y)
    y = layers.MaxPooling2D(name="pool")(layers.Add(name="skip")([y, z]))
    y = layers.GlobalAveragePooling2D(name="mean")(y)
    model = keras.Model(x, layers.Dense(4, name="class")(y), name="mixed")
    gamma = np.ones(8, np.float32)
    gamma[3] = 60.0
    model.get_layer("e1_bn").gamma.assign(gamma)
    for name in ("e2", "class"):
        kernel = model.get_layer(name).kernel.numpy()
        kernel[..., 3, :] /= 60.0
        model.get_layer(name).kernel.assign(kernel)
    x = data(8, 8, 3)
    policy = kqat.QuantizePolicy("int8", (("e2", "w4a8"), ("class", "w3a8")))
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    qat.get_layer("quant_class").layer.bias.assign([0.0, 0.1, 0.0, 0.0])  # as training would
    return model, qat, x


MAKERS: list[Callable[[], tuple[keras.Model, keras.Model, np.ndarray]]] = [
    outlying, clipped, joined, mixed,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
def test_every_advice_is_what_was_measured(make: Any) -> None:
    keras.utils.set_random_seed(0)
    model, qat, x = make()
    found = kqat.diagnose(model, qat, x)
    printed = str(found)
    remedies = json.loads(found.to_json())["remedies"]
    ran = [remedy for remedy in remedies if remedy["sqnr_db"] is not None]
    assert len(ran) > 5 and any(remedy["helps"] for remedy in ran)
    before, unrounded = found.total_db, kqat.strip(qat).predict(x[::2], verbose=0)
    if not found.measured_at:
        assert before == pytest.approx(sqnr(unrounded, qat.predict(x[::2], verbose=0)), abs=0.1)
    for remedy in ran:
        code = remedy["code"]
        mended = applied(code, model, qat, x[1::2])
        if remedy["name"] == "adapt":
            # Its outputs, each by itself, and those of the model as it is at the same places.
            parts = [(unrounded, qat.predict(x[::2], verbose=0)), (unrounded,)]
            both = [[np.split(y, [4], axis=-1) for y in some] for some in parts]
            boxes_and_scores = [np.asarray(y) for y in mended(x[::2], training=False)]
            before_there = of_outputs(*both[0])
            after = of_outputs(both[1][0], boxes_and_scores)
            assert after - before_there == pytest.approx(remedy["gain_db"], abs=0.1)
            assert f"has {before_there:.1f} dB there" in remedy["note"] and remedy["own_db"] > 20.0
            assert after == pytest.approx(remedy["sqnr_db"], abs=0.1)
            assert f"\n{code}\n" in f"{printed}\n"
            continue
        if not found.measured_at:
            # Called: `predict` would trace each of these models, which takes longer than all else.
            after = sqnr(unrounded, mended(x[::2], training=False))
        elif remedy["name"] in ("adaround", "gptq", "correct_biases"):
            continue  # these move weights, so that the unrounded ones are others
        else:
            after = kqat.diagnose(model, mended, x, remedies=False).total_db
        assert after - before == pytest.approx(remedy["gain_db"], abs=0.1), code
        assert after == pytest.approx(remedy["sqnr_db"], abs=0.1), code
        # Where it helps, the text holds it as it is, in lines of its own.
        assert (f"\n{code}\n" in f"{printed}\n") is remedy["helps"], code
    trained = found.trained_db < 100.0
    assert trained is (make is mixed)
    for remedy in ran:
        if "quantize_model" in remedy["code"]:
            assert ("kqat.strip(qat)" in remedy["code"]) is trained
    for finding in found.findings:
        helping = [remedy["code"] for remedy in ran if remedy["helps"]]
        assert not finding.advice or finding.advice in helping


@pytest.mark.slow
def test_members_that_share_a_scale_inside_are_scaled_alike() -> None:
    keras.utils.set_random_seed(0)
    model, qat, x = scaled()
    found = kqat.diagnose(model, qat, x, remedies=False)
    causes = {key_of(f): f for f in found.findings}
    shared = "shared scale: small_tanh"
    trials = _Policies(model, qat, trace(qat)).trials([causes[shared], *found.findings])
    trial = next(t for t in trials if t.name == "adapt")
    # The small rows of the kernel that reads them have the same cause.
    assert set(trial.against) == {shared, "unlike rows: head"}
    mended = applied(trial.code, model, qat, x)
    want, one = kqat.strip(qat)(x).numpy(), trial.run(x)(x)
    np.testing.assert_array_equal(mended(x), one)
    # 29 dB instead of 2: the kernel's rows and the small values have their bits again.
    assert sqnr(want, one) > sqnr(want, qat(x)) + 20.0
    assert "&&" in trial.command and trial.command.count("--data") == 2
    # What is alike already stays as it is, and the text says so.
    with pytest.raises(kqat.KqatError, match=r"times as far as another\. Received: none"):
        trial.run(np.zeros_like(x))


@pytest.fixture(scope="module")
def tried_out() -> Diagnosis:
    """The outlier channel, with remedies."""
    keras.utils.set_random_seed(0)
    return kqat.diagnose(*outlying())


@pytest.mark.slow
def test_an_advice_helps_and_what_does_not_apply_names_what_blocks_it(
    tried_out: Diagnosis,
) -> None:
    first = tried_out.findings[0]
    best = next(r for r in tried_out.remedies if r.code == first.advice)
    assert best.helps and best.own_db > 6.0
    smooth = next(r for r in tried_out.remedies if r.name == "smooth_quant")
    assert smooth.helps and f"{first.cause}: {first.layer}" in smooth.against
    equal = next(r for r in tried_out.remedies if r.name == "equalize")
    assert equal.sqnr_db is None and not equal.helps
    assert re.search("'before': 'norm.*reads it", equal.note)
    assert equal.code not in str(tried_out)


@pytest.mark.slow
def test_16_bits_are_given_to_what_reads_the_value_too(tried_out: Diagnosis) -> None:
    wide = [r for r in tried_out.remedies if "int16x8" in r.code]
    assert wide and all("'head': 'int16x8'" in r.code for r in wide)
    assert wide[0].helps and wide[0].own_db > 6.0


@pytest.mark.slow
def test_a_gain_of_the_data_is_not_said_to_be_of_a_method(tried_out: Diagnosis) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,), name="x"), layers.Dense(8, name="a"), layers.Dense(3, name="b")]
    )
    x = data(6)
    qat = kqat.quantize_model(model, calibration_data=x / 10.0)
    found = kqat.diagnose(model, qat, x)
    again = next(r for r in found.remedies if r.code == "kqat.calibrate(qat, data)")
    assert again.helps and again.gain_db > 10.0 and "other data" in again.note
    methods = [r for r in found.remedies if r.name.startswith("calibrate by")]
    assert len(methods) == 3 and all(r.gain_db > 10.0 and not r.helps for r in methods)
    assert {f.advice for f in found.findings} == {again.code}
    # What lies outside is told for each tensor, and that these are no calibration data.
    rows = {(row.name, row.what): row.clipped for row in found.layers}
    assert rows["x", "input"] > 0.2 and rows["a", "values"] > 0.2 and rows["a", "weights"] == 0.0
    assert found.notes == ()
    assert "calibration data" in tried_out.notes[0] and "note: no value of" in str(tried_out)


def test_the_output_has_a_row_and_the_numbers_are_explained() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,), name="x"),
            layers.Dense(8, activation="relu", name="a"),
            layers.Dense(4, activation="softmax", name="class"),
        ]
    )
    x = data(6)
    qat = kqat.quantize_model(model, calibration_data=x)
    found = kqat.diagnose(model, qat, x, remedies=False)
    # The same names and words as in the plots.
    plotted = {(t.title, t.role) for t in rounded_tensors(qat, trace(qat)) if t.quantizer}
    assert {(r.name, r.what) for r in found.layers if r.what != "weights"} == plotted
    (row,) = [row for row in found.layers if row.what == "output"]
    assert row.share == 0.0 and 30.0 < row.isolated_db < 70.0
    assert found.measured_at == ("class",)
    text = str(found)
    assert f"{row.name:<27} output" in text and "output's own grid is in the first" in " ".join(
        text.split()
    )
    alone = [10.0 ** (-r.isolated_db / 10.0) for r in found.layers if r.what != "output"]
    assert found.sum_db == pytest.approx(-10.0 * np.log10(sum(alone)))
    assert f"{found.sum_db:.1f} dB  if the roundings below" in text
    assert found.trained_db > 100.0


def test_what_hides_behind_a_larger_fault_is_said_to_hide() -> None:
    """All that a small noise could gain is less than half a decibel: no gain is for its sake."""
    finding = Finding(Cause.OUTLIER_CHANNEL, "a", "found", 9.0, of_weights=False)
    both = Remedy("gptq", "code", (), 40.0, 9.0, None, 9.0, True, "", (key_of(finding),))

    def verdict(share: float, what: str = "values", advice: str = "") -> str:
        rows = (LayerLoss("a", what, 8, 30.0, 30.0, share, 0.0),)
        one = dataclasses.replace(finding, advice=advice)
        found = Diagnosis("n", 4, 9.0, 9.0, 9.0, 90.0, (), None, rows, (one,), (both,), ())
        return found.verdict_on(one)

    assert "10 % of the noise" in verdict(0.1) and "diagnose again" in verdict(0.1)
    assert verdict(0.2).startswith("Nothing that was tried")
    assert verdict(0.2, advice="code").startswith("Helps: gptq (+9.0 dB)")
    # What is for the larger one too gains by that; what is for the small one alone, as where it
    # calibrates again before, gains for its sake.
    larger = dataclasses.replace(finding, cause=Cause.SHARED_SCALE, layer="b")
    rows = [LayerLoss(*row, 0.0) for row in (("a", "values", 8, 30.0, 30.0, 0.1),
                                             ("b", "values", 8, 3.0, 3.0, 0.9))]  # fmt: skip
    for_two = dataclasses.replace(both, against=(key_of(finding), key_of(larger)))
    for remedy, wanted in ((for_two, ["", "code"]), (both, ["code", ""])):
        assert [f.advice for f in _advised([finding, larger], rows, [remedy])] == wanted
    # An output behind the place where noises are taken has no share.
    assert verdict(0.0, "output").startswith("Nothing that was tried")


def test_on_the_command_line_what_helps_is_a_command() -> None:
    def remedy(name: str, code: str, command: tuple[str, ...]) -> Remedy:
        return Remedy(name, code, command, 40.0, 9.0, None, 9.0, True, "", ())

    policy = QuantizePolicy.of({"a [[]x]": "int16x8", "b": None, "c" * 50: "w4a8"})
    own = QuantizePolicy.of({"a": kqat.QuantizeConfig(weight_step="lsq")})
    assert _from_model(own) == () and _from_model(QuantizePolicy.of({layers.Dense: None})) == ()
    assert _from_model(QuantizePolicy.of("w4a8"))[5:7] == ("--policy", "w4a8")
    tried = (
        remedy("gptq", "mended = kqat.algorithms.gptq(qat, data)", _on_qat("--algorithm", "gptq")),
        remedy("16 bits", "mended = kqat.quantize_model(…)", _from_model(policy)),
        remedy("adapt", "adapted = …", ("kqat", "adapt", "MODEL", "&&", *_from_model(policy)[:3])),
        remedy("a range over all values", "mended = kqat.quantize_model(own)", _from_model(own)),
    )
    found = Diagnosis("net", 4, 30.0, 30.0, 30.0, 90.0, (), None, (), (), tried, ())
    assert "kqat.algorithms.gptq(qat, data)" in str(found) and "kqat calibrate" not in str(found)
    text = found.text({"MODEL": "my net.keras", "QAT": "qat.keras", "DATA": "x.npy"})
    assert "kqat calibrate qat.keras --data x.npy --algorithm gptq -o mended.keras" in text
    joined = text.replace(" \\\n    ", " ")
    assert (
        "kqat quantize 'my net.keras' --data x.npy --layer 'a [[]x]=int16x8' --layer b=float "
        f"--layer {'c' * 50}=w4a8 -o mended.keras\n"
    ) in joined
    assert "kqat adapt 'my net.keras'\nkqat quantize 'my net.keras'\n" in text
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"(-o|--\w+) \\$", text, re.MULTILINE)
    assert text.count("kqat.") == 1 and "in Python, with the loaded files as model" in text


@pytest.mark.slow
def test_lines_fit_a_terminal(tried_out: Diagnosis, diagnoses: dict[str, Diagnosis]) -> None:
    for found in (tried_out, *diagnoses.values()):
        code = {line for remedy in found.remedies for line in remedy.code.splitlines()}
        lines = [line for line in str(found).splitlines() if line not in code]
        assert max(map(len, lines)) <= 80


def test_the_clipped_layer_costs_most(diagnoses: dict[str, Diagnosis]) -> None:
    found = diagnoses["clipped"]
    worst = found.worst(1)[0]
    assert (worst.name, worst.what) == ("relu", "values")
    assert worst.share > 0.9
    # Calibration moves the means of the layers behind it back, which alone does not show.
    assert worst.isolated_db - 1.0 < found.total_db < 20.0
    assert sum(layer.share for layer in found.layers) == pytest.approx(1.0)
    along = [layer.cumulative_db for layer in found.layers if layer.what != "weights"]
    place = next(i for i, x in enumerate(along) if x < 30.0)
    assert (
        found.layers[place + sum(x.what == "weights" for x in found.layers[: place + 2])] == worst
    )


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
        [keras.Input((5,)), layers.Dense(8, activation="relu", name="a>b"), layers.Dense(3)]
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
    assert "a&gt;b" in page and "a>b" not in page
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


def test_rows_of_a_kernel_that_share_a_step_with_larger_ones_are_named() -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((16,), name="x")
    y = layers.Rescaling([1.0] * 8 + [500.0] * 8, name="unlike")(x)
    model = keras.Model(x, layers.Dense(4, name="head")(y))
    head = model.get_layer("head")
    head.kernel.assign(head.kernel.numpy() / np.r_[np.ones(8), np.full(8, 500.0)][:, None])
    x = data(16)
    qat = kqat.quantize_model(model, {"unlike": "int16x8"}, calibration_data=x)
    found = kqat.diagnose(model, qat, x, remedies=False).findings
    rows = [f for f in found if f.cause is Cause.UNLIKE_ROWS]
    assert [f.layer for f in rows] == ["head"] and rows[0].of_weights
    assert "of 8 of 16 input channels" in rows[0].text


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "two heads", "layer called twice"])
def test_layers_that_read_one_weight_are_tried_together(kind: str) -> None:
    model = KINDS[kind][0]()
    x = data_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        qat = kqat.quantize_model(model, "ternary", calibration_data=x)
        found = kqat.diagnose(model, qat, x)
    (tied,) = kqat.plan(model).tied
    (wider,) = (r for r in found.remedies if r.name.startswith("weights of 8 bits"))
    assert all(repr(name) in wider.code for name in tied)
    assert wider.helps


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
