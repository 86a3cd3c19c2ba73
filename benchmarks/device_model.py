"""The integer model against the files themselves: a test set judged three ways, and many networks.

    python -m benchmarks.device_model --images 10000 --out out/device_model.json
    python -m benchmarks.device_model --networks all

The first: MobileNetV2 (0.35 times as wide as the paper's) learns CIFAR-10 for --epochs, then trains
for one as a QAT model, and the QAT model, its integer model and the file judge one test set. The
last two rows must be equal, and so must all output integers, which are counted. Without the shared
data the images are noise: accuracy then says nothing, equality as much.

The second: each network's file runs on each runtime. Its output integers are compared with those of
the integer model, which saw nothing but the inputs; and the integers of every operator with our
arithmetic of what the runtime computed before it. Writes `benchmarks/device_networks.json` after
each network, and `.md` beside it; networks that the JSON holds are not measured again.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from benchmarks.calibration import TASKS
from kqat.base import RuntimeUnavailableError, write_file
from recipes import data, sequence, transformer
from recipes.models.mobilenet_v2 import FAST_STRIDES, STAGES, mobilenet_v2
from recipes.timing import print_table, write_json
from tflite_export import flatbuffer
from tflite_export.runtimes import RUNTIMES, as_type, run
from tflite_export.verification.exactness import exactness

CALIBRATION_SAMPLES = 512
SMOKE_STAGES = 2
NETWORKS_OUT = Path(__file__).with_name("device_networks.json")
COMPARED = ("litert", "litert_reference", "tflite_micro")
COMPARED_SAMPLES = 100


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints a table and writes JSON; returns what it writes."""
    options = _parser().parse_args(arguments)
    if options.networks:
        return _compare_networks(options)
    if options.smoke:
        options.images, options.train_images = 16, 32
    train, test = _samples("train", options.train_images), _samples("test", options.images)
    qat = _trained(train, options)
    result = measure(qat, *test, runtime=options.runtime, batch_size=options.batch_size)
    rows = [
        (name, f"{row['accuracy']:.4f}", f"{row['seconds']:.1f}") for name, row in result.items()
    ]
    print_table(("judge", "accuracy", "seconds"), rows)
    print(f"{result['file']['differing']} of {result['file']['integers']} output integers differ")
    if options.out:
        write_json(options.out, {"images": options.images, "runtime": options.runtime, **result})
    return result


