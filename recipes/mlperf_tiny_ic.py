"""MLPerf Tiny's image classification: its pretrained ResNet-8 on CIFAR-10, by PTQ and by QAT.

    python -m recipes.mlperf_tiny_ic --out out/mlperf_tiny_ic

There are two experiments, because the two sets of images answer different questions.

Lossless: 4,000 of CIFAR-10's training images. What does rounding cost? The pretrained network, its
integer file after PTQ and the vendor's integer file get the same images. Nothing is trained, and
calibration uses other images. The pretrained network may have seen these images in training, so
the accuracy is not a test accuracy: compare the rows with each other only.

JPEG: CIFAR-10 after JPEG compression. Is QAT better than PTQ? The pretrained network never saw
such images and does badly on them. So the network is first fine-tuned on them in float
("adapted"). From there one copy is trained further in float and then gets PTQ; another copy gets
QAT with the same number of steps. Compare these rows with each other only, never with a lossless
or published accuracy.

Writes to --out: ic_ptq.tflite (lossless experiment), ic_qat.tflite, ic_qat.keras, plan.json, a
report beside each .tflite, and results.json.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from recipes import data, running
from recipes.data import Samples
from recipes.models import resnet8
from recipes.running import Row, Table
from recipes.training import fit, freezing

NAME = "mlperf_tiny/ic"
BATCH_SIZE = 64
CALIBRATION_SAMPLES = 512
LEARNING_RATE = 3e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The inputs of both experiments: a network, its images, and the vendor's file if it exists.

    `unlabelled` are the calibration images of the lossless experiment.
    """

    model: keras.Model
    vendor: bytes | None
    unlabelled: np.ndarray
    lossless: Samples
    train: Samples
    test: Samples


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    inputs = _fake() if options.smoke else _real(options.train_images)
    lossless = _post_training(inputs, options.out)
    jpeg = _fine_tuning(inputs, options)
    results = running.save_results(
        options,
        "mlperf_tiny_ic",
        {
            "lossless_images": len(inputs.lossless[0]),
            "lossless": running.as_json(lossless),
            "jpeg_images": len(inputs.test[0]),
            "jpeg": running.as_json(jpeg),
        },
    )
    running.show(tables(results))
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the recipe prints, from what results.json holds."""
    return [
        running.row_table(f"{results[f'{kind}_images']} {name} images", results[kind])
        for kind, name in (("lossless", "lossless"), ("jpeg", "JPEG"))
    ]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/mlperf_tiny_ic")
    parser.add_argument("--epochs", type=int, default=2, help="of each fine-tuning (default 2)")
    parser.add_argument(
        "--train-images", type=int, default=10_000, help="JPEG images to train on (default 10000)"
    )
    options = parser.parse_args(argv)
    if options.smoke:
        options.epochs = 1
    return options


def _real(train_images: int) -> _Inputs:
    # In a network built by Keras 3: the one from the old file takes a list of one input, and `fit`
    # warns about that.
    model = resnet8()
    model.set_weights(data.pretrained(NAME).get_weights())
    return _Inputs(
        model=model,
        vendor=data.vendor_tflite(NAME),
        # From the test set: the lossless images come from the training set.
        unlabelled=data.cifar10_jpeg("test", count=CALIBRATION_SAMPLES)[0],
        lossless=data.cifar10_lossless(),
        train=data.cifar10_jpeg("train", count=train_images),
        test=data.cifar10_jpeg("test"),
    )


def _fake() -> _Inputs:
    """An untrained network, one batch of noise, and some of it for testing."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (BATCH_SIZE, 32, 32, 3)).astype(np.float32)
    y = random.integers(0, 10, BATCH_SIZE)
    few = x[:8], y[:8]
    return _Inputs(model=resnet8(), vendor=None, unlabelled=x, lossless=few, train=(x, y), test=few)


def _post_training(inputs: _Inputs, out: Path) -> list[Row]:
    """The lossless experiment."""
    rows = [running.measure_float("FP32", inputs.model, inputs.lossless)]
    if inputs.vendor is not None:
        rows.append(running.measure_file("vendor's int8", inputs.vendor, inputs.lossless))
    ptq = kqat.quantize_model(inputs.model, calibration_data=inputs.unlabelled)
    kqat.plan(inputs.model).save(out / "plan.json")
    rows.append(_ship("PTQ", ptq, inputs.lossless, out / "ic_ptq"))
    return rows


def _fine_tuning(inputs: _Inputs, options: argparse.Namespace) -> list[Row]:
    """The JPEG experiment."""
    images, epochs = inputs.train[0][:CALIBRATION_SAMPLES], options.epochs
    rows = [running.measure_keras("FP32 as it came", inputs.model, inputs.test)]
    adapted = keras.models.clone_model(inputs.model)
    adapted.set_weights(inputs.model.get_weights())
    fit(adapted, inputs.train, epochs, LEARNING_RATE, batch_size=BATCH_SIZE)
    rows.append(running.measure_keras("FP32 adapted", adapted, inputs.test))

    qat = kqat.quantize_model(adapted, calibration_data=images)
    fit(
        qat,
        inputs.train,
        epochs,
        LEARNING_RATE,
        batch_size=BATCH_SIZE,
        callbacks=freezing(epochs),
    )
    qat.save(options.out / "ic_qat.keras")

    # QAT trained a copy of the weights, so this network still has those from which both start.
    fit(adapted, inputs.train, epochs, LEARNING_RATE, batch_size=BATCH_SIZE)
    rows.append(running.measure_keras("FP32 further", adapted, inputs.test))
    ptq = kqat.quantize_model(adapted, calibration_data=images)
    rows.append(_ship("PTQ of that", ptq, inputs.test))
    rows.append(_ship("QAT of adapted", qat, inputs.test, options.out / "ic_qat"))
    return rows


def _ship(name: str, qat: keras.Model, test: Samples, path: Path | None = None) -> Row:
    blob = tflite_export.convert(qat)
    row, report = running.measure_integer(name, qat, blob, test)
    if path is not None:
        tflite_export.save(blob, path.with_suffix(".tflite"))
        report.save(path.with_name(f"{path.name}_report.json"))
    return row


if __name__ == "__main__":
    main()
