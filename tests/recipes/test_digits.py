"""The demo: a few steps of it on noise, and the whole of it on the real digits."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import keras
import pytest

from recipes import data, digits, running
from tests.recipes.unmeasured import file_of

FILES = {
    "digits.tflite", "digits.keras", "plan.json", "report.json", "report.html", "results.json",
}  # fmt: skip


Smoke = tuple[dict[str, Any], Path, str]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """A run of two steps: its results, its folder, and what it printed."""
    out = tmp_path_factory.mktemp("digits") / "new" / "folder"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = digits.main(["--smoke", "--out", str(out)])
    return results, out, printed.getvalue()


@pytest.mark.slow
def test_one_step_writes_everything(smoke: Smoke) -> None:
    results, out, printed = smoke
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results["rows"]) == ["FP32", "PTQ", "QAT"]
    lines = printed.splitlines()
    assert [line for line in lines if len(line) > 80 and str(out) not in line] == []


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    rows = digits.main(["--out", str(tmp_path)])["rows"]
    blob = (tmp_path / "digits.tflite").read_bytes()
    report = json.loads((tmp_path / "report.json").read_text())
    # 450 images, so a point is four of them. Three seeds gave the float network 0.989 to 0.993.
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
def test_equal_seeds_give_equal_files(smoke: Smoke, tmp_path: Path) -> None:
    # Two batches in each epoch, so that their order counts.
    same, other = (
        file_of(digits, ["--smoke", "--seed", seed], tmp_path / seed / "digits.tflite")
        for seed in ("0", "1")
    )
    one = (smoke[1] / "digits.tflite").read_bytes()
    assert one == same
    assert one != other
