"""The transformers: one step on made-up data, and what the text becomes."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from recipes import transformer

FILES = {"model.tflite", "model.keras", "report.json", "results.json"}


@pytest.mark.slow
@pytest.mark.parametrize("network", transformer.TASKS)
def test_one_step_writes_everything(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--smoke", "--network", network, "--out", str(tmp_path)]
    results = transformer.main(options)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert list(results["rows"]) == ["FP32", "PTQ", "PTQ, SmoothQuant", "QAT"]
    assert results["float_operators"] == 0
    assert max(results["rows"]["QAT"]["lockstep_steps"].values()) <= 1
    assert set(results["rows"]["QAT"]["lockstep_steps"]) >= {"litert_reference", "litert"}
    # No recipe is imported in another process: a layer of the recipes' own must be registered.
    assert isinstance(keras.models.load_model(tmp_path / "model.keras"), keras.Model)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if len(line) > 80 and str(tmp_path) not in line] == []


def test_words_become_numbers() -> None:
    numbers = transformer.vocabulary(["What is a qubit ?", "What is it ?"])
    assert [numbers[word] for word in ("what", "is")] == [2, 3]
    found = transformer.encoded(["What IS a zebra?", "is " * 20], numbers)
    assert found.dtype == np.int32
    assert found.shape == (2, transformer.STEPS)
    assert list(found[0, :5]) == [2, 3, numbers["a"], 1, 0]
    assert set(found[1]) == {3}
