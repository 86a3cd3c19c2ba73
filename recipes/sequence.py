"""Recurrent networks as full-integer files: an LSTM or a GRU that reads a digit row by row.

    python -m recipes.sequence --network lstm --out out/lstm
    python -m recipes.sequence --network fused_lstm --out out/fused_lstm
    python -m recipes.sequence --network gru --out out/gru

The sequence is an image of MNIST, 28 steps of 28 pixels. A rounding error in a state affects every
step that follows, so recurrent networks are the hard case for eight bits. Each network ships by PTQ
(calibration only) and by QAT: a fused LSTM as one operator, the others step by step.

Writes to --out: model.tflite and model.keras (QAT), report.json (the verification of model.tflite)
and results.json.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat import QuantizeConfig
from recipes import data, running, shipping
from recipes.data import Samples
from recipes.running import Table
from recipes.training import fit

BATCH_SIZE = 64
# The file has operators for every step: more samples would take long and show nothing new.
LOCKSTEP_SAMPLES = 16
LEARNING_RATE = 3e-3
# Low, because the weights need to move by only a few steps of their grids.
QAT_LEARNING_RATE = 3e-4
NETWORKS = {"lstm": layers.LSTM, "gru": layers.GRU, "fused_lstm": layers.LSTM}
POLICIES = {"fused_lstm": {layers.LSTM: QuantizeConfig(recurrence="fused")}}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    train, test = _fake_rows() if options.smoke else digit_rows(options.train_samples)
    model = network(options.network, options.units, *train[0].shape[1:])
    fit(model, train, options.epochs, LEARNING_RATE, batch_size=BATCH_SIZE)
    rows = [running.measure_keras("FP32", model, test)]

    policy = POLICIES.get(options.network, "int8")
    ptq = shipping.ptq(model, train, test, policy=policy, lockstep_samples=LOCKSTEP_SAMPLES)
    rows.append(ptq.row)
    qat = shipping.train_on(
        ptq,
        train,
        test,
        options.qat_epochs,
        QAT_LEARNING_RATE,
        batch_size=BATCH_SIZE,
        lockstep_samples=LOCKSTEP_SAMPLES,
    )
    shipping.write(options, qat, "model")
    found = {
        "test_samples": len(test[1]),
        "float_operators": qat.report.float_operators,
        "rows": running.as_json([*rows, qat.row]),
    }
    results = running.save_results(options, "sequence", found)
    running.show(tables(results))
    print(f"\nWritten to {options.out}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the recipe prints, from what results.json holds."""
    options = results["options"]
    title = (
        f"{options['network']} of {options['units']} units, {results['test_samples']:,} test "
        f"samples, {results['float_operators']} float operators"
    )
    return [running.row_table(title, results["rows"])]


def network(kind: str, units: int, steps: int = 28, features: int = 28) -> keras.Model:
    """One recurrent layer and a classifier: `(steps, features)` to 10 probabilities."""
    inputs = keras.Input((steps, features), name="rows")
    state = NETWORKS[kind](units, name=kind)(inputs)
    outputs = layers.Dense(10, activation="softmax", name="probabilities")(state)
    return keras.Model(inputs, outputs, name=f"{kind}_{units}")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/sequence")
    parser.add_argument("--network", choices=NETWORKS, default="lstm", help="the cell")
    parser.add_argument("--units", type=int, default=32, help="of the cell (default 32)")
    parser.add_argument("--train-samples", type=int, default=20_000, help="(default 20000)")
    parser.add_argument("--epochs", type=int, default=6, help="in float (default 6)")
    parser.add_argument("--qat-epochs", type=int, default=2, help="quantized (default 2)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.epochs = options.qat_epochs = 1
        options.units = 4
    return options


def digit_rows(count: int) -> tuple[Samples, Samples]:
    """MNIST with the rows of an image as steps of a sequence; `count` training images."""
    (x, y), (x_test, y_test) = data.mnist("train"), data.mnist("test")
    return (x[:count, ..., 0], y[:count]), (x_test[..., 0], y_test)


def _fake_rows() -> tuple[Samples, Samples]:
    """One batch for training and one for testing, of two steps."""
    random = np.random.default_rng(0)
    samples = random.random((BATCH_SIZE, 2, 6), np.float32), random.integers(0, 10, BATCH_SIZE)
    return samples, samples


if __name__ == "__main__":
    main()
