"""Recipes for the epochs of QAT, on small data: the evidence for the defaults of `kqat.finetune`.

    python -m benchmarks.finetune --minutes 7

Writes `benchmarks/finetune.json` after each run, and `finetune.md` beside it. Runs that the JSON
holds are not measured again, so that many short calls make the table; remove the file to begin
anew. A run is one task, one preset, one recipe and one seed: the seed shuffles the training data.
Every recipe starts from the same calibrated model, trains as many epochs on as many samples, and is
judged by the test accuracy of the QAT model after the last epoch.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

import kqat
from kqat.base import write_file
from recipes import data

OUT = Path(__file__).with_suffix(".json")
EPOCHS = 4
SEEDS = (0, 1, 2)
PRESETS = ("int8", "w4a8", "w2a8")


class Task(NamedTuple):
    """A trained float model with training and test data, pixels as it takes them."""

    model: keras.Model
    train: data.Samples
    test: data.Samples


def _recipe(rate: float, freeze_at: float | None, warm_up: float = 0.1) -> Callable[..., Any]:
    """The recipe of `finetune` with other numbers."""
    return lambda task: kqat.finetune_callbacks(
        EPOCHS, learning_rate=rate, warm_up=warm_up, freeze_at=freeze_at
    )


def _constant(rate: float) -> Callable[[Task], list[Any]]:
    return lambda task: [
        keras.callbacks.LearningRateScheduler(lambda epoch, now: rate),
    ]


# Name -> what makes its callbacks.
RECIPES: dict[str, Callable[[Task], list[Any]]] = {
    "no training": lambda task: [],
    "constant 1e-4": _constant(1e-4),
    "constant 1e-3": _constant(1e-3),
    "cosine 1e-4": _recipe(1e-4, None),
    "cosine 3e-4": _recipe(3e-4, None),
    "cosine 1e-3": _recipe(1e-3, None),
    "cosine 1e-3, no warm-up": _recipe(1e-3, None, 0.0),
    "cosine 3e-3": _recipe(3e-3, None),
    "1e-3, frozen at 0": _recipe(1e-3, 0.0),
    "1e-3, frozen at 1/2": _recipe(1e-3, 0.5),
    "1e-3, frozen at 3/4": _recipe(1e-3, 0.75),
    "1e-3, re-estimated": lambda task: [
        *_recipe(1e-3, None)(task),
        kqat.ReestimateBatchNorm(task.train[0][:512]),
    ],
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures for some minutes, prints the table and writes it."""
    options = _parser().parse_args(arguments)
    found: dict[str, dict[str, list[float]]] = {}
    if options.out.exists() and not options.smoke:
        found = json.loads(options.out.read_text())
    deadline = time.monotonic() + 60.0 * options.minutes
    presets, recipes = PRESETS, tuple(RECIPES)
    if options.smoke:
        presets, recipes = ("w4a8",), ("no training", "1e-3, frozen at 1/2")
    for name in options.tasks:
        task = TASKS[name](options.smoke)
        _, accuracy = _compiled(task.model).evaluate(*task.test, verbose=0)
        cells = found.setdefault(name, {})
        cells["float"] = [accuracy]
        for seed in (0,) if options.smoke else SEEDS:
            for preset in presets:
                for recipe in recipes:
                    runs = cells.setdefault(f"{preset}: {recipe}", [])
                    if len(runs) > seed or (recipe == "no training" and runs):
                        continue
                    if time.monotonic() > deadline:
                        break
                    runs.append(measure(task, preset, recipe, seed))
                    write_file(options.out, json.dumps(found, indent=1).encode())
    text = as_markdown(found)
    write_file(options.out.with_suffix(".md"), text.encode())
    print(text)
    return found


def measure(task: Task, preset: str, recipe: str, seed: int) -> float:
    """The test accuracy after the recipe."""
    keras.utils.set_random_seed(seed)
    qat = kqat.quantize_model(task.model, preset, calibration_data=task.train[0][:256])
    if recipe != "no training":
        _compiled(qat)
        qat.fit(
            *task.train, batch_size=32, epochs=EPOCHS, verbose=0, callbacks=RECIPES[recipe](task)
        )
    return float(_compiled(qat).evaluate(*task.test, verbose=0)[1])


def as_markdown(found: dict[str, dict[str, list[float]]]) -> str:
    """One table for each task."""
    lines = [
        "# Test accuracy in % after a recipe, mean (spread) over the seeds",
        "",
        "`python -m benchmarks.finetune` writes this file. The spread is that from the least to "
        "the greatest; fewer seeds than three are named.",
    ]
    for name, cells in found.items():
        lines += ["", f"## {name}: float {100 * cells['float'][0]:.2f}", ""]
        lines += [f"| recipe | {' | '.join(PRESETS)} | mean |", "| --- " * (len(PRESETS) + 2) + "|"]
        for recipe in RECIPES:
            some = [cells.get(f"{preset}: {recipe}", []) for preset in PRESETS]
            texts = [_cell(runs, recipe) for runs in some]
            mean = f"{100 * np.mean([np.mean(r) for r in some]):.2f}" if all(some) else "-"
            lines.append(f"| {recipe} | {' | '.join(texts)} | {mean} |")
    return "\n".join(lines) + "\n"


def _cell(runs: Sequence[float], recipe: str) -> str:
    if not runs:
        return "-"
    few = f", n = {len(runs)}" if len(runs) < len(SEEDS) and recipe != "no training" else ""
    return f"{100 * np.mean(runs):.2f} ({100 * np.ptp(runs):.2f}{few})"


def _compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    return model


def _digits(smoke: bool) -> Task:
    """Scikit-learn's digits, 8×8, with noise that makes them hard enough to tell recipes apart."""
    (x, y), (x_test, y_test) = data.digits()
    generator = np.random.default_rng(0)
    x, x_test = (
        (part + generator.normal(0.0, 0.35, part.shape)).astype(np.float32) for part in (x, x_test)
    )
    keras.utils.set_random_seed(0)
    chain: list[Any] = [keras.Input(x.shape[1:])]
    for channels in (16, 32, 32):
        chain += [
            layers.DepthwiseConv2D(3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Conv2D(channels, 1, use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        ]
    model = keras.Sequential([*chain, layers.GlobalAveragePooling2D(), layers.Dense(10)])
    _compiled(model).fit(x, y, batch_size=32, epochs=1 if smoke else 40, verbose=0)
    return Task(model, (x, y), (x_test, y_test))


def _resnet8(smoke: bool) -> Task:
    """MLPerf Tiny's ResNet-8 and 1,024 images of CIFAR-10; 1,000 others judge."""
    name, count = "mlperf_tiny/ic", 32 if smoke else 1024
    float_model = data.pretrained(name)
    float_model.layers[-1].activation = keras.activations.linear
    model = keras.models.clone_model(float_model)
    model.set_weights(float_model.get_weights())
    splits = [
        (data.model_input(name, images), labels)
        for images, labels in (
            data.cifar10_jpeg("train", count=count),
            data.cifar10_jpeg("test", count=min(count, 1000)),
        )
    ]
    return Task(model, splits[0], splits[1])


TASKS: dict[str, Callable[[bool], Task]] = {"digits": _digits, "resnet8": _resnet8}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--minutes", type=float, default=60.0, help="when to stop measuring")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write JSON and table")
    parser.add_argument("--smoke", action="store_true", help="one short run, nothing is kept")
    return parser


if __name__ == "__main__":
    main()
