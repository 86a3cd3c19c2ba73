"""The benchmarks run, and compare what they say they compare. No test looks at a time."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import pytest
import tf_keras

from benchmarks import (
    applications,
    calibration,
    convert,
    device_model,
    file_sizes,
    masked_means,
    method_overhead,
    normalization,
    peers,
    range_following,
    tensorboard_cost,
    training_step,
    zoo,
)
from benchmarks.networks import NETWORKS, SMOKE
from kqat.grids import CALIBRATION_METHODS, Anchor, MovingAverage, QuantSpec
from kqat.training import ActivationQuantizer
from kqat.training.activation_quantizer import SiteRange
from recipes import data
from recipes.models import resnet8
from recipes.timing import Seconds, Spread, ratio, spread, take_turns


def test_cases_take_turns_and_warm_up_does_not_count() -> None:
    order: list[str] = []

    def case(name: str) -> Callable[[], Seconds]:
        def run() -> Seconds:
            order.append(name)
            return Seconds(float(len(order)), 0.0)

        return run

    measured = take_turns({"a": case("a"), "b": case("b")}, rounds=2, warmup=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert [s.wall for s in measured["a"]] == [3.0, 6.0]
    assert [s.wall for s in measured["b"]] == [4.0, 5.0]


def test_ratios_are_taken_within_a_round() -> None:
    measured = {
        "slow": [Seconds(2.0, 8.0), Seconds(20.0, 4.0), Seconds(30.0, 1.0)],
        "fast": [Seconds(1.0, 1.0), Seconds(10.0, 1.0), Seconds(10.0, 1.0)],
    }
    assert ratio(measured, "slow", "fast") == Spread(lower=2.0, median=2.0, upper=2.5)
    assert ratio(measured, "slow", "fast", "processor").median == 4.0
    assert spread(measured, "slow").median == 20.0


def test_resnet8_is_that_of_the_recipes() -> None:
    mine, recipe = NETWORKS["resnet8"].build(keras), resnet8()
    mine.set_weights(recipe.get_weights())
    x = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype(np.float32)
    # The same operations on the same weights: equal to the bit.
    np.testing.assert_array_equal(mine.predict(x, verbose=0), recipe.predict(x, verbose=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, *SMOKE])
def test_both_keras_build_the_same_network(name: str) -> None:
    network = (NETWORKS | SMOKE)[name]
    new, old = network.build(keras), network.build(tf_keras)
    generator = np.random.default_rng(0)
    weights = [w + generator.uniform(0.0, 0.1, w.shape) for w in new.get_weights()]
    new.set_weights(weights)
    old.set_weights(weights)
    x = generator.uniform(-1.0, 1.0, (2, *network.input_shape)).astype(np.float32)
    # BatchNormalization multiplies in another order in Keras 2: some ulps of float32 per layer.
    np.testing.assert_allclose(
        new.predict(x, verbose=0), old.predict(x, verbose=0), rtol=1e-3, atol=1e-6
    )


@pytest.mark.slow
def test_each_method_is_divided_by_the_float_model(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    cases = ["int8 (default)", "LSQ, freezing oscillations", method_overhead.DISTILLED]
    method_overhead.main(["--smoke", "--cases", *cases, "--out", str(out)])
    ratios = json.loads(out.read_text())["stem"]["processor"]["ratios"]
    assert list(ratios) == [f"{case} / float" for case in cases]
    page = out.with_suffix(".md").read_text()
    assert all(f"| {case} | " in page for case in cases)


@pytest.mark.slow
@pytest.mark.parametrize("main", [training_step.main, convert.main])
def test_benchmark_measures_both_clocks(
    main: Callable[[Sequence[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "measured.json"
    main(["--smoke", "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["machine"]["cores"] > 0
    for clock in ("wall", "processor"):
        measured = content["networks"]["stem"][clock]
        assert {len(sample) for sample in measured["seconds"].values()} == {content["rounds"]}
        assert any(name.startswith("kqat / float") for name in measured["ratios"])
        assert all(r["lower"] <= r["median"] <= r["upper"] for r in measured["ratios"].values())
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("network  case")
    assert any(line.startswith("stem     kqat") for line in table)


@pytest.mark.slow
def test_ways_of_moving_ranges_start_from_what_training_does(tmp_path: Path) -> None:
    out = tmp_path / "ways.json"
    (found,) = range_following.main(["--smoke", "--out", str(out)]).values()
    assert set(found) == {*range_following.WAYS, range_following.AGAIN}
    assert out.with_suffix(".md").read_text().count("| sorted |") == 1


def test_the_way_of_now_is_that_of_the_layer() -> None:
    generator = np.random.default_rng(0)
    layer = ActivationQuantizer(QuantSpec(), MovingAverage())
    layer.build((None, 4))
    layer.start({0: SiteRange(-1.0, 2.0, -1.2, 2.5, (0.1, 0.0), 8)})
    anchor, count = np.asarray(layer.anchor)[..., 0].astype(float), float(layer.count[0])
    batches = np.linspace(1.0, 6.0, 60)[:, None] * generator.uniform(0.5, 1.0, (60, 2))
    for low, high in batches:
        layer.observe(np.asarray([-low, high], np.float32))
    seen = range_following.Seen(anchor, count, np.ones((2, 8)), batches, 8)
    want = -float(layer.site_low[0]), float(layer.site_high[0])
    np.testing.assert_allclose(range_following.WAYS[range_following.NOW](seen), want, rtol=1e-4)


def test_what_batches_are_expected_to_show() -> None:
    samples = np.random.default_rng(0).uniform(size=(2, 500))
    draws = np.random.default_rng(1).choice(samples, (4000, 8), axis=1).max(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(range_following.expected(samples, 8), draws, rtol=0.01)
    # Batches as in calibration change no range.
    seen = range_following.Seen(
        np.asarray(Anchor.rows((1.0, 1.0), (1.0, 1.0), (0.0, 0.0)), float),
        100.0,
        samples,
        np.broadcast_to(range_following.expected(samples, 8), (50, 2)),
        8,
    )
    np.testing.assert_array_equal(range_following.by_spread(seen), [1.0, 1.0])


@pytest.mark.slow
def test_the_cost_of_tensorboard_is_a_ratio(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    tensorboard_cost.main(["--smoke", "--out", str(out)])
    ratios = json.loads(out.read_text())["networks"]["stem"]["processor"]["ratios"]
    assert set(ratios) == {f"{case} / {tensorboard_cost.PLAIN}" for case in tensorboard_cost.CASES}
    assert all(ratio["median"] > 0.0 for ratio in ratios.values())


@pytest.mark.slow
# TensorFlow's words about tfmot's model, whose ranges are trained, as they should be.
@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs were expected:UserWarning")
def test_peers_start_from_the_same_weights(tmp_path: Path) -> None:
    results = peers.main(["--smoke", "--task", "ic", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    files = results["tasks"]["ic"]
    assert {"float", "kqat PTQ", "converter PTQ", "kqat QAT", "tfmot QAT"} <= set(files)
    # The same weights on the same ranges: noise alone tells integer files from the float model.
    assert files["kqat PTQ"]["sqnr_db"] > 20
    assert files["kqat PTQ"]["file_bytes"] <= files["converter PTQ"]["file_bytes"]
    (table,) = peers.tables(results)
    assert [row[0] for row in table.rows] == list(files)


@pytest.mark.slow
def test_a_family_of_applications_goes_the_whole_road(tmp_path: Path) -> None:
    results = applications.main(["--smoke", "--out", str(tmp_path)])
    found = results["families"]["MobileNetV2"]
    assert found["moved"] == 1.0
    assert found["float_operators"] == 0
    # One step: kernels round twice where float arithmetic rounds once.
    assert all(steps in (0, 1) for steps in found["lockstep"].values())
    assert set(found["unmatched"].values()) == {0}
    assert found["differing"] == dict.fromkeys(applications.RUNTIMES, 0)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    ((title, _, rows, _),) = applications.tables(results)
    assert title.startswith("Families")
    assert rows[0][0] == "MobileNetV2"


@pytest.mark.slow
def test_narrow_weights_make_small_files(tmp_path: Path) -> None:
    found = file_sizes.main(["--policies", "int8", "w4a8", "ternary", "--out", str(tmp_path)])
    sizes = {(row.policy, row.way): row.size_bytes for row in found}
    assert not any(row.problems for row in found)
    # One step: kernels round twice where float arithmetic rounds once.
    assert max(row.max_steps for row in found) <= 1
    for way in ("all targets", "micro"):
        assert sizes["w4a8", way] <= 0.62 * sizes["int8", way]
    # On LiteRT packed convolutions are several times as slow: they ship as int8 there.
    assert 0.62 * sizes["int8", "litert"] < sizes["w4a8", "litert"] <= sizes["int8", "litert"]
    assert sizes["ternary", "lookup"] < 0.62 * sizes["w4a8", "lookup"]
    for policy in ("int8", "w4a8", "ternary"):
        assert sizes[policy, "smallest"] <= sizes[policy, "lookup"] <= sizes[policy, "micro"]
    assert len(json.loads((tmp_path / "file_sizes.json").read_text())) == len(found)


@pytest.mark.slow
def test_an_architecture_of_the_zoo_goes_the_whole_road(tmp_path: Path) -> None:
    results = zoo.main(["--only", "CBAM, tf.*", "--out", str(tmp_path)])
    found = results["models"]["CBAM, tf.*"]
    assert found["outcome"] == "integer"
    assert found["float_operators"] == 0 and found["unmatched"] == 0
    assert found["differing"] == {"litert_reference": 0, "litert": 0, "tflite_micro": 0}
    assert found["operators"] <= found["converter_operators"]
    assert found["size_bytes"] < found["converter_bytes"]
    # Random weights: ours may not lose more.
    assert found["sqnr_db"] > found["converter_sqnr_db"] - 0.5
    ((title, _, rows, _),) = zoo.tables(results)
    assert title.startswith("1 of 1 ") and rows[0][:2] == ("CBAM, tf.*", "integer")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs were expected:UserWarning")
def test_what_amplifies_rounding_is_judged_by_several_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> keras.Model:
        x = keras.Input((8,), name="x")
        y = keras.layers.Dense(6, activation="relu")(x)
        return keras.Model(x, keras.layers.Dense(4)(y), name="tiny")

    monkeypatch.setitem(zoo.MODELS, "mine", {"tiny": build})
    # As if this amplified it.
    monkeypatch.setattr(zoo, "CHAOTIC_DB", 1000.0)
    row = zoo.main(["--one", "tiny", "--out", str(tmp_path)])
    assert row["outcome"] == "integer"
    draws = np.array(row["drawn_db"])
    assert len(draws) in (zoo.DRAWS, zoo.MORE_DRAWS, zoo.MOST_DRAWS)
    assert len(np.unique(draws)) == draws.size
    want = draws.mean(axis=0)
    np.testing.assert_allclose((row["sqnr_db"], row["converter_sqnr_db"]), want)


def test_more_draws_are_taken_where_few_do_not_tell() -> None:
    good, bad, unclear = [(20.0, 20.4)], [(20.0, 21.0), (20.0, 21.1)], [(20.0, 19.0), (20.0, 22.5)]
    enough = {
        (name, count): zoo._are_enough((draws * count)[:count])
        for name, draws in {"good": good, "bad": bad, "unclear": unclear}.items()
        for count in (zoo.DRAWS - 1, zoo.DRAWS, zoo.MORE_DRAWS, zoo.MORE_DRAWS + 1)
    }
    few, more = zoo.DRAWS, zoo.MORE_DRAWS
    assert {case for case, tells in enough.items() if tells} == {
        ("good", few), ("good", more), ("bad", more),
    }  # fmt: skip


def test_rows_of_the_zoo_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped goes on; `--no-run` makes the table of what there is."""
    monkeypatch.setattr(zoo, "KEPT", tmp_path / "zoo.json")
    (tmp_path / "rows").mkdir()
    good = zoo.Outcome(
        outcome="integer", operators=12, size_bytes=90, sqnr_db=29.0,
        converter_operators=10, converter_bytes=100, converter_sqnr_db=29.4,
        differing={"litert": 0, "tflite_micro": 3},
    )  # fmt: skip
    bad = zoo.Outcome(outcome="refused: x|y", converter_problem="ConverterError: no such operator")
    loses = dataclasses.replace(good, operators=10, sqnr_db=28.0, converter_sqnr_db=29.0)
    draws = ((28.0, 29.0), (28.2, 29.0), (27.9, 29.1), (27.9, 28.9)), ((28.0, 30.0), (28.0, 28.0))
    rows = {
        "ViT_1_D": {**dataclasses.asdict(good), "commit": "abc1234"},
        "BERT": dataclasses.asdict(bad),
        "ViT": dataclasses.asdict(dataclasses.replace(loses, drawn_db=draws[0])),
        "VGG": dataclasses.asdict(dataclasses.replace(loses, drawn_db=draws[1])),
    }
    for name, row in rows.items():
        (tmp_path / "rows" / f"{name}.json").write_text(json.dumps(row))
    results = zoo.main(["--no-run", "--out", str(tmp_path)])
    assert list(results["models"]) == ["VGG", "ViT", "BERT", "ViT, 1-D"]
    page = (tmp_path / "zoo.md").read_text()
    assert "# 3 of 4 architectures of 3 collections ship as integers" in page
    assert "| ViT, 1-D | k3im | integer | 12 / 10 | 90 / 100 | 29.0 / 29.4 |" in page
    assert "more than 1 step: 1. BERT" in page and "operators: 1. ViT, 1-D" in page
    assert "on any runtime: 3. VGG, ViT, ViT, 1-D" in page
    assert "file: 0." in page
    # Beyond the bound are both; of the second, draws do not tell by how much.
    assert "28.0 / 29.0 (27.9–28.2 / 28.9–29.1; -1.0 ± 0.1)" in page
    assert "28.0 / 29.0 (28.0–28.0 / 28.0–30.0; -1.0 ± 1.0)" in page
    assert "converter's: 2. VGG, ViT" in page
    assert "standard errors beyond the bound: 1. VGG" in page
    assert "- not recorded: VGG, ViT, BERT" in page and "- abc1234: ViT, 1-D" in page
    assert "- BERT: ConverterError: no such operator" in page


