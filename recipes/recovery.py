"""What wins back the accuracy that few bits lose? Twelve methods on six widths of weights.

    python -m recipes.recovery --network resnet20 --out out/recovery_resnet20
    python -m recipes.recovery --network mobilenetv2 --out out/recovery_mobilenetv2

All cells of a table start from the same float weights and get the same images and steps. Learning
rates are those of `kqat.finetune`, by the bits of the weights; float and tfmot get that of 8 bits.
Ranges and statistics of BatchNormalization move to the end, or until --freeze-at.
All layers have the width of the column, the first and the last too, but for the method `ends`;
activations have 8 bits. Images are CIFAR-10 after JPEG: compare these accuracies with each other
only.

resnet20     a pretrained network, adapted to such images in float.
mobilenetv2  the lab's network, trained in float first.

A seed decides which images are calibrated on, and the order and augmentation of those that are
trained on. Each finished cell is a file in --out. Started again, the recipe makes the cells that
are missing, of the --seeds, --widths and --methods that are asked for, and writes results.json of
all that are there after each.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from kqat import algorithms
from kqat.base import save_model, write_file
from recipes import converter, data, running, training
from recipes import mobilenetv2_cifar10 as lab
from recipes.data import Samples
from recipes.models import mobilenet_v2
from recipes.running import Table
from recipes.timing import Seconds

BATCH_SIZE = 32
# One pass over the images is so many epochs of `fit`, so that the callbacks act within it.
PARTS = 4
CALIBRATION_SAMPLES = 256
# The cells of the first seed whose file is verified, and on how many images.
VERIFIED, VERIFIED_SAMPLES = "lsq_plus", 2
WIDTH, SMOKE_WIDTH = 0.35, 0.1
FLOAT_RATE = 3e-4
SMOKE_IMAGES = 32
RESNET20 = "cifar_resnet_keras/resnet20"

WIDTHS = {"w8a8": 8, "w4a8": 4, "w3a8": 3, "w2a8": 2, "ternary": 2, "binary": 1}
# The most that accuracy may fall below float, in points, by network and width.
BOUNDS = {
    "resnet20": {"w8a8": 0.0, "w4a8": 0.3, "w3a8": 1.5, "ternary": 3.0},
    "mobilenetv2": {"w8a8": 0.0, "w4a8": 0.3, "w3a8": 1.5, "ternary": 8.0},
}
FLOAT = "float, trained further"
# Accuracies on CIFAR-10's lossless test images, by network.
PUBLISHED = {
    "resnet20": (
        ("PACT, 5 bits", "91.6 %"),
        ("PACT, 4 bits", "90.8 %"),
        ("PACT, 3 bits", "90.6 %"),
        ("PACT, 2 bits", "88.9 %"),
    )
}
PUBLISHED_LEGEND = """published  Choi et al. 2018, as the repository KwangHoonAn/PACT quotes their
           table 2. Activations have as few bits as weights there, and images
           are lossless, so only the differences between widths compare"""
LEGEND = """\
cells         accuracy of the file on LiteRT (XNNPACK), mean over the seeds, and
              from the least to the greatest where there are more than one;
              "refused": kqat raises an error that says why, see below
further       the float network after the same training as the cells: what more
              training alone gains. Gaps are to the better of the two float ones
minmax        weights by their largest value, activations by minimum and maximum
best          calibration="auto", steps of least squared error (ternary, binary:
              TWN, XNOR), equalization, AdaRound (not binary), bias correction
average       QAT, weights as in minmax, activations by a moving average
LSQ           QAT, learned steps (ternary: TTQ), activations by moving average
LSQ+, PACT    LSQ, with activations by LSQ+ or PACT (binary: XNOR weights)
distillation  the float network as teacher, of LSQ (binary: XNOR) or of average
dampening     weights are drawn to the middle of their steps while they train;
              statistics of BatchNormalization are estimated again behind it
ends          the first and the last layer have weights of 8 bits, as is usual
              where few bits are published (Esser et al. 2020)
tfmot         its 8-bit QAT in Keras 2, with the same weights, batches and rates
falling       LSQ; a quarter of the steps with 8 bits, one with 6 (or both parts
              with 8), the rest with the column's
