"""Spoken digits: one step of either network on noise, and the features."""

import contextlib
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes import kws_fsdd
from tests.recipes.unmeasured import file_of

Smoke = tuple[dict[str, Any], Path, str]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Smoke]:
    """Network -> one step of it: the results, the folder, and what was printed."""

    @functools.cache
    def run(network: str) -> Smoke:
        out = tmp_path_factory.mktemp(network)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            results = kws_fsdd.main(["--smoke", "--network", network, "--out", str(out)])
        return results, out, printed.getvalue()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("network", ["ds_cnn", "conv1d"])
def test_one_step_writes_everything(network: str, smoke: Callable[[str], Smoke]) -> None:
    results, out, printed = smoke(network)
    files = {"kws.tflite", "kws.keras", "report.json", "results.json"}
    assert {path.name for path in out.iterdir()} == files
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results["rows"]) == ["FP32", "PTQ", "QAT"]
    # Integer kernels may round twice where the float graph rounds once: one step.
    assert max(results["rows"]["QAT"]["lockstep_steps"].values()) <= 1
    lines = printed.splitlines()
    assert [line for line in lines if len(line) > 80 and str(out) not in line] == []


@pytest.mark.slow
def test_equal_seeds_give_equal_files(smoke: Callable[[str], Smoke], tmp_path: Path) -> None:
    options = ["--smoke", "--network", "conv1d"]
    same, other = (
        file_of(kws_fsdd, [*options, "--seed", seed], tmp_path / seed / "kws.tflite")
        for seed in ("0", "1")
    )
    one = (smoke("conv1d")[1] / "kws.tflite").read_bytes()
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
