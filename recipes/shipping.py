"""The pipeline that recipes share: PTQ, then QAT of the same model, then writing the files."""

import argparse
from typing import Any, NamedTuple

import keras

import kqat
import tflite_export
from recipes import running
from recipes.data import Samples
from recipes.running import Row
from recipes.training import fit, freezing

CALIBRATION_SAMPLES = 512


class Shipped(NamedTuple):
    """A QAT model, its file, the file's verification report and its row in the table."""

    qat: keras.Model
    blob: bytes
    report: tflite_export.Report
    row: Row


def measured(name: str, qat: keras.Model, test: Samples, **options: Any) -> Shipped:
    """Converts and measures a QAT model; `options` are those of `running.measure_integer`."""
    blob = tflite_export.convert(qat)
    row, report = running.measure_integer(name, qat, blob, test, **options)
    return Shipped(qat, blob, report, row)


def ptq(
    model: keras.Model, train: Samples, test: Samples, *, policy: Any = "int8", **options: Any
) -> Shipped:
    """Post-training quantization: calibration on the first training samples, no training."""
    print("PTQ: finding ranges")
    qat = kqat.quantize_model(
        model, policy, calibration_data=running.first(train[0], CALIBRATION_SAMPLES)
    )
    return measured("PTQ", qat, test, **options)


def train_on(
    calibrated: Shipped,
    train: Samples,
    test: Samples,
    epochs: int,
    learning_rate: float,
    *,
    batch_size: int,
    **options: Any,
) -> Shipped:
    """Quantization-aware training, in place, of the model from `ptq`."""
    print("QAT: training with the rounding in place")
    qat = calibrated.qat
    callbacks = freezing(epochs)
    fit(qat, train, epochs, learning_rate, batch_size=batch_size, callbacks=callbacks)
    return measured("QAT", qat, test, **options)


def write(options: argparse.Namespace, shipped: Shipped, stem: str) -> None:
    """Writes `stem`.tflite, `stem`.keras and report.json to the output folder."""
    tflite_export.save(shipped.blob, options.out / f"{stem}.tflite")
    shipped.qat.save(options.out / f"{stem}.keras")
    shipped.report.save(options.out / "report.json")
