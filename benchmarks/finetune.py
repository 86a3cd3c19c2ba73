"""Recipes for the epochs of QAT, on small data: the evidence for the defaults of `kqat.finetune`.

    python -m benchmarks.finetune --minutes 7

Writes `benchmarks/finetune.json` after each run, and `finetune.md` beside it. Runs that the JSON
holds are not measured again, so that many short calls make the table; remove the file to begin
anew. A run is one task, one preset, one recipe and one seed, which shuffles the training data.
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
PRESETS = ("w4a8", "w2a8", "int8")


class Task(NamedTuple):
    """A trained float model with training and test data, pixels as it takes them."""

    model: keras.Model
    train: data.Samples
    test: data.Samples


class Recipe(NamedTuple):
    """One way to train.

    Attributes:
        rate: the learning rate, the highest or the only one.
        cosine: whether it rises and falls; else it is constant.
        warm_up: the share of all steps in which it rises.
        freeze_at: the epoch from which statistics and ranges stay, or `None`.
        reestimates: whether the statistics are estimated anew at the end.
    """

    rate: float
    cosine: bool = True
    warm_up: float = 0.1
    freeze_at: int | None = None
    reestimates: bool = False


RECIPES: dict[str, Recipe | None] = {
    "no training": None,
    "constant 1e-4": Recipe(1e-4, cosine=False),
    "constant 1e-3": Recipe(1e-3, cosine=False),
    "cosine 1e-4": Recipe(1e-4),
    "cosine 3e-4": Recipe(3e-4),
    "cosine 3e-4, frozen from epoch 2": Recipe(3e-4, freeze_at=2),
    "cosine 3e-4, re-estimated": Recipe(3e-4, reestimates=True),
    "cosine 1e-3": Recipe(1e-3),
    "cosine 3e-3": Recipe(3e-3),
    "cosine 1e-3, no warm-up": Recipe(1e-3, warm_up=0.0),
    "cosine 1e-3, frozen from epoch 0": Recipe(1e-3, freeze_at=0),
    "cosine 1e-3, frozen from epoch 2": Recipe(1e-3, freeze_at=2),
    "cosine 1e-3, frozen from epoch 3": Recipe(1e-3, freeze_at=3),
    "cosine 1e-3, re-estimated": Recipe(1e-3, reestimates=True),
}
NEVER = 10**6


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures for some minutes, prints the table and writes it."""
    options = _parser().parse_args(arguments)
    found: dict[str, dict[str, list[float]]] = {}
    if options.out.exists() and not options.smoke:
        found = json.loads(options.out.read_text())
    deadline = time.monotonic() + 60.0 * options.minutes
    presets, recipes, seeds = PRESETS, tuple(RECIPES), SEEDS
    if options.smoke:
        presets, seeds = ("w4a8",), (0,)
        recipes = ("no training", "cosine 1e-3, frozen from epoch 2", "cosine 1e-3, re-estimated")
    for name in options.tasks:
        task = TASKS[name](options.smoke)
        cells = found.setdefault(name, {})
        cells["float"] = [float(_compiled(task.model).evaluate(*task.test, verbose=0)[1])]
        for preset in presets:
            bench = _Bench(task, preset)
            for seed in seeds:
                for recipe in recipes:
                    runs = cells.setdefault(f"{preset}: {recipe}", [])
                    done = len(runs) > seed or (RECIPES[recipe] is None and runs)
                    if done or time.monotonic() > deadline:
                        continue
                    runs.append(bench.accuracy(RECIPES[recipe], seed))
                    write_file(options.out, json.dumps(found, indent=1).encode())
    text = as_markdown(found)
    write_file(options.out.with_suffix(".md"), text.encode())
    print(text)
    return found


class _Bench:
    """A calibrated model that every recipe starts from; it is compiled and traced once.

    All recipes have the callbacks that freeze, which freeze in a later epoch than there is where
    the recipe never does: they read a flag, and so share one training step.
    """

    def __init__(self, task: Task, preset: str) -> None:
        self.task = task
        self.qat = _compiled(
            kqat.quantize_model(task.model, preset, calibration_data=task.train[0][:256])
        )
        self._train(Recipe(1e-3), 1)  # Traces, and makes the flags and the optimizer's variables.
        self._thaw()
        start = kqat.quantize_model(task.model, preset, calibration_data=task.train[0][:256])
        self.start = [v.numpy() for v in start.variables]

    def accuracy(self, recipe: Recipe | None, seed: int) -> float:
        """The test accuracy after a recipe."""
        keras.utils.set_random_seed(seed)
        for variable, value in zip(self.qat.variables, self.start, strict=True):
            variable.assign(value)
        for variable in self.qat.optimizer.variables:
            variable.assign(keras.ops.zeros_like(variable))
        self._thaw()
        if recipe is not None:
            self._train(recipe, EPOCHS)
        return float(self.qat.evaluate(*self.task.test, verbose=0)[1])

    def _train(self, recipe: Recipe, epochs: int) -> None:
        freeze_at = NEVER if recipe.freeze_at is None else recipe.freeze_at
        callbacks: list[Any] = [kqat.FreezeBatchNorm(freeze_at), kqat.FreezeObservers(freeze_at)]
        if recipe.cosine:
            callbacks.append(kqat.WarmUpCosine(recipe.rate, warm_up=recipe.warm_up))
        else:
            self.qat.optimizer.learning_rate = recipe.rate
        if recipe.reestimates:
            callbacks.append(kqat.ReestimateBatchNorm(self.task.train[0][:512]))
        self.qat.fit(*self.task.train, batch_size=32, epochs=epochs, verbose=0, callbacks=callbacks)

    def _thaw(self) -> None:
        for layer in self.qat.layers:
            if isinstance(layer, kqat.QuantizeWrapper | kqat.ActivationQuantizer):
                if isinstance(layer, kqat.QuantizeWrapper):
                    layer.freeze_statistics = False
                else:
                    layer.frozen = False
                if layer.controls.frozen is not None:
                    layer.controls.frozen.assign(0.0)


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
    few = f", n = {len(runs)}" if len(runs) < len(SEEDS) and RECIPES[recipe] else ""
    return f"{100 * np.mean(runs):.2f} ({100 * np.ptp(runs):.2f}{few})"


def _compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    return model


def _digits(smoke: bool) -> Task:
    """Scikit-learn's digits, 8×8, with noise that makes them hard enough to tell recipes apart."""
    parts = data.digits()
    x, y = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    generator = np.random.default_rng(0)
    order = generator.permutation(len(x))
    x = (x + generator.normal(0.0, 0.2, x.shape)).astype(np.float32)
    (x, x_test), (y, y_test) = ((part[order[:896]], part[order[896:]]) for part in (x, y))
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
    _compiled(model).fit(x, y, batch_size=32, epochs=1 if smoke else 20, verbose=0)
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
