"""The demo: one step of it on noise, and the whole of it on the real digits."""

import json
from pathlib import Path

import keras
import pytest

from recipes import data, digits, running

FILES = {
    "digits.tflite", "digits.keras", "plan.json", "report.json", "report.html", "results.json",
}  # fmt: skip


@pytest.mark.slow
def test_one_step_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = digits.main(["--smoke", "--out", str(tmp_path / "new" / "folder")])
    out = tmp_path / "new" / "folder"
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results["rows"]) == ["FP32", "PTQ", "QAT"]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if len(line) > 80 and str(tmp_path) not in line] == []


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    rows = digits.main(["--out", str(tmp_path)])["rows"]
    blob = (tmp_path / "digits.tflite").read_bytes()
    report = json.loads((tmp_path / "report.json").read_text())
    # 450 images, so a point is four of them.
    assert rows["FP32"]["accuracy"] > 0.98
    for name in ("PTQ", "QAT"):
        assert abs(rows[name]["accuracy"] - rows["FP32"]["accuracy"]) <= 0.01
        # Integer kernels may round twice where the float graph rounds once: one step.
        assert max(rows[name]["lockstep_steps"].values()) <= 1
        assert rows[name]["file_bytes"] < 0.6 * rows["FP32"]["file_bytes"]
    assert report["float_operators"] == 0
    assert [part["problem"] for part in report["runtimes"]] == [None] * 3
    assert [part["unmatched"] for part in report["runtimes"]] == [[]] * 3
    # The file and the model that were written are those that were measured.
    x, y = data.digits()[1]
    assert running.accuracy(running.predict(blob, [x])[0], y) == rows["QAT"]["accuracy"]
    trained = running.keras_outputs(keras.models.load_model(tmp_path / "digits.keras"), x)
    same = running.accuracy(running.predict(blob, [x])[0], trained.argmax(-1))
    assert same == rows["QAT"]["top1_agreement"]


@pytest.mark.slow
def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--epochs", "1", "--qat-epochs", "1", "--seed", seed]
        digits.main([*options, "--out", str(tmp_path / folder)])
    one, same, other = ((tmp_path / f / "digits.tflite").read_bytes() for f in "abc")
    assert one == same
    assert one != other
