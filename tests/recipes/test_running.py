"""What the recipes share: feeding a file with floats, measuring it, printing it."""

import argparse
import os
from pathlib import Path

import keras
import numpy as np
import pytest

import kqat
import tflite_export
from recipes import converter, running


@pytest.fixture(scope="module")
def qat() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, activation="softmax")])
    return kqat.quantize_model(model, calibration_data=_samples()[0])


def _samples() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(20, 6)).astype(np.float32), random.integers(0, 3, 20)


def test_predict_takes_and_gives_floats_whatever_the_file_does(qat: keras.Model) -> None:
    x, _ = _samples()
    wanted, *others = [
        running.predict(
            tflite_export.convert(qat, inference_input_type=kind, inference_output_type=kind), [x]
        )
        for kind in ("float32", "int8", "uint8")
    ]
    assert wanted[0].shape == (20, 3)
    for found in others:
        # The same integers inside, so the same floats to the bit.
        np.testing.assert_array_equal(found[0], wanted[0], strict=True)


def test_predict_clips_what_lies_outside_of_the_range(qat: keras.Model) -> None:
    blob = tflite_export.convert(qat)
    far, edge = (np.full((1, 6), value, np.float32) for value in (1e6, 100.0))
    np.testing.assert_array_equal(running.predict(blob, [far])[0], running.predict(blob, [edge])[0])


def test_a_float_model_and_its_plain_file_agree(qat: keras.Model) -> None:
    model, (x, y) = kqat.strip(qat), _samples()
    row = running.measure_float("FP32", model, (x, y))
    assert row.accuracy == running.accuracy(running.keras_outputs(model, x), y)
    assert (row.top1_agreement, row.lockstep_steps) == (1.0, None)


def test_an_integer_file_is_measured_on_three_runtimes(qat: keras.Model) -> None:
    blob = tflite_export.convert(qat)
    row, report = running.measure_integer("PTQ", qat, blob, _samples(), lockstep_samples=5)
    assert row.file_bytes == len(blob)
    assert row.arena_bytes == report.on("tflite_micro").arena_bytes
    assert set(row.lockstep_steps or ()) == {"litert_reference", "litert", "tflite_micro"}
    assert report.samples == 5


def test_old_models_with_a_list_of_one_input_do_not_warn() -> None:
    inputs = keras.Input((6,))
    model = keras.Model([inputs], keras.layers.Dense(2)(inputs))
    x, _ = _samples()
    (found,) = running.predict(converter.float_tflite(model), [x])
    # Two float matrix products of six terms each.
    np.testing.assert_allclose(found, running.keras_outputs(model, x), rtol=1e-5, atol=1e-6)


def test_accuracy_counts_the_largest_outputs() -> None:
    outputs = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert running.accuracy(outputs, np.array([1, 0, 1, 1])) == 0.75


def test_a_table_aligns_its_columns() -> None:
    assert running.table(("", "bytes"), [("FP32", "50,108"), ("A name", "7")]) == (
        "         bytes\n------  ------\nFP32    50,108\nA name       7"
    )


@pytest.mark.parametrize(
    ("share", "text"), [(None, "-"), (0.9298, "92.98 %"), (1.0, "100.00 %"), (0.0, "0.00 %")]
)
def test_percent(share: float | None, text: str) -> None:
    assert running.percent(share) == text


def test_start_seeds_and_names_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KQAT_DATA", "/before")
    options = argparse.Namespace(seed=3, out=tmp_path / "a" / "b", data=tmp_path)
    draws = []
    for _ in range(2):
        running.start(options)
        draws.append(float(keras.random.normal(())))
    assert draws[0] == draws[1]
    assert os.environ["KQAT_DATA"] == str(tmp_path)
    assert (tmp_path / "a" / "b").is_dir()
