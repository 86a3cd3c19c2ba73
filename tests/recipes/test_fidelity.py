"""The fidelity of pretrained models: the whole on noise, and the vendors' networks themselves."""

import json
from pathlib import Path

import pytest

from recipes import fidelity


@pytest.mark.slow
def test_noise_runs_through_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = fidelity.main(["--smoke", "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {"smoke.tflite", "smoke.json", "results.json"}
    assert json.loads((tmp_path / "results.json").read_text()) == results
    smoke = results["models"]["smoke"]
    assert (smoke["float_operators"], smoke["operators"]["CONV_2D"]) == (0, 4)
    # A float file stands in for the vendor's: float32 has 24 bits, so about 144 dB.
    assert smoke["vendor"]["sqnr_db"] > 100 > smoke["kqat"]["sqnr_db"]
    assert smoke["one_scale"]["file_bytes"] < smoke["kqat"]["file_bytes"]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if len(line) > 80 and str(tmp_path) not in line] == []


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fidelity.main(["--only", "mlperf_tiny/nothing"])
    assert "invalid choice: 'mlperf_tiny/nothing'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlperf_tiny/vww", "mlperf_tiny/ad", "mlperf_tiny/sww"])
def test_a_vendors_network_is_kept(shared: Path, tmp_path: Path, name: str) -> None:
    options = ["--only", name, "--data", str(shared), "--out", str(tmp_path)]
    result = fidelity.main(options)["models"][name]
    assert result["float_operators"] == 0
    assert result["kqat"]["sqnr_db"] > result["vendor"]["sqnr_db"]
    # The bound of the MLPerf Tiny files: 2 %. Scales per channel alone are 7 % of `ad`.
    smaller = result["one_scale"] or result["kqat"]
    assert smaller["file_bytes"] <= 1.02 * result["vendor"]["file_bytes"]
    assert smaller["sqnr_db"] > result["vendor"]["sqnr_db"]
    for found in result["lockstep"].values():
        assert (found["problem"], found["not_compared"]) == (None, [])
        # Integer kernels may round twice where the float graph rounds once: one step, rarely.
        assert found["max_steps"] <= 1
        assert min(row["equal_share"] for row in found["operators"].values()) >= 0.99
