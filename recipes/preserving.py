"""What do zeros and few distinct weights save? Pruned and clustered ResNet-8, through QAT.

    python -m recipes.preserving --out out/preserving

MLPerf Tiny's pretrained ResNet-8 is pruned (`kqat.prune`), clustered (`kqat.cluster`) or both, and
then trained as int8 with `preserve`. The recipe stops with an error if a kernel in a file has fewer
zeros than were pruned, or more distinct integers than there were clusters. Images are CIFAR-10
after JPEG, and the training is short: compare these accuracies with each other only.

Writes to --out: three .tflite files for each row, and results.json.
"""

import argparse
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from recipes import data, running, training
from recipes import mobilenetv2_cifar10 as lab
from recipes.data import Samples
from recipes.models import resnet8
from recipes.running import Table
from tflite_export import flatbuffer

SPARSITY, CLUSTERS = 0.5, 16
LEARNING_RATE = 1e-4
BATCH_SIZE = 64
CALIBRATION_SAMPLES = 256
VERIFIED_SAMPLES = 2
SMOKE_IMAGES = 32
# Row -> whether weights are pruned, and whether they are clustered.
ROWS = {
    "dense": (False, False),
    "half pruned": (True, False),
    "16 clusters": (False, True),
    "half pruned, 16 clusters": (True, True),
}
LEGEND = """\
zeros      least share of zeros of a kernel, among the integers of the file
values     largest number of distinct integers of a kernel in the file
zipped     bytes of the file after zlib
lookup,    with the weights encoded for TFLite Micro's DECODE, by tables and bit
smallest   masks, or by prefix codes where these are smaller; arena as TFLite
           Micro uses it then on this 64-bit host (DECODE unpacks a layer's
           weights there), lockstep there too"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    (x, y), (x_test, y_test) = lab.samples(options)
    train = x.astype(np.float32), y
    test = (x_test[: options.test_images].astype(np.float32), y_test[: options.test_images])
    model = resnet8()
    if not options.smoke:
        model.set_weights(data.pretrained("mlperf_tiny/ic").get_weights())
    rows = {}
    for name, (pruned, clustered) in ROWS.items():
        print(f"{name}: training", flush=True)
        keras.utils.set_random_seed(options.seed)
        rows[name] = _measured(name, model, train, test, pruned, clustered, options)
    results = running.save_results(
        options, "preserving", {"test_images": len(test[1]), "rows": rows}
    )
    running.show(tables(results))
    print(f"\nWritten to {options.out}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """The recipe's table, from what results.json holds."""
    header = (
        "", "accuracy", "zeros", "values", "bytes", "zipped", "lookup", "smallest",
        "arena", "arena smallest", "lockstep",
    )  # fmt: skip
    rows = [
        (
            name,
            running.percent(row["accuracy"]),
            running.percent(row["least_zero_share"]),
            str(row["most_values"]),
            *(running.counted(row[key]) for key in (
                "file_bytes", "zipped_bytes", "lookup_bytes", "smallest_bytes", "arena_bytes",
                "smallest_arena_bytes",
            )),
            running.steps(row["lockstep"]),
        )
        for name, row in results["rows"].items()
    ]  # fmt: skip
    title = f"ResNet-8, int8, {results['test_images']:,} test images"
    return [Table(title, header, rows, LEGEND)]


def kernel_integers(blob: bytes) -> list[np.ndarray]:
    """The int8 weights of each convolution and dense layer of a file."""
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    found = []
    for operator in graph.operators:
        if flatbuffer.op_name(model, operator) in ("CONV_2D", "FULLY_CONNECTED"):
            values = flatbuffer.tensor_data(model, graph.tensors[int(operator.inputs[1])])
            assert values is not None
            found.append(values)
    return found


def _measured(
    name: str,
    model: keras.Model,
    train: Samples,
    test: Samples,
    pruned: bool,
    clustered: bool,
    options: argparse.Namespace,
) -> dict[str, Any]:
    start = kqat.prune(model, SPARSITY) if pruned else model
    start = kqat.cluster(start, CLUSTERS) if clustered else start
    kinds = ["sparsity"] * pruned + ["clusters"] * clustered
    images = train[0][:CALIBRATION_SAMPLES]
    qat = kqat.quantize_model(start, calibration_data=images, preserve=kinds or None)
    training.fit(qat, train, options.epochs, LEARNING_RATE, batch_size=BATCH_SIZE)
    blob = tflite_export.convert(qat)
    integers = kernel_integers(blob)
    zeros = min(float(np.mean(values == 0)) for values in integers)
    most = max(np.unique(values).size for values in integers)
    # Rounding to whole numbers of weights costs a kernel less than one of them.
    if pruned and zeros < SPARSITY - 1.0 / min(values.size for values in integers):
        raise RuntimeError(f"Expected {SPARSITY:.0%} zeros in '{name}'. Received: {zeros:.2%}.")
    if clustered and most > CLUSTERS:
        raise RuntimeError(f"Expected {CLUSTERS} values at most in '{name}'. Received: {most}.")
    row = running.measure_file(name, blob, test)
    files = {"": blob}
    for way in ("lookup", "smallest"):
        files[way] = tflite_export.convert(qat, target="tflite_micro", compress=way)
    steps, arena = [], 0
    for way, file in files.items():
        stem = name.replace(",", "").replace(" ", "_") + (way and f"_{way}")
        tflite_export.save(file, options.out / f"{stem}.tflite")
        (part,) = tflite_export.verify(
            qat, file, test[0], runtimes=("tflite_micro",), samples=VERIFIED_SAMPLES
        ).runtimes
        if part.problem is not None:
            raise RuntimeError(f"TensorFlow Lite Micro does not run {stem}: {part.problem}")
        steps.append(part.max_steps)
        arena = part.arena_bytes or 0
    return {
        "accuracy": row.accuracy,
        "least_zero_share": zeros,
        "most_values": int(most),
        "file_bytes": len(blob),
        "zipped_bytes": len(zlib.compress(blob, 9)),
        "lookup_bytes": len(files["lookup"]),
        "smallest_bytes": len(files["smallest"]),
        "arena_bytes": row.arena_bytes,
        "smallest_arena_bytes": arena,
        "lockstep": max(steps),
    }


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/preserving")
    parser.add_argument("--epochs", type=int, default=1, help="of each QAT (default 1)")
    parser.add_argument("--train-images", type=int, default=2560, help="to train on")
    parser.add_argument("--test-images", type=int, default=10_000)
    options = parser.parse_args(argv)
    if options.smoke:
        options.epochs, options.train_images, options.test_images = 1, SMOKE_IMAGES, SMOKE_IMAGES
    return options


if __name__ == "__main__":
    main()
