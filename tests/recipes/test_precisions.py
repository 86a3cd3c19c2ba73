"""How few bits will do: the table, and both networks in their smallest size."""

import json
from pathlib import Path
from typing import Any

import keras
import pytest

from recipes import precisions
from recipes.mobilenetv2_cifar10 import network
from recipes.models import mobilenet_v2


def _row(**changes: Any) -> dict[str, Any]:
    row = {"name": "w2a8", "accuracy": 0.75, "file_bytes": 4000, "arena_bytes": 3000,
           "lockstep_steps": {"litert_reference": 0, "tflite_micro": 1},
           "top1_agreement": 0.9}  # fmt: skip
    return row | changes


def test_the_table_says_what_was_won_and_where_it_runs() -> None:
    encoded = {"file_bytes": 2000, "arena_bytes": 5000, "lockstep": 1}
    found = {
        "options": {"network": "resnet8"},
        "test_images": 1000,
        "float": _row(name="FP32", accuracy=0.8, lockstep_steps=None),
        "rows": {
            "w2a8": {"calibrated": 0.25, "trained": _row(), "encoded": encoded},
            "binary": {
                "calibrated": 0.1,
                "trained": _row(lockstep_steps={}, arena_bytes=None),
                "encoded": {**encoded, "file_bytes": 1000},
            },
        },
    }
    table, small = precisions.tables(found)
    assert table.rows == [
        ("FP32", "-", "80.00 %", "-", "4,000", "3,000", "-", "-"),
        ("w2a8", "25.00 %", "75.00 %", "-5.00", "4,000", "3,000", "1 step", "R M"),
        ("binary", "10.00 %", "75.00 %", "-5.00", "4,000", "-", "-", "-"),
    ]
    assert small.rows == [
        ("w2a8", "2,000", "0.500", "5,000", "1 step"),
        ("binary", "1,000", "0.250", "5,000", "1 step"),
    ]


def test_weights_are_for_the_labs_network(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        precisions.main(["--network", "resnet8", "--weights", "x.keras"])
    assert "Expected --weights for mobilenetv2 only" in capsys.readouterr().err


@pytest.mark.slow
def test_resnet8_in_two_precisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _check("resnet8", tmp_path, [], capsys)


@pytest.mark.slow
def test_mobilenetv2_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "float.keras"
    keras.utils.set_random_seed(0)
    mobilenet_v2(**network(0.1, smoke=True)).save(path)
    _check("mobilenetv2", tmp_path / "out", ["--weights", str(path)], capsys)


def _check(name: str, out: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--smoke", "--network", name, "--precisions", "w4a8", "ternary"]
    results = precisions.main([*chosen, "--out", str(out), *options])
    assert json.loads((out / "results.json").read_text()) == results
    assert {path.name for path in out.iterdir()} == {
        "w4a8.tflite", "w4a8_encoded.tflite", "w4a8_report.json",
        "ternary.tflite", "ternary_encoded.tflite", "ternary_report.json", "results.json",
    }  # fmt: skip
    for row in results["rows"].values():
        steps = row["trained"]["lockstep_steps"]
        assert list(steps) == list(precisions.RUNTIMES)
        # Integer kernels may round twice where the float graph rounds once: one step.
        assert max(steps.values()) <= 1
    printed = capsys.readouterr().out.splitlines()
    # What Keras prints of an epoch is as long as it likes.
    mine = [line for line in printed if "step - " not in line and str(out) not in line]
    assert [line for line in mine if len(line) > 80] == []
