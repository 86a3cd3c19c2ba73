"""The lab: what does it cost to make a MobileNetV2 narrow, then sparse, then integer?

    python -m recipes.mobilenetv2_cifar10 --out out/mobilenetv2_cifar10

1. Float. MobileNetV2, 0.35 times as wide as in the paper, learns CIFAR-10 (after JPEG, so compare
   these accuracies with each other only).
2. Pruning. Half of the weights, the smallest of each kernel, become zero; the others are
   fine-tuned. All later steps start from this sparse float network and are compared with it.
3. PTQ, post-training quantization: activation ranges are calibrated on some images, without
   training. Done by TensorFlow's own converter, and by kqat.
4. QAT, quantization-aware training: the network is trained further with its values rounded. Also
   done by tfmot in Keras 2, from the same weights, with the same batches, epochs and learning rate.
5. The same with weights of four bits (--policies), where PTQ fails and QAT does not.
6. The control: the float network trained for as long as QAT, which shows what more training alone
   gains.

Zeros stay zero in 2, 4, 5 and 6: the optimizer restores them after each step.

The recipe can be killed at any time. Started again with the same options, it continues from the
last epoch and ends with the same table, except for the times. Writes to --out: a .tflite per row,
the trained .keras models, results.json, and report.html, which explains each step.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from kqat.base import save_model, write_file
from kqat.config import PRESETS
from recipes import converter, data, lab_report, pruning, running, training
from recipes.data import Samples
from recipes.latency import latencies
from recipes.models import mobilenet_v2
from recipes.models.mobilenet_v2 import FAST_STRIDES, STAGES
from recipes.running import Table
from recipes.timing import ratio

CALIBRATION_SAMPLES = 512
VALIDATION_SAMPLES = 2000
LEARNING_RATE = 2e-3
# Low, because the weights need to move by only a few steps of their grids.
TUNING_LEARNING_RATE = 5e-4
FLOAT, SPARSE, FURTHER = "FP32", "FP32, half pruned", "FP32, trained further"
CONVERTER = "PTQ int8, TensorFlow"
TFMOT = "QAT int8, tfmot"
SMOKE_STAGES = 2
POLICIES = {
    **PRESETS,
    "w4a8_max_abs": dataclasses.replace(PRESETS["w4a8"], weight_step=kqat.MaxAbs()),
}
LATENCY_ROUNDS = 60
# Default values of options.
USUAL = {"epochs": 10, "prune_epochs": 3, "qat_epochs": 2, "width": 0.35, "train_images": 50_000}
SMALL = {"epochs": 1, "prune_epochs": 1, "qat_epochs": 1, "width": 0.1, "train_images": 32}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    _check_options(options)
    lab = _Lab(options)
    sparse = lab.floats()
    lab.measure(CONVERTER, lambda: converter.post_training_int8(sparse, lab.calibration))
    for policy in options.policies:
        lab.quantized(sparse, policy)
    lab.further(sparse)
    if not options.no_tfmot:
        lab.tfmot(sparse)
    print("Latency: LiteRT, one thread, all files in turns", flush=True)
    results = running.save_results(
        options,
        "mobilenetv2_cifar10",
        {
            "parameters": {"narrow": sparse.count_params(), "full": _full_size(lab.network)},
            "test_images": len(lab.test[1]),
            "rows": lab.rows,
            "latency": lab.latency(),
            "history": lab.history(),
        },
    )
    running.show(tables(results))
    write_file(options.out / "report.html", lab_report.html(results, tables(results)).encode())
    print(f"\nWritten to {options.out}; report.html explains it")
    return results


LEGEND = """\
gap        accuracy less that of the half-pruned float file, in points
zeros      share among the weights of the pruned kernels, as in the file
minutes    of training for this row alone: of the processor, threads added up
lockstep   largest difference of any operator from the Keras model, in output
           steps, on LiteRT (reference kernels and XNNPACK) and TFLite Micro
