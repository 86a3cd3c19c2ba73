"""The lab in its smallest size: all of it, and killed twice on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recipes import lab_report, mobilenetv2_cifar10

ROWS = [
    "FP32", "FP32, half pruned", "PTQ int8, TensorFlow", "PTQ int8", "QAT int8", "PTQ w4a8",
    "QAT w4a8", "FP32, trained further", "QAT int8, tfmot",
]  # fmt: skip
TIMES = {"minutes", "processor_minutes"}


def _results() -> dict[str, Any]:
    """What results.json of a run with two rows holds."""
    row = {
        "accuracy": 0.8, "file_bytes": 4000, "zipped_bytes": 3000, "zero_share": 0.5,
        "arena_bytes": None, "epochs": 1, "processor_minutes": 1.25, "lockstep_steps": None,
    }  # fmt: skip
    ptq = {**row, "accuracy": 0.79, "epochs": 0, "lockstep_steps": {"litert": 1}}
    spread = {"lower": 0.9, "median": 1.0, "upper": 1.1}
    return {
        "command": "python -m recipes.mobilenetv2_cifar10 --seed 0",
        "options": {"width": 0.35, "pruning": 0.5, "qat_epochs": 3},
        "kqat": "0", "machine": {"packages": {"keras": "3"}, "cores": 2},
        "parameters": {"narrow": 400, "full": 2000}, "test_images": 1000,
        "rows": {"FP32, half pruned": row, "PTQ int8": ptq},
        "latency": {"FP32, half pruned": spread, "PTQ int8": spread},
        "history": {"FP32, half pruned": [{"val_accuracy": 0.5}], "QAT int8, tfmot": [{"loss": 1}]},
    }  # fmt: skip


def test_the_tables_say_what_was_lost() -> None:
    accuracy, size = mobilenetv2_cifar10.tables(_results())
    assert accuracy.rows == [
        ("FP32, half pruned", "80.00 %", "+0.00", "50.00 %", "1", "1.2", "-"),
        ("PTQ int8", "79.00 %", "-1.00", "50.00 %", "-", "-", "1 step"),
    ]
    assert size.rows[1] == ("PTQ int8", "4,000", "3,000", "-", "1.00 (0.90–1.10)")


def test_the_report_stands_alone_and_is_always_the_same() -> None:
    results = _results()
    page = lab_report.html(results, mobilenetv2_cifar10.tables(results))
    assert page == lab_report.html(results, mobilenetv2_cifar10.tables(results))
    assert page.count("<svg") == page.count("</svg>") == 3
    assert "79.00 %" in page
    assert not any(f'{end}="http' in page for end in ("src", "href"))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text('{"seed": 1}')
    with pytest.raises(SystemExit, match="whose run would go on"):
        mobilenetv2_cifar10.main(["--smoke", "--out", str(tmp_path)])


@pytest.mark.slow
def test_one_step_makes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = mobilenetv2_cifar10.main(["--smoke", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert list(results["rows"]) == ROWS
    for name, row in results["rows"].items():
        # Half of the weights are pruned in each kernel; rounding to few levels adds some.
        assert 0.5 <= row["zero_share"] < 0.7 or name == "FP32"
        # Integer kernels may round twice where the float graph rounds once: one step.
        assert max((row["lockstep_steps"] or {"": 0}).values()) <= 1
    printed = capsys.readouterr().out.splitlines()
    # What Keras prints of an epoch is as long as it likes.
    mine = [line for line in printed if "step - " not in line and str(tmp_path) not in line]
    assert [line for line in mine if len(line) > 80] == []
    assert (tmp_path / "report.html").read_text().count("<svg") == 3


SIZE = (
    "--smoke", "--no-tfmot", "--policies", "int8", "--train-images", "512", "--epochs", "2",
    "--prune-epochs", "1", "--qat-epochs", "2",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_run_ends_with_the_same_table(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _start(whole).wait()
    for row in ("fp32", "qat_int8"):
        _kill_in_second_epoch(_start(killed), killed / row)
        assert not (killed / row / "model.keras").exists()
    assert _start(killed).wait() == 0
    rows, same = (
        json.loads((folder / "results.json").read_text())["rows"] for folder in (whole, killed)
    )
    assert list(rows) == list(same)
    for name, row in rows.items():
        # sha256 is among what is compared: the very files are equal.
        assert {k: v for k, v in row.items() if k not in TIMES} == {
            k: v for k, v in same[name].items() if k not in TIMES
        }


def _start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "recipes.mobilenetv2_cifar10", *SIZE, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _kill_in_second_epoch(process: subprocess.Popen[bytes], row: Path) -> None:
    while not (row / "epoch_0001.weights.h5").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
