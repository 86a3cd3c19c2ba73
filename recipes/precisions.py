"""How few bits are enough? One network in seven precisions, before and after QAT.

    python -m recipes.precisions --network resnet8 --out out/precisions_resnet8
    python -m recipes.precisions --network mobilenetv2 --out out/precisions_mobilenetv2 \\
        --weights out/mobilenetv2_cifar10/fp32/model.keras

Each row starts from the same float weights and gets the same images, epochs and learning rate. A
precision is a preset of kqat for all layers, including the first and the last. "Calibrated" is the
accuracy after calibration only, "trained" the accuracy after QAT. Images are CIFAR-10 after JPEG:
compare these accuracies with each other only.

resnet8      MLPerf Tiny's pretrained network, adapted to such images in float.
mobilenetv2  The lab's network, read from --weights or trained in float first.

Writes to --out: a .tflite and a report for each precision, and results.json.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

import kqat
import tflite_export
from kqat.config import PRESETS
from recipes import data, running, shipping, training
from recipes import mobilenetv2_cifar10 as lab
from recipes.data import Samples
from recipes.models import mobilenet_v2, resnet8
from recipes.running import Row, Table
from recipes.shipping import CALIBRATION_SAMPLES

BATCH_SIZE = 64
WIDTH = 0.35
SMOKE_WIDTH, SMOKE_IMAGES = 0.1, 32
LEARNING_RATE = 3e-4
# The letter for each runtime in the table.
RUNTIMES = {"litert_reference": "R", "litert": "X", "tflite_micro": "M"}
LEGEND = """\
calibrated  accuracy of the .tflite after calibration only, on LiteRT (XNNPACK)
trained     the same after QAT; gap is that less the float file's, in points
arena       as TFLite Micro uses it on this 64-bit host
lockstep    largest difference of any operator from the Keras model, in output
            steps, on all runtimes that run the file; int16's SOFTMAX, whose
            kernel interpolates, has steps of 1/32768
runs on     R LiteRT's reference kernels, X LiteRT (XNNPACK), M TFLite Micro"""


ENCODED_LEGEND = """\
encoded     weights encoded for TFLite Micro's DECODE (compress="smallest"); the
            arena holds the decoded weights of one layer; lockstep is there"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """A float network, its data, and how it is trained."""

    model: keras.Model
    train: Samples
    test: Samples
    fit: Callable[[keras.Model, int, Sequence[keras.callbacks.Callback]], None]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    task = NETWORKS[options.network](options)
    float_row = running.measure_float("FP32", task.model, task.test)
    rows = {}
    for precision in options.precisions:
        print(f"{precision}: calibrating, then training", flush=True)
        # Seeded again, so that a row does not depend on the rows before it.
        keras.utils.set_random_seed(options.seed)
        rows[precision] = _measured(task, precision, options)
    results = running.save_results(
        options,
        "precisions",
        {
            "test_images": len(task.test[1]),
            "float": dataclasses.asdict(float_row),
            "rows": rows,
        },
    )
    running.show(tables(results))
    print(f"\nWritten to {options.out}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the recipe prints, from what results.json holds."""
    float_row = Row(**results["float"])
    header = (
        "", "calibrated", "trained", "gap", "file bytes", "arena bytes", "lockstep", "runs on"
    )  # fmt: skip
    title = f"{results['options']['network']}, {results['test_images']:,} test images"
    size = running.counted(float_row.file_bytes), running.counted(float_row.arena_bytes)
    first = (float_row.name, "-", running.percent(float_row.accuracy), "-", *size, "-", "-")
    rows = results["rows"]
    cells = [_cells(name, row, float_row) for name, row in rows.items()]
    # Results that were kept before this table existed have no such rows.
    encoded = [
        _encoded_cells(name, row["encoded"], float_row)
        for name, row in rows.items()
        if "encoded" in row
    ]
    header_encoded = ("encoded", "file bytes", "of FP32", "arena bytes", "lockstep")
    found = [Table(title, header, [first, *cells], LEGEND)]
    if encoded:
        found.append(Table(f"{title}: TFLite Micro", header_encoded, encoded, ENCODED_LEGEND))
    return found


def _cells(name: str, row: dict[str, Any], float_row: Row) -> tuple[str, ...]:
    trained = Row(**row["trained"])
    steps = trained.lockstep_steps or {}
    return (
        name,
        running.percent(row["calibrated"]),
        running.percent(trained.accuracy),
        f"{100 * (trained.accuracy - float_row.accuracy):+.2f}",
        running.counted(trained.file_bytes),
        running.counted(trained.arena_bytes),
        running.steps(max(steps.values())) if steps else "-",
        " ".join(sign for runtime, sign in RUNTIMES.items() if runtime in steps) or "-",
    )


