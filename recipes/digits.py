"""Handwritten digits on a microcontroller: from a float network to a verified int8 `.tflite`.

    python -m recipes.digits --out out/digits

Trains a small network on scikit-learn's digits, quantizes it and ships it twice, to compare:

PTQ  post-training quantization: activation ranges are calibrated on some inputs, without training;
QAT  quantization-aware training: the PTQ model is trained further with its values rounded.

Writes to --out: digits.tflite (QAT), digits.keras (the QAT model, which can be trained further),
plan.json (how every layer is quantized), report.json and report.html (the verification of
digits.tflite) and results.json.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

import kqat
from recipes import data, running, shipping
from recipes.data import Samples
from recipes.models import digits_cnn
from recipes.running import Table
from recipes.training import fit

BATCH_SIZE = 32
LEARNING_RATE = 3e-3
# Low, because the weights need to move by only a few steps of their grids.
QAT_LEARNING_RATE = 3e-4


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    train, test = _fake_digits() if options.smoke else data.digits()

    model = digits_cnn()
    print(f"Training '{model.name}', {model.count_params():,} parameters, in float")
    fit(model, train, options.epochs, LEARNING_RATE, batch_size=BATCH_SIZE)
    rows = [running.measure_float("FP32", model, test)]

    whole = len(test[0])
    ptq = shipping.ptq(model, train, test, lockstep_samples=whole)
    rows.append(ptq.row)
    qat = shipping.train_on(
        ptq,
        train,
        test,
        options.qat_epochs,
        QAT_LEARNING_RATE,
        batch_size=BATCH_SIZE,
        lockstep_samples=whole,
    )
    shipping.write(options, qat, "digits")
    qat.report.save_html(options.out / "report.html")
    kqat.plan(model).save(options.out / "plan.json")
    found = {"test_images": whole, "rows": running.as_json([*rows, qat.row])}
    results = running.save_results(options, "digits", found)
    running.show(tables(results))
    print(f"\nWritten to {options.out}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the recipe prints, from what results.json holds."""
    return [running.row_table(f"{results['test_images']} images", results["rows"])]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/digits", reads_data=False)
    parser.add_argument("--epochs", type=int, default=15, help="in float (default 15)")
    parser.add_argument("--qat-epochs", type=int, default=4, help="quantized (default 4)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.epochs = options.qat_epochs = 1
    return options


def _fake_digits() -> tuple[Samples, Samples]:
    """Two batches for training, so that their order counts, and one of them for testing."""
    random = np.random.default_rng(0)
    x = random.random((2 * BATCH_SIZE, 8, 8, 1), np.float32)
    y = random.integers(0, 10, 2 * BATCH_SIZE)
    return (x, y), (x[:BATCH_SIZE], y[:BATCH_SIZE])


if __name__ == "__main__":
    main()
