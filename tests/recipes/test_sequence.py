"""The recurrent recipe: one step of it on noise."""

import json
from pathlib import Path

import pytest

from recipes import sequence

FILES = {"model.tflite", "model.keras", "report.json", "results.json"}


@pytest.mark.slow
def test_one_step_writes_everything(tmp_path: Path) -> None:
    results = sequence.main(["--smoke", "--network", "gru", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert list(results["rows"]) == ["FP32", "PTQ", "QAT"]
    for name in ("PTQ", "QAT"):
        # Integer kernels may round twice where the float graph rounds once: one step.
        assert max(results["rows"][name]["lockstep_steps"].values()) <= 1
