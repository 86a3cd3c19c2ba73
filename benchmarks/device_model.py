"""One test set judged three ways: the QAT model, its integer model, and the file on its runtime.

    python -m benchmarks.device_model --images 10000 --out out/device_model.json

MobileNetV2 (0.35 times as wide as the paper's) learns CIFAR-10 for --epochs, then trains for one as
a QAT model. The last two rows must be equal, and so must all output integers, which are counted.
Without the shared data the images are noise: accuracy then says nothing, equality as much.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from recipes import data
from recipes.models.mobilenet_v2 import FAST_STRIDES, STAGES, mobilenet_v2
from recipes.timing import print_table, write_json
from tflite_export import flatbuffer
from tflite_export.runtimes import RUNTIMES, as_type, run

CALIBRATION_SAMPLES = 512
SMOKE_STAGES = 2


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints a table and writes JSON; returns what it writes."""
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