@pytest.mark.slow
def test_the_device_model_is_the_file(tmp_path: Path) -> None:
    out = tmp_path / "device_model.json"
    result = device_model.main(["--smoke", "--out", str(out)])
    assert set(result) == {"qat", "integer model", "file"}
    assert result["file"]["differing"] == 0 < result["file"]["integers"]
    assert result["integer model"]["accuracy"] == result["file"]["accuracy"]
    assert json.loads(out.read_text())["images"] == 16


@pytest.mark.slow
@pytest.mark.skipif(not data.available(), reason="needs the shared models")
def test_networks_are_compared_on_every_runtime(tmp_path: Path) -> None:
    out = tmp_path / "networks.json"
    arguments = ["--smoke", "--networks", "mlperf_tiny/ad", "--out", str(out)]
    found = device_model.main(arguments)["mlperf_tiny/ad"]
    assert set(found) == set(device_model.COMPARED)
    for row in found.values():
        assert row["outputs"] == 4 * 640 < row["integers"]
        assert row["outputs_differing"] == row["integers_differing"] == 0 and not row["unknown"]
    assert "| mlperf_tiny/ad | litert | 4 | 0 of 2,560 |" in out.with_suffix(".md").read_text()
    # What is measured is not measured again.
    assert device_model.main(arguments)["mlperf_tiny/ad"] == found