within        whether the best gap is within the bound that was set for it
lockstep      of the file of LSQ+ with the first seed: largest difference of any
              operator from the Keras model, in output steps, on LiteRT
              (reference kernels and XNNPACK) and TFLite Micro"""


class _Refused(Exception):
    """A method does not take a width; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """A float network and its data: images in 0..255 to train on, scaled ones to test on."""

    model: keras.Model
    train: Samples
    test: Samples
    scaled_as: str | None  # the pretrained model that sees pixels so; else `training.scaled`
    kind: str  # of the outputs, as `kqat.Distiller` names it

    def scale(self, images: np.ndarray) -> np.ndarray:
        """Images in 0..255 as the network takes them."""
        return _scaled(self.scaled_as, images)

    def calibration(self, seed: int) -> np.ndarray:
        chosen = np.random.default_rng(seed).permutation(len(self.train[1]))
        return self.scale(self.train[0][np.sort(chosen[:CALIBRATION_SAMPLES])])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    _check_options(options)
    task = NETWORKS[options.network](options)
    _cell(options, "float", lambda: {"accuracy": _float_accuracy(task.model, task)})
    results = _results(options, task)
    for seed in options.seeds:
        _cell(options, f"further_{seed}", functools.partial(_further, task, seed, options))
        for width in options.widths:
            for method in options.methods:
                make = functools.partial(_measured, task, width, method, seed, options)
                _cell(options, f"{width}_{method}_{seed}", make)
                results = _results(options, task)
    running.show(tables(results))
    print(f"\nWritten to {options.out}")
    return results


