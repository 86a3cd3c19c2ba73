"""The networks on Ethos-U: a small one always, those of the recipe when it may take long."""

import json
from pathlib import Path

import pytest

from recipes import npu

pytest.importorskip("ethosu", reason="needs the extra ethos-u")


@pytest.mark.slow
def test_one_network_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = npu.main(["--smoke", "--out", str(tmp_path)])
    files = {"results.json", "smoke.tflite", "smoke.html"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_every_operator_runs_on_the_npu(tmp_path: Path) -> None:
    networks = npu.main(["--out", str(tmp_path)])["networks"]
    assert set(networks) == {"resnet8", "ds_cnn", "mobilenet_v2"}
    for name, found in networks.items():
        for target, row in found.items():
            assert (row["npu_share"], row["fallbacks"]) == (1.0, []), (name, target)
