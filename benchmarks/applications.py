"""Every family of `keras.applications`: wrapped, trained for a step, converted and verified.

    python -m benchmarks.applications --out out/applications

Weights are random, images are noise of the smallest size that a family takes. results.json is
written after each family.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import applications

import kqat
import tflite_export
from benchmarks.networks import CLASSES
from recipes import running
from recipes.running import Table
from recipes.training import settle

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


LEGEND = """\
seconds    of the processor, threads added up: for kqat.quantize_model with
           calibration on 8 images, one step of training, tflite_export.convert
moved      share of the trainable weights that the step moved
float      operators that read or write a float
lockstep   largest difference of any operator from the Keras model, in output
           steps, on that runtime; and the values that were not compared"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one family; times in seconds of the processor.

    Attributes:
        moved: share of the trainable weights that one step moved.
        lockstep: runtime -> why it did not run, or the largest difference in output steps.
        unmatched: runtime -> values that were not compared.
        differing: runtime -> integers that are not those of `kqat.kernels`, where it knows them.
    """

    quantize: float
    step: float
    convert: float
    size_bytes: int
    moved: float
    operators: int
    float_operators: int
    lockstep: dict[str, str | int]
    unmatched: dict[str, int]
    differing: dict[str, int]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the families, prints a table and writes results.json; returns what it holds."""
    options = _parser().parse_args(arguments)
    running.start(options)
    found: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name in ["MobileNetV2"] if options.smoke else options.family:
        found[name] = dataclasses.asdict(run(name, options.seed, eagerly=options.smoke))
        results = running.save_results(
            options, "applications", {"families": found}, package="benchmarks"
        )
        print(*_cells(name, found[name]), flush=True)
    running.show(tables(results))
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the benchmark prints, from what results.json holds."""
    header = ("", "quantize s", "step s", "convert s", "moved", "bytes", "operators", "float")
    rows = [_cells(name, found) for name, found in results["families"].items()]
    return [Table("Families of keras.applications", (*header, *RUNTIMES), rows, LEGEND)]


def run(name: str, seed: int, *, eagerly: bool) -> Outcome:
    """Takes one family the whole road; `eagerly` without tracing the step, which takes longest."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    build, size = FAMILIES[name]
    model = build(input_shape=(size, size, 3), weights=None, classes=CLASSES)
    generator = np.random.default_rng(seed)
    x = generator.uniform(0.0, 255.0, (SAMPLES, size, size, 3)).astype(np.float32)
    y = np.arange(SAMPLES) % CLASSES
    settle(model, x)
    quantize, qat = _timed(lambda: kqat.quantize_model(model, calibration_data=x))
    before = [w.numpy() for w in qat.trainable_weights]
    qat.compile(keras.optimizers.SGD(1e-5), "sparse_categorical_crossentropy", run_eagerly=eagerly)
    step, _ = _timed(lambda: qat.train_on_batch(x, y))
    moved = [np.any(w.numpy() != b) for w, b in zip(qat.trainable_weights, before, strict=True)]
    convert, blob = _timed(lambda: tflite_export.convert(qat))
    report = tflite_export.verify(qat, blob, x, runtimes=RUNTIMES, samples=VERIFIED)
    return Outcome(
        quantize=quantize,
        step=step,
        convert=convert,
        size_bytes=len(blob),
        moved=float(np.mean(moved)),
        operators=sum(report.operators.values()),
        float_operators=report.float_operators,
        lockstep={part.runtime: part.problem or part.max_steps for part in report.runtimes},
        unmatched={part.runtime: len(part.unmatched) for part in report.runtimes},
        differing={
            part.runtime: part.exact.differing
            for part in report.runtimes
            if part.exact is not None and not part.exact.unknown
        },
    )


def _cells(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    seconds = [f"{found[key]:.1f}" for key in ("quantize", "step", "convert")]
    size, moved = running.counted(found["size_bytes"]), running.percent(found["moved"])
    counts = [f"{found[key]}" for key in ("operators", "float_operators")]
    lockstep = [_lockstep(found, runtime) for runtime in RUNTIMES]
    return (name, *seconds, moved, size, *counts, *lockstep)


def _lockstep(found: dict[str, Any], runtime: str) -> str:
    steps, missed = found["lockstep"][runtime], found["unmatched"][runtime]
    said = running.steps(steps) if isinstance(steps, int) else steps
    return said + (f", {missed} not compared" if missed else "")


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def _parser() -> argparse.ArgumentParser:
    parser = running.parser(__doc__, out="out/applications", reads_data=False)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    return parser


if __name__ == "__main__":
    main()