def _encoded_cells(name: str, found: dict[str, Any], float_row: Row) -> tuple[str, ...]:
    return (
        name,
        running.counted(found["file_bytes"]),
        f"{found['file_bytes'] / (float_row.file_bytes or 1):.3f}",
        running.counted(found["arena_bytes"]),
        running.steps(found["lockstep"]),
    )


def _measured(task: _Task, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one precision: accuracy after calibration, and the row after QAT."""
    images = task.train[0][:CALIBRATION_SAMPLES]
    qat = kqat.quantize_model(task.model, precision, calibration_data=images)
    calibrated = running.measure_file(precision, tflite_export.convert(qat), task.test)
    task.fit(qat, options.epochs, training.freezing(options.epochs))
    shipped = shipping.measured(precision, qat, task.test)
    tflite_export.save(shipped.blob, options.out / f"{precision}.tflite")
    shipped.report.save(options.out / f"{precision}_report.json")
    return {
        "calibrated": calibrated.accuracy,
        "trained": dataclasses.asdict(shipped.row),
        "encoded": _encoded(qat, images, options.out / f"{precision}_encoded.tflite"),
    }


def _encoded(qat: keras.Model, images: Any, path: Path) -> dict[str, Any]:
    """Results of the file for TFLite Micro with `compress="smallest"`."""
    blob = tflite_export.convert(qat, target="tflite_micro", compress="smallest")
    tflite_export.save(blob, path)
    (part,) = tflite_export.verify(qat, blob, images, runtimes=("tflite_micro",)).runtimes
    if part.problem:
        raise SystemExit(f"TensorFlow Lite Micro does not run {path}: {part.problem}")
    return {
        "file_bytes": len(blob),
        "arena_bytes": part.arena_bytes,
        "lockstep": part.max_steps,
    }


def _resnet8(options: argparse.Namespace) -> _Task:
    model = resnet8()
    train, test = lab.samples(options)
    task = _Task(
        model=model,
        train=_as_floats(train),
        test=_as_floats(test),
        fit=lambda model, epochs, callbacks: training.fit(
            model, task.train, epochs, LEARNING_RATE, batch_size=BATCH_SIZE, callbacks=callbacks
        ),
    )
    if not options.smoke:
        model.set_weights(data.pretrained("mlperf_tiny/ic").get_weights())
    task.fit(model, options.float_epochs, ())
    return task


def _mobilenetv2(options: argparse.Namespace) -> _Task:
    train, test = lab.samples(options)
    batches = training.Batches(train, seed=options.seed)

    def fit(
        model: keras.Model,
        epochs: int,
        callbacks: Sequence[keras.callbacks.Callback],
        learning_rate: float = lab.TUNING_LEARNING_RATE,
    ) -> None:
        rate = learning_rate
        with tempfile.TemporaryDirectory() as folder:
            training.train(
                model, batches, Path(folder), epochs=epochs, learning_rate=rate, callbacks=callbacks
            )

    if options.weights is not None:
        model = keras.models.load_model(options.weights)
    else:
        width = SMOKE_WIDTH if options.smoke else WIDTH
        model = mobilenet_v2(**lab.network(width, smoke=options.smoke))
        fit(model, options.float_epochs, (), lab.LEARNING_RATE)
    return _Task(
        model=model,
        train=(training.scaled(train[0]), train[1]),
        test=(training.scaled(test[0]), test[1]),
        fit=fit,
    )


def _as_floats(samples: Samples) -> Samples:
    return samples[0].astype("float32"), samples[1]


NETWORKS = {"resnet8": _resnet8, "mobilenetv2": _mobilenetv2}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/precisions")
    parser.add_argument("--network", choices=NETWORKS, default="resnet8")
    parser.add_argument("--precisions", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--weights", help="a float .keras of the lab, for mobilenetv2")
    parser.add_argument("--float-epochs", type=int, help="in float (default 2, with --weights 0)")
    parser.add_argument("--epochs", type=int, default=2, help="of each QAT (default 2)")
    parser.add_argument(
        "--train-images", type=int, default=10_000, help="to train on (default 10000)"
    )
    options = parser.parse_args(argv)
    if options.weights is not None and options.network != "mobilenetv2":
        parser.error(f"Expected --weights for mobilenetv2 only. Received: {options.network}.")
    if options.weights is not None and options.float_epochs:
        parser.error(f"Expected --weights or --float-epochs. Received: {options.float_epochs} too.")
    if options.float_epochs is None:
        options.float_epochs = 0 if options.weights is not None else 2
    if options.smoke:
        options.epochs = options.float_epochs = 1
        options.train_images = SMOKE_IMAGES
    return options


if __name__ == "__main__":
    main()
