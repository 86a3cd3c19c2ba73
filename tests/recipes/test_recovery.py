"""Methods by widths: the table, and one network in its smallest size."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest

import kqat
from recipes import recovery, training


def _results(**cells: Any) -> dict[str, Any]:
    return {
        "options": {
            "network": "resnet20",
            "epochs": 1,
            "train_images": 64,
            "widths": ["w4a8", "w3a8", "binary"],
            "methods": ["average", "lsq", "lsq_plus"],
        },
        "test_images": 100,
        "steps": 2,
        "cells": {"float": {"accuracy": 0.9}, "further_0": {"accuracy": 0.91}, **cells},
    }


def test_the_tables_say_mean_and_spread_and_what_is_refused() -> None:
    results = _results(
        w4a8_lsq_0={"accuracy": 0.9, "lockstep_steps": {"litert": 1}},
        w4a8_lsq_1={"accuracy": 0.92},
        w4a8_average_0={"accuracy": 0.5},
        w4a8_lsq_plus_0={"accuracy": 0.8},
        binary_lsq_0={"refused": "SpecError: Expected a grid of 2 to 8 bits"},
        w3a8_lsq_0={"accuracy": 0.8},
    )
    accuracies, gaps, refused, published = recovery.tables(results)
    assert published.rows == recovery.PUBLISHED["resnet20"]
    assert "1 x 64 images, 2 steps of 32" in accuracies.title
    assert accuracies.header == ("", "w4a8", "w3a8", "binary")
    rows = {row[0]: row[1:] for row in accuracies.rows}
    assert rows["QAT, LSQ"] == ("91.00 % (90.00–92.00, n = 2)", "80.00 %", "refused")
    assert rows["QAT, LSQ+"] == ("80.00 %", "-", "-")
    assert rows["float"][0] == "90.00 %" and rows[recovery.FLOAT][0] == "91.00 %"
    assert gaps.rows == [
        ("w4a8", "QAT, LSQ", "2", "+0.00", "0.3", "yes", "1 step"),
        ("w3a8", "QAT, LSQ", "1", "+11.00", "1.5", "no", "-"),
        ("binary", "-", "-", "-", "-", "-", "-"),
    ]
    assert refused.rows == [("QAT, LSQ", "binary", "SpecError: Expected a grid of 2 to 8 bits")]


def test_a_pass_in_parts_reads_every_image_once() -> None:
    images = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1) * np.ones((1, 9, 9, 3), np.uint8)
    whole = training.Batches(
        (images, np.arange(16)), batch_size=2, scale=lambda x: x.astype(np.float32), parts=4
    )
    assert len(whole) == 2
    labels = [whole.batch(epoch, index)[1] for epoch in range(4) for index in range(2)]
    assert sorted(np.concatenate(labels)) == list(range(16))
    assert {float(whole.batch(0, 0)[0].max())} <= {*map(float, range(16)), 128.0}
    again = np.concatenate(
        [whole.batch(epoch, index)[1] for epoch in range(4, 8) for index in (0, 1)]
    )
    assert sorted(again) == list(range(16)) and list(again) != list(np.concatenate(labels))


def test_ends_of_eight_bits_stand_around_few(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [keras.layers.Dense(4, name=name) for name in ("first", "middle", "last")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    monkeypatch.setattr(recovery, "_taught", lambda run, config: kqat.plan(model, config))
    task = SimpleNamespace(model=model)
    planned: Any = recovery.METHODS["ends"][1](SimpleNamespace(task=task, width="w3a8"))  # type: ignore[arg-type]
    bits = {row.name: row.weights["kernel"].bits for row in planned.layers if row.weights}
    assert bits == {"first": 8, "middle": 3, "last": 8}


@pytest.mark.slow
@pytest.mark.long
def test_cells_are_made_once_and_the_run_goes_on(tmp_path: Path) -> None:
    options = ["--smoke", "--out", str(tmp_path), "--seeds", "0"]
    # Each cell that trains takes most of a minute.
    recovery.main([*options, "--methods", "falling", "--widths", "w8a8"])
    recovery.main([*options, "--methods", "lsq", "--widths", "binary"])
    first = recovery.main([*options, "--methods", "ptq_best", "lsq", "--widths", "w4a8"])
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    again = recovery.main([*options, "--methods", "lsq", "lsq_plus", "--widths", "w4a8"])
    assert json.loads((tmp_path / "results.json").read_text()) == again
    for name, when in made.items():
        assert (tmp_path / "cells" / name).stat().st_mtime_ns == when
    assert first["cells"].items() <= again["cells"].items()
    assert "narrower than 8 bits" in first["cells"]["w8a8_falling_0"]["refused"]
    recovery.main([*options, "--methods", "tfmot", "--widths", "w8a8", "w4a8"])
    ours = [json.loads(p.read_text()) for p in sorted((tmp_path / "cells").glob("*tfmot_0.json"))]
    assert ours[0]["refused"] == "tfmot quantizes to 8 bits only."
    assert ours[1]["file_bytes"] > 1000
    assert "bits=1" in again["cells"]["binary_lsq_0"]["refused"]
    assert max(again["cells"]["w4a8_lsq_plus_0"]["lockstep_steps"].values()) <= 1
    with pytest.raises(SystemExit, match="Use another --out"):
        recovery.main([*options, "--learning-rate", "0.1"])
