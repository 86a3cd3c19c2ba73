"""KerasHub's models: one step on made-up data, where KerasHub is installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from recipes import kerashub


@pytest.mark.slow
@pytest.mark.parametrize("network", kerashub.EPOCHS)
def test_one_step_writes_everything(network: str, tmp_path: Path) -> None:
    pytest.importorskip("keras_hub", reason="the extra 'zoo' is not installed")
    results = kerashub.main(["--smoke", "--network", network, "--out", str(tmp_path)])
    written = {f"{policy}.{kind}" for policy in kerashub.POLICIES for kind in ("tflite", "keras")}
    assert {path.name for path in tmp_path.iterdir()} == {*written, "report.json", "results.json"}
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["float_operators"] == 0
    for policy in kerashub.POLICIES:
        row = results["rows"][f"QAT {policy}"]
        assert max(row["lockstep_steps"].values()) <= 1
        assert row["file_bytes"] < results["rows"]["PTQ int8, TensorFlow"]["file_bytes"]


def test_padding_becomes_a_mask() -> None:
    words = np.array([[5, 3, 0, 0], [1, 2, 3, 4]], np.int32)
    inputs, labels = kerashub.as_bert((words, np.array([0, 1])))
    assert inputs["padding_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert not inputs["segment_ids"].any()
    assert list(labels) == [0, 1]


def test_without_kerashub_the_recipe_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(SystemExit, match=r"pip install '.\[zoo\]'"):
        kerashub.main(["--smoke", "--out", str(tmp_path)])
