"""Every family of `keras.applications`: wrapped, trained for a step, converted and verified.

    python -m benchmarks.applications --out out/applications.json

Weights are random, images are noise of the smallest size that a family takes. Seconds are this
machine's, beside the converter's own for the float model.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import applications

import kqat
import tflite_export
from benchmarks.networks import CLASSES
from recipes.timing import print_table, write_json
from recipes.training import settle
from tflite_export import Report

SAMPLES, VERIFIED = 8, 2
RUNTIMES = ("litert_reference", "tflite_micro")
# Name -> what makes it, and the smallest legal width and height of its images.
FAMILIES: dict[str, tuple[Callable[..., keras.Model], int]] = {
    "MobileNet": (applications.MobileNet, 32),
    "MobileNetV2": (applications.MobileNetV2, 32),
    "MobileNetV3Small": (applications.MobileNetV3Small, 32),
    "MobileNetV3Large": (applications.MobileNetV3Large, 32),
    "EfficientNetB0": (applications.EfficientNetB0, 32),
    "EfficientNetV2B0": (applications.EfficientNetV2B0, 32),
    "ResNet50": (applications.ResNet50, 32),
    "ResNet50V2": (applications.ResNet50V2, 32),
    "DenseNet121": (applications.DenseNet121, 32),
    "NASNetMobile": (applications.NASNetMobile, 32),
    "InceptionV3": (applications.InceptionV3, 75),
    "Xception": (applications.Xception, 71),
    "VGG16": (applications.VGG16, 32),
    "ConvNeXtTiny": (applications.ConvNeXtTiny, 32),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one family; times in seconds."""

    quantize: float
    step: float
    convert: float
    size_bytes: int
    moved: float
    report: Report


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the families, prints a table and writes JSON."""
    options = _parser().parse_args(arguments)
    rows, results = [], {}
    for name in options.family:
        outcome = run(name)
        rows.append(_row(name, outcome))
        results[name] = dataclasses.asdict(outcome)
        print(*rows[-1], flush=True)
    print_table(
        ("family", "quantize s", "step s", "convert s", "bytes", "operators", "float", *RUNTIMES),
        rows,
    )
    if options.out:
        write_json(options.out, {"families": results})


def run(name: str) -> Outcome:
    """Takes one family the whole road."""
    keras.utils.set_random_seed(0)
    build, size = FAMILIES[name]
    model = build(input_shape=(size, size, 3), weights=None, classes=CLASSES)
    generator = np.random.default_rng(0)
    x = generator.uniform(0.0, 255.0, (SAMPLES, size, size, 3)).astype(np.float32)
    y = np.arange(SAMPLES) % CLASSES
    settle(model, x)
    quantize, qat = _timed(lambda: kqat.quantize_model(model, calibration_data=x))
    before = [w.numpy() for w in qat.trainable_weights]
    qat.compile(keras.optimizers.SGD(1e-5), "sparse_categorical_crossentropy")
    step, _ = _timed(lambda: qat.train_on_batch(x, y))
    moved = [np.any(w.numpy() != b) for w, b in zip(qat.trainable_weights, before, strict=True)]
    convert, blob = _timed(lambda: tflite_export.convert(qat))
    report = tflite_export.verify(qat, blob, x, runtimes=RUNTIMES, samples=VERIFIED)
    return Outcome(quantize, step, convert, len(blob), float(np.mean(moved)), report)


def _row(name: str, outcome: Outcome) -> tuple[str, ...]:
    report = outcome.report
    seconds = (f"{s:.1f}" for s in (outcome.quantize, outcome.step, outcome.convert))
    operators = sum(report.operators.values())
    lockstep = (
        part.problem or f"{part.max_steps} step, {len(part.unmatched)} not compared"
        for part in report.runtimes
    )
    size = f"{outcome.size_bytes:,}"
    return (name, *seconds, size, f"{operators}", f"{report.float_operators}", *lockstep)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--out", type=Path, help="where to write JSON")
    return parser


if __name__ == "__main__":
    main()