def measure(
    qat: keras.Model, x: np.ndarray, y: np.ndarray, *, runtime: str, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Accuracy and seconds of each judge; of the file also how many of its integers differ."""
    blob = tflite_export.convert(qat)
    device = tflite_export.integer_model(blob, runtime, outputs="integers")
    given = _input_tensor(blob)

    def on_runtime() -> np.ndarray:
        return run(blob, [as_type(x, given)], runtime=runtime).outputs[0]

    judges: dict[str, Callable[[], np.ndarray]] = {
        "qat": lambda: qat.predict(x, batch_size=batch_size, verbose=0),
        "integer model": lambda: device.predict(x, batch_size=batch_size, verbose=0),
        "file": on_runtime,
    }
    found: dict[str, dict[str, Any]] = {}
    outputs = {}
    for name, judge in judges.items():
        if name != "file":
            # The first batch compiles.
            (qat if name == "qat" else device).predict(x[:batch_size], verbose=0)
        start = time.perf_counter()
        outputs[name] = judge()
        seconds = time.perf_counter() - start
        accuracy = float(np.mean(outputs[name].argmax(-1) == y))
        found[name] = {"accuracy": accuracy, "seconds": seconds}
    differing = int(np.count_nonzero(outputs["integer model"] != outputs["file"]))
    found["file"] |= {"differing": differing, "integers": outputs["file"].size}
    return found


def _input_tensor(blob: bytes) -> Any:
    graph = flatbuffer.read(blob).subgraphs[0]
    return graph.tensors[int(graph.inputs[0])]


def _samples(split: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    if data.available():
        x, y = data.cifar10_jpeg(split, count=count)
        return x / np.float32(127.5) - np.float32(1.0), y
    generator = np.random.default_rng(0)
    x = generator.uniform(-1.0, 1.0, (count, 32, 32, 3)).astype(np.float32)
    return x, generator.integers(0, 10, count)


def _trained(train: tuple[np.ndarray, np.ndarray], options: argparse.Namespace) -> keras.Model:
    keras.utils.set_random_seed(0)
    stages = STAGES[:SMOKE_STAGES] if options.smoke else STAGES
    strides = FAST_STRIDES[: len(stages) + 1]
    model = mobilenet_v2(width=0.35, strides=strides, stages=stages)
    _fit(model, train, options.epochs, 2e-3)
    qat = kqat.quantize_model(model, calibration_data=train[0][:CALIBRATION_SAMPLES])
    _fit(qat, train, 1, 5e-4)
    return qat


def _fit(
    model: keras.Model, train: tuple[np.ndarray, np.ndarray], epochs: int, rate: float
) -> None:
    model.compile(
        keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model.fit(*train, epochs=epochs, batch_size=64, verbose=0)


def _compare_networks(options: argparse.Namespace) -> dict[str, Any]:
    out = options.out or NETWORKS_OUT
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    names = list(NETWORKS) if "all" in options.networks else options.networks
    samples = 4 if options.smoke else COMPARED_SAMPLES
    for name in names:
        if name in results:
            continue
        keras.utils.set_random_seed(0)
        qat, x = NETWORKS[name](options.smoke)
        results[name] = compare(qat, x[:samples])
        write_file(out, (json.dumps(results, indent=1) + "\n").encode())
        print(name, results[name], flush=True)
    text = as_markdown(results)
    write_file(out.with_suffix(".md"), text.encode())
    print(text)
    return results


def compare(qat: keras.Model, x: np.ndarray) -> dict[str, Any]:
    """By runtime: integers of the output and of all operators, and how many are not ours."""
    blob = tflite_export.convert(qat)
    model, given = flatbuffer.read(blob), _input_tensor(blob)
    found: dict[str, Any] = {}
    for runtime in COMPARED:
        try:
            got = run(blob, [as_type(x, given)], runtime=runtime, tensors="all")
        except RuntimeUnavailableError as error:
            found[runtime] = {"problem": str(error)}
            continue
        device = tflite_export.integer_model(blob, runtime, outputs="integers")
        ours = np.asarray(device.predict(x, batch_size=32, verbose=0))
        steps = exactness(model, got.tensors, runtime)
        found[runtime] = {
            "samples": len(x),
            "outputs": ours.size,
            "outputs_differing": int(np.count_nonzero(ours != got.outputs[0].reshape(ours.shape))),
            "integers": steps.elements,
            "integers_differing": steps.differing,
            "first": steps.first,
            "unknown": list(steps.unknown),
        }
    return found


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table."""
    lines = ["# Integers that differ between the integer model and the file", ""]
    lines += ["`python -m benchmarks.device_model --networks all` writes this file.", ""]
    lines += ["Outputs: end to end, the integer model fed the inputs alone. All operators: each"]
    lines += ["fed what the runtime computed before it.", ""]
    lines += ["| network | runtime | samples | outputs | all operators | the first that differs |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for name, runtimes in results.items():
        for runtime, row in runtimes.items():
            if "problem" in row:
                lines.append(f"| {name} | {runtime} | - | - | - | {row['problem']} |")
                continue
            notes = "; ".join(note for note in (row["first"], *row["unknown"]) if note)
            lines.append(
                f"| {name} | {runtime} | {row['samples']} | {row['outputs_differing']:,} of "
                f"{row['outputs']:,} | {row['integers_differing']:,} of {row['integers']:,} | "
                f"{notes} |"
            )
    return "\n".join(lines) + "\n"


def _pretrained(name: str, smoke: bool) -> tuple[keras.Model, np.ndarray]:
    """Calibrated from the pool of its calibration task; the test samples, and noisy copies."""
    task = TASKS[name]()
    x = task.test
    generator = np.random.default_rng(0)
    while len(x) < COMPARED_SAMPLES:
        noise = generator.normal(0, 0.1 * x.std(), task.test.shape).astype(np.float32)
        x = np.concatenate([x, task.test + noise])
    return kqat.quantize_model(task.model, calibration_data=task.pool[:256]), x


def _learned(
    build: Callable[[], keras.Model],
    samples: Callable[[int], tuple[data.Samples, data.Samples]],
    policy: Any,
    smoke: bool,
) -> tuple[keras.Model, np.ndarray]:
    """Trained for an epoch in float and an epoch quantized."""
    train, test = samples(64 if smoke else 6000)
    model = build()
    _fit(model, train, 1 if smoke else 2, 2e-3)
    qat = kqat.quantize_model(model, policy, calibration_data=train[0][:CALIBRATION_SAMPLES])
    _fit(qat, train, 1, 2e-4)
    return qat, test[0]


def _transformer(name: str, smoke: bool) -> tuple[keras.Model, np.ndarray]:
    task = transformer.TASKS[name]
    return _learned(task.build, task.samples, "int8", smoke)


def _recurrent(name: str, smoke: bool) -> tuple[keras.Model, np.ndarray]:
    policy = sequence.POLICIES.get(name, "int8")
    return _learned(lambda: sequence.network(name, 32), sequence.digit_rows, policy, smoke)


NETWORKS: dict[str, Callable[[bool], tuple[keras.Model, np.ndarray]]] = {
    **{name: functools.partial(_pretrained, name) for name in data.pretrained_names()},
    **{name: functools.partial(_transformer, name) for name in transformer.TASKS},
    **{name: functools.partial(_recurrent, name) for name in sequence.NETWORKS},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", choices=("all", *NETWORKS), help="compare their integers instead"
    )
    parser.add_argument("--images", type=int, default=1000, help="of the test set")
    parser.add_argument("--train-images", type=int, default=10_000, help="of the training set")
    parser.add_argument("--epochs", type=int, default=2, help="of float training")
    parser.add_argument("--batch-size", type=int, default=128, help="of both Keras models")
    parser.add_argument("--runtime", choices=RUNTIMES, default="litert")
    parser.add_argument("--out", type=Path, help="where to write JSON")
    parser.add_argument("--smoke", action="store_true", help="a small network, 16 images")
    return parser


if __name__ == "__main__":
    main()
