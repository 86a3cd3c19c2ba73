"""Training on more than one device: every replica has the same ranges."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_ranges_agree_on_all_replicas() -> None:
    command = [sys.executable, "-m", "tests.kqat.training.two_replicas"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("ranges:"))
    copies = json.loads(line.removeprefix("ranges:"))
    assert {path.split("/")[-1] for path in copies} == {"low", "high", "count"}
    for path, (first, second) in copies.items():
        assert first == second, path
    # Both replicas shaped the range: the first alone sees nothing beyond 3.
    (high,) = next(values[0] for path, values in copies.items() if path == "x_quantizer/high")
    assert high > 4.0
