"""Transformers as full-integer files: digits as patches, or questions as words.

    python -m recipes.transformer --network vit --out out/vit
    python -m recipes.transformer --network text --out out/text

`vit` reads MNIST's images as 16 patches. `text` classifies TREC's questions into six kinds by their
first 16 words. Both have two attention blocks. LayerNormalization, GELU and softmax are integers in
the file, like all other layers. Each network ships by PTQ (calibration only), by PTQ after
SmoothQuant, and by QAT.

Writes to --out: model.tflite and model.keras (QAT), report.json (the verification of model.tflite)
and results.json.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

import kqat
from recipes import data, running, shipping
from recipes.data import Samples
from recipes.models import text_transformer, vit
from recipes.running import Table
from recipes.training import fit

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
# Low, because the weights need to move by only a few steps of their grids.
QAT_LEARNING_RATE = 2e-4

STEPS = 16
# Rarer words share number 1; 0 fills short questions.
VOCABULARY = 2000
CLASSES = {"vit": 10, "text": 6}


class _Task(NamedTuple):
    """A network and its samples (train, test)."""

    build: Callable[[], keras.Model]
    samples: Callable[[int], tuple[Samples, Samples]]
    epochs: int


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    task = TASKS[options.network]
    model = task.build()
    train, test = _fake(model) if options.smoke else task.samples(options.train_samples)
    fit(model, train, options.epochs or task.epochs, LEARNING_RATE, batch_size=BATCH_SIZE)
    rows = [running.measure_float("FP32", model, test)]

    ptq = shipping.ptq(model, train, test)
    smooth = kqat.training.algorithms.smooth_quant(
        ptq.qat, train[0][: shipping.CALIBRATION_SAMPLES]
    )
    rows += [ptq.row, shipping.measured("PTQ, SmoothQuant", smooth, test).row]
    qat = shipping.train_on(
        ptq, train, test, options.qat_epochs, QAT_LEARNING_RATE, batch_size=BATCH_SIZE
    )
    shipping.write(options, qat, "model")
    found = {
        "test_samples": len(test[1]),
        "float_operators": qat.report.float_operators,
        "rows": running.as_json([*rows, qat.row]),
    }
    results = running.save_results(options, "transformer", found)
    running.show(tables(results))
    print(f"\nWritten to {options.out}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the recipe prints, from what results.json holds."""
    return running.network_tables(results)


def digits(count: int) -> tuple[Samples, Samples]:
    """MNIST: images (n, 28, 28, 1) in [0, 1], with `count` training images."""
    (x, y), test = data.mnist("train"), data.mnist("test")
    return (x[:count], y[:count]), test


def questions(count: int) -> tuple[Samples, Samples]:
    """TREC: questions as word numbers (n, 16), int32, with `count` training questions."""
    table = data.text("trec")
    numbers = vocabulary(table["train"][0])
    train, test = ((encoded(texts, numbers), labels) for texts, labels in table.values())
    order = np.random.default_rng(0).permutation(len(train[1]))[:count]
    return (train[0][order], train[1][order]), test


def vocabulary(texts: Sequence[str]) -> dict[str, int]:
    """The most frequent words -> their numbers, from 2 on."""
    counted = Counter(word for text in texts for word in _words(text))
    return {word: i for i, (word, _) in enumerate(counted.most_common(VOCABULARY - 2), start=2)}


def encoded(texts: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
    """Texts as (n, 16) word numbers, int32: 1 for an unknown word, 0 after the last word."""
    table = np.zeros((len(texts), STEPS), np.int32)
    for row, text in zip(table, texts, strict=True):
        found = [numbers.get(word, 1) for word in _words(text)[:STEPS]]
        row[: len(found)] = found
    return table


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


TASKS = {
    "vit": _Task(vit, digits, 8),
    "text": _Task(lambda: text_transformer(STEPS, VOCABULARY, CLASSES["text"]), questions, 12),
}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/transformer")
    parser.add_argument("--network", choices=TASKS, default="vit")
    parser.add_argument("--epochs", type=int, help="in float (default 8 for vit, 12 for text)")
    parser.add_argument("--qat-epochs", type=int, default=3, help="quantized (default 3)")
    parser.add_argument("--train-samples", type=int, default=20_000, help="at most (default 20000)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.epochs = options.qat_epochs = 1
    return options


def _fake(model: keras.Model) -> tuple[Samples, Samples]:
    """One batch for training and one for testing."""
    random = np.random.default_rng(0)
    shape = (16, *model.input_shape[1:])
    if model.inputs[0].dtype == "int32":
        x = random.integers(0, VOCABULARY, shape, dtype=np.int32)
    else:
        x = random.uniform(0, 1, shape).astype(np.float32)
    batch = x, random.integers(0, model.output_shape[-1], 16)
    return batch, batch


if __name__ == "__main__":
    main()
