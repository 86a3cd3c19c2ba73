"""kqat beside what else makes int8 files for microcontrollers, from identical float weights.

    python -m benchmarks.peers --out out/peers

ic   MLPerf Tiny's ResNet-8, pretrained, then adapted to JPEG images in float for as many steps as
     QAT has. PTQ (calibration only) by kqat, by TensorFlow's converter and by litert-quantizer; QAT
     by kqat and by tfmot in Keras 2: the same images in the same order, optimizer and steps.
kws  MLPerf Tiny's DS-CNN, pretrained; PTQ only, as its training data are not here. Ranges come from
     100 inputs, the other 900 are compared on.

litert-quantizer is left out where it is not installed.
"""

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter

import kqat
import tflite_export
from benchmarks.keras2 import tf_keras, tfmot_quantize_model
from benchmarks.networks import NETWORKS, SMOKE
from recipes import converter, data, running, tfmot_qat
from recipes.data import Samples
from recipes.latency import latencies
from recipes.running import Table
from recipes.timing import Seconds, ratio
from recipes.training import fit, freezing
from tflite_export import flatbuffer
from tflite_export.runtimes import tflite_micro_arena_bytes

BATCH_SIZE = 64
TRAIN_IMAGES = 6400
TEST_IMAGES = 5000
CALIBRATION_SAMPLES = 100
EPOCHS = 2
LEARNING_RATE = 3e-4
ROUNDS = 40
FLOAT, KQAT_PTQ, CONVERTER, LITERT = "float", "kqat PTQ", "converter PTQ", "litert-quantizer PTQ"
KQAT_QAT, TFMOT = "kqat QAT", "tfmot QAT"
LEGEND = """\
SQNR       of the outputs against the float model's, in dB; a model that trained
           on is another function, and its distance no noise
ops        operators in the file
arena      as TFLite Micro uses it on this 64-bit host, in bytes
latency    LiteRT (XNNPACK), one thread, of the processor's time: median and
           quartiles of the ratio to the converter's PTQ, all files in turns
seconds    of the processor, for one conversion, calibration included where it
           belongs to it: kqat's ranges are in the model already"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A float network, what ranges are found on, and what files are compared on.

    `train` is what QAT and the adaptation see, and `build` makes the same network of either Keras;
    without them, there is neither.
    """

    model: keras.Model
    calibration: np.ndarray
    test: Samples
    train: Samples | None = None
    build: Callable[[ModuleType], Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A `.tflite` and the processor's seconds that making it took."""

    blob: bytes
    seconds: float


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints tables and writes results.json; returns what it holds."""
    options = _parser().parse_args(arguments)
    running.start(options)
    if importlib.util.find_spec("litert_quantizer") is None:
        print("litert-quantizer is not installed, and left out")
    found = {}
    for name in options.task:
        task = _fake() if options.smoke else TASKS[name]()
        epochs, rounds = (1, 2) if options.smoke else (EPOCHS, ROUNDS)
        found[name] = compare(task, epochs, rounds)
    results = running.save_results(options, "peers", {"tasks": found}, package="benchmarks")
    running.show(tables(results))
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the benchmark prints, from what results.json holds."""
    header = ("", "accuracy", "SQNR", "bytes", "ops", "arena", "latency", "seconds")
    return [
        Table(name, header, [_cells(*file) for file in files.items()], LEGEND)
        for name, files in results["tasks"].items()
    ]


def compare(task: Task, epochs: int, rounds: int) -> dict[str, dict[str, Any]]:
    """What is said of every file made of one network."""
    if task.train is not None:
        _fit(task.model, task.train, epochs)
    files = _post_training(task)
    if task.train is not None and task.build is not None:
        files |= _trained(task, task.train, task.build(tf_keras), epochs)
    expected = running.keras_outputs(task.model, task.test[0])
    measured = latencies({name: file.blob for name, file in files.items()}, rounds)
    results = {}
    for name, file in files.items():
        (outputs,) = running.predict(file.blob, [task.test[0]])
        is_ptq = name in (KQAT_PTQ, CONVERTER, LITERT)
        results[name] = {
            **_measured(file, outputs, task.test[1]),
            # What was trained on is another function by now, and its distance no noise.
            "sqnr_db": running.sqnr_db(expected, outputs) if is_ptq else None,
            "latency": dataclasses.asdict(ratio(measured, name, CONVERTER, "processor")),
        }
    return results


def _post_training(task: Task) -> dict[str, File]:
    ptq = kqat.quantize_model(task.model, calibration_data=task.calibration)
    files = {
        FLOAT: _timed(lambda: converter.float_tflite(task.model)),
        KQAT_PTQ: _timed(lambda: tflite_export.convert(ptq)),
        CONVERTER: _timed(lambda: converter.post_training_int8(task.model, task.calibration)),
    }
    if importlib.util.find_spec("litert_quantizer") is not None:
        blob = files[FLOAT].blob
        made = _timed(lambda: _litert_quantizer(blob, task.calibration))
        files[LITERT] = File(blob=made.blob, seconds=made.seconds + files[FLOAT].seconds)
    return files


def _trained(task: Task, train: Samples, legacy: Any, epochs: int) -> dict[str, File]:
    """QAT by kqat and by tfmot; `legacy` is the same network in Keras 2."""
    qat = kqat.quantize_model(task.model, calibration_data=task.calibration)
    _fit(qat, train, epochs, freezing(epochs))
    legacy.set_weights(task.model.get_weights())
    theirs = tfmot_quantize_model(legacy)
    rate = tf_keras.optimizers.schedules.CosineDecay(
        LEARNING_RATE, epochs * -(-len(train[0]) // BATCH_SIZE)
    )
    theirs.compile(tf_keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    x, y = train
    theirs.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs, shuffle=False, verbose=2)
    return {
        KQAT_QAT: _timed(lambda: tflite_export.convert(qat)),
        TFMOT: _timed(lambda: tfmot_qat.convert(theirs)),
    }


def _fit(
    model: keras.Model,
    train: Samples,
    epochs: int,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> None:
    # In the order that tfmot's Keras will see too.
    fit(
        model,
        train,
        epochs,
        LEARNING_RATE,
        batch_size=BATCH_SIZE,
        callbacks=callbacks,
        shuffle=False,
    )


def _timed(make: Callable[[], bytes]) -> File:
    start = Seconds.now()
    blob = make()
    return File(blob=blob, seconds=Seconds.now().since(start).processor)


def _litert_quantizer(blob: bytes, calibration: np.ndarray) -> bytes:
    """int8 weights and activations by its own recipe, of a float file."""
    from litert_quantizer import quantizer, recipe

    ((signature, ends),) = Interpreter(model_content=blob).get_signature_list().items()
    (name,) = ends["inputs"]
    tool = quantizer.Quantizer(blob, recipe.static_wi8_ai8())
    samples = {signature: [{name: sample[None]} for sample in calibration]}
    return bytes(tool.quantize(tool.calibrate(samples)).quantized_model)


def _measured(file: File, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    return {
        "accuracy": running.accuracy(outputs, labels),
        "file_bytes": len(file.blob),
        "operators": len(flatbuffer.read(file.blob).subgraphs[0].operators),
        "arena_bytes": tflite_micro_arena_bytes(file.blob),
        "conversion_seconds": file.seconds,
    }


def _cells(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    latency = found["latency"]
    return (
        name,
        running.percent(found["accuracy"]),
        "-" if found["sqnr_db"] is None else f"{found['sqnr_db']:.1f}",
        running.counted(found["file_bytes"]),
        str(found["operators"]),
        running.counted(found["arena_bytes"]),
        f"{latency['median']:.2f} ({latency['lower']:.2f}–{latency['upper']:.2f})",
        f"{found['conversion_seconds']:.1f}",
    )


def _ic() -> Task:
    # In a network of Keras 3: the one from the old file takes a list of one, and `fit` warns.
    build = NETWORKS["resnet8"].build
    model = build(keras)
    model.set_weights(data.pretrained("mlperf_tiny/ic").get_weights())
    train = data.cifar10_jpeg("train", count=TRAIN_IMAGES)
    return Task(
        model=model,
        calibration=train[0][:CALIBRATION_SAMPLES],
        test=data.cifar10_jpeg("test", count=TEST_IMAGES),
        train=train,
        build=build,
    )


def _kws() -> Task:
    features, labels = data.kws01()
    return Task(
        model=data.pretrained("mlperf_tiny/kws"),
        calibration=features[:CALIBRATION_SAMPLES],
        test=(features[CALIBRATION_SAMPLES:], labels[CALIBRATION_SAMPLES:]),
    )


def _fake() -> Task:
    random = np.random.default_rng(0)
    (network,) = SMOKE.values()
    x = random.uniform(0, 255, (8, *network.input_shape)).astype(np.float32)
    samples = x, random.integers(0, 10, len(x))
    return Task(
        model=network.build(keras),
        calibration=x,
        test=samples,
        train=samples,
        build=network.build,
    )


TASKS: dict[str, Callable[[], Task]] = {"ic": _ic, "kws": _kws}


def _parser() -> argparse.ArgumentParser:
    parser = running.parser(__doc__, out="out/peers")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    return parser


if __name__ == "__main__":
    main()