def test_the_table_of_ranges_says_what_it_aimed_at_and_what_is_missing() -> None:
    names = [*CALIBRATION_METHODS, calibration.OWN, calibration.OWN_FILE, calibration.CONVERTER]
    cell = {name: {"sqnr_db": 30.0, "accuracy": None} for name in names}
    low = {**cell, calibration.OWN_FILE: {"sqnr_db": 29.5, "accuracy": None}}
    results = {"mlperf_tiny/ic": {"16": cell, "128": low}, "mlperf_tiny/ad": {"16": cell}}
    text = calibration.as_markdown(results)
    assert "Found: 1 of 3 cells below: mlperf_tiny/ic, 128 (-0.50); -0.17 dB in the mean." in text
    assert "Measured in part: mlperf_tiny/ad (1 of 2 cells)." in text
    others = set(calibration.TASKS) - set(results)
    assert not others or f"Not measured: {', '.join(sorted(others))}." in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs were expected:UserWarning")
def test_the_mean_is_subtracted_twice_for_a_reason() -> None:
    rows = normalization.main(["--cells", "5", "--samples", "64"])
    *_, twice, before, behind, _ = rows[3]
    assert rows[3][:2] == (10.0, 4)
    assert twice > before > behind + 10.0


@pytest.mark.slow
def test_groups_of_counts_are_divided_for_a_reason() -> None:
    ((name, steps, before, after, few, many),) = masked_means.main(
        ["--only", "weights first", "--steps", "200", "--samples", "64"]
    )
    assert (name, steps) == ("weights first", 200)
    assert after > before + 15.0 and many > few