zipped     bytes of the file after zlib, where zeros cost nothing
arena      as TFLite Micro uses it on this 64-bit host
latency    on LiteRT (XNNPACK), one thread, of the processor's time: median and
           quartiles of the ratio to TensorFlow's PTQ, all files in turns"""


def tables(results: dict[str, Any]) -> list[Table]:
    """The lab's tables, from what results.json holds."""
    rows, latency = results["rows"], results["latency"]
    return [
        Table(
            f"Accuracy on {results['test_images']:,} test images",
            ("", "accuracy", "gap", "zeros", "epochs", "minutes", "lockstep"),
            [_accuracy_cells(name, row, rows[SPARSE]) for name, row in rows.items()],
            LEGEND,
        ),
        Table(
            "Size and speed of the files",
            ("", "bytes", "zipped", "arena bytes", "latency"),
            [_size_cells(name, row, latency[name]) for name, row in rows.items()],
            LEGEND,
        ),
    ]


OVER_SEEDS = """\
accuracy   mean over the seeds, and from the least to the greatest
gap        mean of each seed's accuracy less that of its own half-pruned float file,
           in points, and from the least to the greatest"""


def tables_over_seeds(runs: Sequence[dict[str, Any]]) -> list[Table]:
    """What several seeds agree on, from the results.json of each; rows that all of them have."""
    seeds = ", ".join(str(run["options"]["seed"]) for run in runs)
    common = [name for name in runs[0]["rows"] if all(name in run["rows"] for run in runs)]
    rows = []
    for name in common:
        found = [run["rows"][name]["accuracy"] for run in runs]
        gaps = [
            100 * (a - run["rows"][SPARSE]["accuracy"]) for a, run in zip(found, runs, strict=True)
        ]
        gap = f"{sum(gaps) / len(gaps):+.2f} ({min(gaps):+.2f} to {max(gaps):+.2f})"
        rows.append((name, running.percents(found), gap))
    return [Table(f"Accuracy over the seeds {seeds}", ("", "accuracy", "gap"), rows, OVER_SEEDS)]


def _accuracy_cells(name: str, row: dict[str, Any], sparse: dict[str, Any]) -> tuple[str, ...]:
    lockstep = row["lockstep_steps"]
    return (
        name,
        running.percent(row["accuracy"]),
        f"{100 * (row['accuracy'] - sparse['accuracy']):+.2f}",
        running.percent(row["zero_share"]),
        str(row["epochs"] or "-"),
        f"{row['processor_minutes']:.1f}" if row["epochs"] else "-",
        "-" if lockstep is None else running.steps(max(lockstep.values())),
    )


def _size_cells(name: str, row: dict[str, Any], latency: dict[str, float]) -> tuple[str, ...]:
    return (
        name,
        running.counted(row["file_bytes"]),
        running.counted(row["zipped_bytes"]),
        running.counted(row["arena_bytes"]),
        f"{latency['median']:.2f} ({latency['lower']:.2f}–{latency['upper']:.2f})",
    )


