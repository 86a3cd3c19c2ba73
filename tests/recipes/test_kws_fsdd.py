"""Spoken digits: one step of either network on noise, and the features."""

import json
from pathlib import Path

import numpy as np
import pytest

from recipes import kws_fsdd


@pytest.mark.slow
@pytest.mark.parametrize("network", ["ds_cnn", "conv1d"])
def test_one_step_writes_everything(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = kws_fsdd.main(["--smoke", "--network", network, "--out", str(tmp_path)])
    files = {"kws.tflite", "kws.keras", "report.json", "results.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert list(results["rows"]) == ["FP32", "PTQ", "QAT"]
    # Integer kernels may round twice where the float graph rounds once: one step.
    assert max(results["rows"]["QAT"]["lockstep_steps"].values()) <= 1
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if len(line) > 80 and str(tmp_path) not in line] == []


@pytest.mark.slow
def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--smoke", "--network", "conv1d", "--seed", seed]
        kws_fsdd.main([*options, "--out", str(tmp_path / folder)])
    one, same, other = ((tmp_path / f / "kws.tflite").read_bytes() for f in "abc")
    assert one == same
    assert one != other


def test_features_tell_tones_apart() -> None:
    seconds = np.arange(8000) / 8000
    low, high = (np.sin(2 * np.pi * hertz * seconds) for hertz in (300, 3000))
    features = kws_fsdd.mfcc(np.stack([low, high, 0 * low]).astype(np.float32))
    assert (features.shape, features.dtype) == ((3, 49, 10, 1), np.float32)
    assert np.isfinite(features).all()
    # The second coefficient is half a cosine over the bands: its sign says which half is loud.
    assert features[0, :, 1].min() > 0 > features[1, :, 1].max()
    # A tone that lasts sounds alike in all frames, but for its phase.
    assert np.ptp(features[:2], axis=1).max() < 1.0
    # Silence has no shape.
    np.testing.assert_allclose(features[2, :, 1:], 0.0, atol=1e-4)