def _cell(options: argparse.Namespace, name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Makes a cell's file, unless it is there."""
    path = options.out / "cells" / f"{name}.json"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    start = Seconds.now()
    found = make()
    found["processor_seconds"] = Seconds.now().since(start).processor
    write_file(path, json.dumps(found, indent=1).encode())
    print(f"{name}: {found.get('accuracy', 'refused')}", flush=True)
    keras.backend.clear_session()
    gc.collect()


def _results(options: argparse.Namespace, task: _Task) -> dict[str, Any]:
    """Writes results.json of all cells that there are, with the options that make them all."""
    files = sorted((options.out / "cells").glob("*.json"))
    cells = {path.stem: json.loads(path.read_text()) for path in files}
    every = argparse.Namespace(**vars(options))
    every.widths = [w for w in WIDTHS if any(name.startswith(f"{w}_") for name in cells)]
    made = {name.rpartition("_")[0] for name in cells}
    every.methods = [m for m in METHODS if any(f"{w}_{m}" in made for w in WIDTHS)]
    every.seeds = sorted({int(n.rpartition("_")[2]) for n in cells if n != "float"})
    found = {
        "test_images": len(task.test[1]),
        "steps": len(_batches(task, 0, options)) * PARTS * options.epochs,
        "cells": cells,
    }
    return running.save_results(every, "recovery", found)


# How the QAT models are made.


def _config(width: str, step: str, activation_range: str = "moving_average") -> Any:
    bits = WIDTHS[width]
    weights = kqat.QuantSpec(bits=bits, symmetric=True, narrow_range=bits > 1, axis="channel")
    return kqat.QuantizeConfig(weights=weights, weight_step=step, activation_range=activation_range)


def _plain_step(width: str, usual: str) -> str:
    return {"ternary": "ternary", "binary": "binary"}.get(width, usual)


def _learned_step(width: str) -> str:
    return {"ternary": "ttq"}.get(width, "lsq")


def _step_beside(width: str) -> str:
    """The weights' method where something else is learned beside them."""
    return "binary" if width == "binary" else _learned_step(width)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a method needs."""

    task: _Task
    width: str
    seed: int
    options: argparse.Namespace

    def quantized(self, config: Any, calibration: Any = None) -> keras.Model:
        return kqat.quantize_model(
            self.task.model,
            config,
            calibration_data=self.task.calibration(self.seed),
            calibration=calibration,
        )

    def trained(self, config: Any) -> keras.Model:
        qat = self.quantized(config)
        _fit(qat, self.task, self.seed, self.options)
        return qat


def _ptq_minmax(run: _Run) -> keras.Model:
    return run.quantized(_config(run.width, _plain_step(run.width, "max_abs")), "minmax")


def _ptq_best(run: _Run) -> keras.Model:
    qat = run.quantized(_config(run.width, _plain_step(run.width, "mse")))
    images = run.task.calibration(run.seed)
    qat = algorithms.equalize(qat, images)
    if run.width != "binary":
        qat = algorithms.adaround(qat, images, iterations=run.options.iterations)
    return algorithms.correct_biases(qat, images)


def _average(run: _Run) -> keras.Model:
    return run.trained(_config(run.width, _plain_step(run.width, "max_abs")))


def _lsq(run: _Run) -> keras.Model:
    return run.trained(_config(run.width, _learned_step(run.width)))


def _lsq_plus(run: _Run) -> keras.Model:
    return run.trained(_config(run.width, _step_beside(run.width), "lsq_plus"))


def _pact(run: _Run) -> keras.Model:
    return run.trained(_config(run.width, _step_beside(run.width), "pact"))


def _distillation(run: _Run) -> keras.Model:
    return _taught(run, _config(run.width, _step_beside(run.width)))


def _distilled_average(run: _Run) -> keras.Model:
    return _taught(run, _config(run.width, _plain_step(run.width, "max_abs")))


def _dampened(run: _Run) -> keras.Model:
    config = _config(run.width, _plain_step(run.width, "max_abs"))
    qat = _taught(run, config, kqat.DampenOscillations())
    kqat.reestimate_batchnorm(qat, run.task.calibration(run.seed))
    return qat


def _ends(run: _Run) -> keras.Model:
    kernels = [
        layer.name
        for layer in run.task.model.layers
        if any(len(weight.shape) > 1 for weight in layer.trainable_weights)
    ]
    config = _config(run.width, _plain_step(run.width, "max_abs"))
    return _taught(run, {kernels[0]: "int8", kernels[-1]: "int8", "*": config})


def _taught(run: _Run, config: Any, *callbacks: keras.callbacks.Callback) -> keras.Model:
    qat = run.quantized(config)
    teacher = keras.models.clone_model(run.task.model)
    teacher.set_weights(run.task.model.get_weights())
    distiller = kqat.Distiller(qat, teacher, kind=run.task.kind)
    _fit(distiller, run.task, run.seed, run.options, callbacks=callbacks)
    return qat


def _falling(run: _Run) -> keras.Model:
    qat = run.quantized(_config(run.width, _learned_step(run.width)))
    falling = kqat.FallingBits((8, 6), epochs=run.options.epochs)
    _fit(qat, run.task, run.seed, run.options, callbacks=[falling])
    return qat


def _tfmot(run: _Run) -> bytes:
    """The file that tfmot makes, in a child process."""
    if run.width != "w8a8":
        raise _Refused("tfmot quantizes to 8 bits only.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(run.task.model, folder / "float.keras")
        np.savez(folder / "samples.npz", images=run.task.train[0], labels=run.task.train[1])
        request = {
            "model": str(folder / "float.keras"),
            "samples": str(folder / "samples.npz"),
            "tflite": str(folder / "model.tflite"),
            "scaled_as": run.task.scaled_as,
            "from_logits": run.task.kind == "logits",
            "batch_size": BATCH_SIZE,
            "parts": PARTS,
            "epochs": run.options.epochs * PARTS,
            "learning_rate": run.options.learning_rate or FLOAT_RATE,
            "seed": run.seed,
        }
        write_file(folder / "request.json", json.dumps(request, indent=1).encode())
        subprocess.run(
            [sys.executable, "-m", "recipes.tfmot_recovery", "--request", folder / "request.json"],
            env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
            check=True,
        )
        return (folder / "model.tflite").read_bytes()


METHODS: dict[str, tuple[str, Callable[[_Run], keras.Model | bytes]]] = {
    "ptq_minmax": ("PTQ, minmax", _ptq_minmax),
    "ptq_best": ("PTQ, best", _ptq_best),
    "average": ("QAT, average", _average),
    "lsq": ("QAT, LSQ", _lsq),
    "lsq_plus": ("QAT, LSQ+", _lsq_plus),
    "pact": ("QAT, PACT", _pact),
    "distillation": ("QAT, distillation", _distillation),
    "distilled_average": ("QAT, average, distillation", _distilled_average),
    "dampened": ("QAT, average, distillation, dampening", _dampened),
    "ends": ("QAT, average, distillation, ends of 8 bits", _ends),
    "falling": ("QAT, falling bits", _falling),
    "tfmot": ("QAT, tfmot", _tfmot),
}


# Training and measuring.


def _batches(task: _Task, seed: int, options: argparse.Namespace) -> training.Batches:
    return training.Batches(
        task.train, batch_size=BATCH_SIZE, seed=seed, scale=task.scale, parts=PARTS
    )


def _fit(
    model: keras.Model,
    task: _Task,
    seed: int,
    options: argparse.Namespace,
    *,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    quantized: bool = True,
) -> None:
    """Trains by the rates of `kqat.finetune`."""
    epochs = options.epochs * PARTS
    source = training.Epochs(_batches(task, seed, options))
    rate = options.learning_rate or FLOAT_RATE
    steps = len(source) * epochs
    schedule: Any = rate
    recipe: list[keras.callbacks.Callback] = []
    if quantized:
        recipe = kqat.finetune_callbacks(
            epochs, learning_rate=options.learning_rate, freeze_at=options.freeze_at
        )
    else:
        warm = max(steps // 10, 1)
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0, steps - warm, warmup_target=rate, warmup_steps=warm
        )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=task.kind == "logits")
    model.compile(keras.optimizers.Adam(schedule), loss)
    model.optimizer.build(model.trainable_variables)  # A step that makes them is traced twice.
    told = keras.callbacks.LambdaCallback(on_epoch_begin=source.begin)
    model.fit(
        source, epochs=epochs, shuffle=False, verbose=0, callbacks=[told, *recipe, *callbacks]
    )


def _further(task: _Task, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    keras.utils.set_random_seed(seed)
    model = keras.models.clone_model(task.model)
    model.set_weights(task.model.get_weights())
    _fit(model, task, seed, options, quantized=False)
    return {"accuracy": _float_accuracy(model, task)}


def _float_accuracy(model: keras.Model, task: _Task) -> float:
    return _file_accuracy(converter.float_tflite(model), task)


def _file_accuracy(blob: bytes, task: _Task) -> float:
    (outputs,) = running.predict(blob, [task.test[0]])
    return running.accuracy(outputs, task.test[1])


def _measured(
    task: _Task, width: str, method: str, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy of the file of a cell; of some also how far its operators are from the model."""
    keras.utils.set_random_seed(seed)
    try:
        made = METHODS[method][1](_Run(task, width, seed, options))
    except _Refused as error:
        return {"refused": str(error)}
    except kqat.KqatError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    blob = made if isinstance(made, bytes) else tflite_export.convert(made, target="litert")
    found: dict[str, Any] = {"accuracy": _file_accuracy(blob, task), "file_bytes": len(blob)}
    if seed == options.seed and method == VERIFIED:
        report = tflite_export.verify(made, blob, task.test[0], samples=VERIFIED_SAMPLES)
        found["lockstep_steps"] = {
            part.runtime: part.max_steps for part in report.runtimes if part.problem is None
        }
    return found


# Tables.


def tables(results: dict[str, Any]) -> list[Table]:
    """Accuracies, the least gaps against their bounds, and the widths that methods refuse."""
    options, cells = results["options"], results["cells"]
    widths = options["widths"]
    methods = options["methods"]
    network = options["network"]
    budget = (
        f"{options['epochs']} x {options['train_images']:,} images, {results['steps']} steps of "
        f"{BATCH_SIZE}, {results['test_images']:,} test images"
    )
    further = _accuracies(cells, "further")
    header = ("", *(f"{w}" for w in widths))
    rows = [
        ("float", running.percent(cells["float"]["accuracy"]), *[""] * (len(widths) - 1)),
        (FLOAT, running.percents(further), *[""] * (len(widths) - 1)),
        *((METHODS[m][0], *(_shown(cells, f"{width}_{m}") for width in widths)) for m in methods),
    ]
    found = [Table(f"{network}, {budget}", header, rows, LEGEND)]
    reference = max([cells["float"]["accuracy"], *([float(np.mean(further))] if further else [])])
    gaps = [_gap_row(cells, network, width, methods, reference) for width in widths]
    found.append(
        Table(
            f"{network}: the best method of each width, in points below float",
            ("", "method", "seeds", "gap", "bound", "within", "lockstep"),
            gaps,
            LEGEND,
        )
    )
    refused = [
        (METHODS[m][0], width, cells[name]["refused"])
        for width in widths
        for m in methods
        for name in sorted(cells)
        if name.rpartition("_")[0] == f"{width}_{m}" and "refused" in cells[name]
    ]
    if refused:
        unique = list(dict.fromkeys(refused))
        found.append(Table(f"{network}: what is refused", ("", "width", "message"), unique))
    if network in PUBLISHED:
        title = f"{network}: published figures"
        found.append(Table(title, ("", "accuracy"), PUBLISHED[network], PUBLISHED_LEGEND))
    return found


def _accuracies(cells: dict[str, Any], name: str) -> list[float]:
    """Of all seeds of a cell."""
    return [
        cell["accuracy"]
        for key, cell in cells.items()
        if key.rpartition("_")[0] == name and "accuracy" in cell
    ]


def _shown(cells: dict[str, Any], name: str) -> str:
    found = _accuracies(cells, name)
    refused = any(k.rpartition("_")[0] == name and "refused" in c for k, c in cells.items())
    return "refused" if refused and not found else running.percents(found)


def _gap_row(
    cells: dict[str, Any], network: str, width: str, methods: Sequence[str], reference: float
) -> tuple[str, ...]:
    means = {m: found for m in methods if (found := _accuracies(cells, f"{width}_{m}"))}
    steps = [
        count
        for name, cell in cells.items()
        if name.startswith(f"{width}_")
        for count in cell.get("lockstep_steps", {}).values()
    ]
    lockstep = running.steps(max(steps)) if steps else "-"
    bound = BOUNDS[network].get(width)
    if not means:
        return (width, "-", "-", "-", "-" if bound is None else f"{bound:.1f}", "-", lockstep)
    best = max(means, key=lambda m: np.mean(means[m]))
    gap = 100 * (reference - float(np.mean(means[best])))
    return (
        width,
        METHODS[best][0],
        str(len(means[best])),
        f"{gap:+.2f}",
        "-" if bound is None else f"{bound:.1f}",
        "-" if bound is None else "yes" if gap <= bound else "no",
        lockstep,
    )


# Networks.


def _resnet20(options: argparse.Namespace) -> _Task:
    model: Any = None
    if options.smoke:
        model = mobilenet_v2(**lab.network(SMOKE_WIDTH, smoke=True))
        logits = model.layers[-1].input
        model = keras.Model(model.inputs, keras.layers.Dense(10)(logits))
    else:
        model = data.pretrained(RESNET20)

    return _trained_task(options, model, RESNET20, "logits", FLOAT_RATE)


def _mobilenetv2(options: argparse.Namespace) -> _Task:
    width = SMOKE_WIDTH if options.smoke else WIDTH
    model = mobilenet_v2(**lab.network(width, smoke=options.smoke))
    return _trained_task(options, model, None, "probabilities", lab.LEARNING_RATE)


def _trained_task(
    options: argparse.Namespace,
    model: keras.Model,
    scaled_as: str | None,
    kind: str,
    learning_rate: float,
) -> _Task:
    """The task, with the float network read back from --out or trained first."""
    wanted = argparse.Namespace(**vars(options))
    wanted.train_images = options.float_images
    train, test = lab.samples(wanted)
    scale = functools.partial(_scaled, scaled_as)
    path = options.out / "float.keras"
    if not path.exists():
        print("float: training", flush=True)
        # `train` takes probabilities; the layers are those of `model`.
        taught = model
        if kind == "logits":
            taught = keras.Model(model.inputs, keras.ops.softmax(model.outputs[0]))
        training.train(
            taught,
            training.Batches(train, seed=options.seed, scale=scale),
            options.out / "float",
            epochs=options.float_epochs,
            learning_rate=learning_rate,
        )
        save_model(model, path)
        training.drop_checkpoints(options.out / "float")
    model = keras.models.load_model(path)
    images, labels = (array[: options.train_images] for array in train)
    x_test, y_test = (array[: options.test_images] for array in test)
    return _Task(
        model=model,
        train=(images, labels),
        test=(scale(x_test), y_test),
        scaled_as=scaled_as,
        kind=kind,
    )


def _scaled(scaled_as: str | None, images: np.ndarray) -> np.ndarray:
    """Images in 0..255 as the pretrained model of that name takes them, or the lab's network."""
    return data.model_input(scaled_as, images) if scaled_as else training.scaled(images)


NETWORKS = {"resnet20": _resnet20, "mobilenetv2": _mobilenetv2}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/recovery")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=1, help="passes of each cell (default 1)")
    parser.add_argument("--train-images", type=int, default=10_000, help="of a pass")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--float-epochs", type=int, default=1, help="in float (default 1)")
    parser.add_argument("--float-images", type=int, default=50_000, help="in float")
    parser.add_argument("--learning-rate", type=float, help="of every cell (default: see above)")
    parser.add_argument(
        "--freeze-at",
        type=float,
        help="share of the steps after which ranges and statistics stay (default: never)",
    )
    parser.add_argument("--iterations", type=int, default=1000, help="of AdaRound")
    options = parser.parse_args(argv)
    if options.smoke:
        options.epochs = options.float_epochs = 1
        options.train_images = options.test_images = options.float_images = SMOKE_IMAGES
        options.iterations = 2
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Refuses to continue in a folder that a run with other options has begun."""
    path: Path = options.out / "options.json"
    # These only say which cells are made now.
    free = ("seeds", "widths", "methods")
    ours = json.dumps({k: v for k, v in running.settings(options).items() if k not in free})
    if path.exists() and path.read_text() != ours:
        raise SystemExit(
            f"Expected the options of {path}: {path.read_text()}. Received: {ours}. Use another "
            "--out, or remove that folder."
        )
    write_file(path, ours.encode())


if __name__ == "__main__":
    main()