class _Lab:
    """The files of one run and their measurements; each is made once and then read back."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.out: Path = options.out
        self.network = network(options.width, smoke=options.smoke)
        self.train, test = samples(options)
        self.batches = training.Batches(self.train, seed=options.seed)
        self.test = training.scaled(test[0]), test[1]
        self.validation = self.test[0][:VALIDATION_SAMPLES], self.test[1][:VALIDATION_SAMPLES]
        self.calibration = training.scaled(self.train[0][:CALIBRATION_SAMPLES])
        self.rows: dict[str, dict[str, Any]] = {}

    def floats(self) -> keras.Model:
        """The two float networks; returns the sparse one."""
        options = self.options
        dense = self.trained(
            FLOAT, lambda: mobilenet_v2(**self.network), options.epochs, LEARNING_RATE
        )
        self.measure(FLOAT, lambda: converter.float_tflite(dense))

        def pruned() -> keras.Model:
            pruning.prune(dense, options.pruning)
            pruning.keep_zeros(dense)
            return dense

        sparse = self.trained(SPARSE, pruned, options.prune_epochs, TUNING_LEARNING_RATE)
        self.measure(SPARSE, lambda: converter.float_tflite(sparse))
        return sparse

    def further(self, sparse: keras.Model) -> None:
        """The control: float, for as many epochs as QAT."""

        def copied() -> keras.Model:
            model = keras.models.load_model(self._path(SPARSE, "model.keras"))
            pruning.keep_zeros(model)
            return model

        model = self.trained(FURTHER, copied, self.options.qat_epochs, TUNING_LEARNING_RATE)
        self._check_zeros(sparse, model)
        self.measure(FURTHER, lambda: converter.float_tflite(model))

    def quantized(self, sparse: keras.Model, policy: str) -> None:
        """PTQ and QAT by kqat under one policy."""

        def calibrated() -> keras.Model:
            model = kqat.quantize_model(sparse, POLICIES[policy], calibration_data=self.calibration)
            pruning.keep_zeros(model)
            return model

        name = f"PTQ {policy}"
        model = calibrated()
        self.measure(name, lambda: tflite_export.convert(model), model)
        name, epochs = f"QAT {policy}", self.options.qat_epochs
        freezing = training.freezing(epochs)
        model = self.trained(name, calibrated, epochs, TUNING_LEARNING_RATE, freezing)
        self._check_zeros(sparse, model)
        self.measure(name, lambda: tflite_export.convert(model), model)

    def tfmot(self, sparse: keras.Model) -> None:
        """tfmot's QAT, in a child process."""
        folder = self._path(TFMOT)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model.tflite").exists():
            images, labels = self.train
            np.savez(folder / "samples.npz", images=images, labels=labels)
            np.savez(folder / "weights.npz", *sparse.get_weights())
            request = {
                "folder": str(folder),
                "weights": str(folder / "weights.npz"),
                "samples": str(folder / "samples.npz"),
                "network": self.network,
                "epochs": self.options.qat_epochs,
                "learning_rate": TUNING_LEARNING_RATE,
                "seed": self.options.seed,
            }
            write_file(folder / "request.json", json.dumps(request, indent=1).encode())
            print(f"{TFMOT}: training in a child process", flush=True)
            subprocess.run(
                [sys.executable, "-m", "recipes.tfmot_qat", "--request", folder / "request.json"],
                env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
                check=True,
            )
            (folder / "samples.npz").unlink()
        self.measure(TFMOT, (folder / "model.tflite").read_bytes)

    def trained(
        self,
        name: str,
        build: Callable[[], keras.Model],
        epochs: int,
        learning_rate: float,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> keras.Model:
        """The trained model of a row: read back from its file, or built by `build` and trained."""
        path = self._path(name, "model.keras")
        if not path.exists():
            print(f"{name}: training", flush=True)
            model = build()
            training.train(
                model,
                self.batches,
                path.parent,
                epochs=epochs,
                learning_rate=learning_rate,
                validation=self.validation,
                callbacks=callbacks,
            )
            save_model(model, path)
            training.drop_checkpoints(path.parent)
        return keras.models.load_model(path)

    def measure(
        self, name: str, convert: Callable[[], bytes], qat: keras.Model | None = None
    ) -> None:
        """Adds the row of a file; `qat` is the model to verify it against."""
        path = self._path(name, "measured.json")
        if not path.exists():
            print(f"{name}: measuring", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            blob = convert()
            tflite_export.save(blob, path.with_name("model.tflite"))
            row = self._measured(name, blob, qat)
            write_file(path, json.dumps(row, indent=1).encode())
        self.rows[name] = json.loads(path.read_text())

    def _measured(self, name: str, blob: bytes, qat: keras.Model | None) -> dict[str, Any]:
        if qat is None:
            row = running.measure_file(name, blob, self.test)
        else:
            row, report = running.measure_integer(name, qat, blob, self.test)
            report.save(self._path(name, "verified.json"))
        history = training.read_history(self._path(name))
        return {
            **dataclasses.asdict(row),
            "zipped_bytes": len(zlib.compress(blob, 9)),
            "zero_share": pruning.zero_share_of_file(blob),
            "sha256": hashlib.sha256(blob).hexdigest(),
            "epochs": len(history),
            "minutes": sum(epoch["seconds"] for epoch in history) / 60,
            "processor_minutes": sum(epoch["processor_seconds"] for epoch in history) / 60,
        }

    def latency(self) -> dict[str, dict[str, float]]:
        """CPU time of each file's inference, as a ratio to that of the converter's PTQ file."""
        blobs = {name: self._path(name, "model.tflite").read_bytes() for name in self.rows}
        measured = latencies(blobs, rounds=2 if self.options.smoke else LATENCY_ROUNDS)
        return {
            name: dataclasses.asdict(ratio(measured, name, CONVERTER, "processor"))
            for name in blobs
        }

    def history(self) -> dict[str, list[dict[str, float]]]:
        """Row -> the logs of each epoch, for rows that were trained."""
        found = {name: training.read_history(self._path(name)) for name in self.rows}
        return {name: epochs for name, epochs in found.items() if epochs}

    def _check_zeros(self, sparse: keras.Model, model: keras.Model) -> None:
        if not pruning.zeros_are_kept(sparse, model):
            raise RuntimeError(
                f"Expected what was pruned to stay zero. Received: '{model.name}', where some of "
                "it is not. Use pruning.keep_zeros before training."
            )

    def _path(self, name: str, file: str = "") -> Path:
        folder = name.lower().replace(",", "").replace(" ", "_")
        return self.out / folder / file


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/mobilenetv2_cifar10")
    parser.add_argument("--epochs", type=int, help="in float (default 10)")
    parser.add_argument("--prune-epochs", type=int, help="after pruning (default 3)")
    parser.add_argument("--qat-epochs", type=int, help="of each QAT, and the control (default 2)")
    parser.add_argument("--width", type=float, help="of the network (default 0.35)")
    parser.add_argument("--pruning", type=float, default=0.5, help="share of zeros (default 0.5)")
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=POLICIES,
        default=["int8", "w4a8"],
        help="to quantize by (default int8 w4a8)",
    )
    parser.add_argument("--train-images", type=int, help="to train on (default 50000)")
    parser.add_argument("--no-tfmot", action="store_true", help="leave tfmot's QAT out")
    options = parser.parse_args(argv)
    for name, value in (SMALL if options.smoke else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Refuses to continue in a folder that a run with other options has begun."""
    path = options.out / "options.json"
    # These only add rows, or leave one out.
    free = ("policies", "no_tfmot")
    bound = {k: v for k, v in running.settings(options).items() if k not in free}
    ours = json.dumps(bound, indent=1)
    if path.exists() and path.read_text() != ours:
        raise SystemExit(
            f"Expected the options of {path}, whose run would go on. Received: {ours}. "
            "Use another --out, or remove that folder."
        )
    write_file(path, ours.encode())


def network(width: float, *, smoke: bool) -> dict[str, Any]:
    """The lab's options of `mobilenet_v2`: larger strides, and few stages for a smoke run."""
    if smoke:
        stages, strides = STAGES[:SMOKE_STAGES], FAST_STRIDES[: SMOKE_STAGES + 1]
        return {"width": width, "strides": strides, "stages": stages}
    return {"width": width, "strides": FAST_STRIDES}


def samples(options: argparse.Namespace) -> tuple[Samples, Samples]:
    """Images in 0..255, 8 bits each, and labels: for training and for testing."""
    if options.smoke:
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (options.train_images, 32, 32, 3)).astype(np.uint8)
        labels = random.integers(0, 10, options.train_images)
        return (images, labels), (images[:32], labels[:32])
    x, y = data.cifar10_jpeg("train", count=options.train_images)
    x_test, y_test = data.cifar10_jpeg("test")
    return (x.astype(np.uint8), y), (x_test.astype(np.uint8), y_test)


def _full_size(network: dict[str, Any]) -> int:
    """Number of parameters of the network at the paper's width."""
    return mobilenet_v2(**{**network, "width": 1.0}).count_params()


if __name__ == "__main__":
    main()
