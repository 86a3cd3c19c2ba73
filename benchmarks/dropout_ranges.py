"""What training does to the ranges: batch sizes 1, 8, 32, Dropout 0 to 0.8.

    python -m benchmarks.dropout_ranges
    python -m benchmarks.dropout_ranges --learning-rate 0

A small convolutional network is calibrated and then trained, until its rate is zero. The table has
the SQNR in dB of the QAT model against the float model of the same weights: after calibration,
after `fit`, and after a calibration of the trained model on the same samples. The last two should
be the same: then the ranges followed the weights, and nothing else. At a learning rate of 0 nothing
but the ranges can move, and all three should be the same.
"""

import argparse
import math
import warnings
from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

import kqat
from recipes import running
from recipes.timing import print_table

RATES = (0.0, 0.1, 0.3, 0.5, 0.8)
BATCH_SIZES = (1, 8, 32)


Row = tuple[float, int, float, float, float, bool]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints; returns rate, batch size, the three SQNRs, and whether kqat warns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1024, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=10, help="of training")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam, at first")
    options = parser.parse_args(arguments)
    found: list[Row] = []
    for rate in RATES:
        for size in BATCH_SIZES:
            measured = measure(rate, size, options)
            found.append((rate, size, *measured))
    rows = [
        (f"{r:g}", str(n), *(f"{db:.1f}" for db in dbs), "yes" if warned else "no")
        for r, n, *dbs, warned in found
    ]
    header = "dropout", "batch size", "calibrated", "trained", "calibrated again", "warned"
    print_table(header, rows)
    return found


def measure(
    rate: float, batch_size: int, options: argparse.Namespace
) -> tuple[float, float, float, bool]:
    """SQNR after calibration, after `fit` and after calibration of that; whether kqat warned."""
    samples, epochs = options.samples, options.epochs
    steps = math.ceil(samples / batch_size) * epochs
    learning_rate = keras.optimizers.schedules.CosineDecay(options.learning_rate, steps)
    keras.utils.set_random_seed(0)
    x, y = task(samples)
    model = network(rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kqat.CalibrationWarning)
        qat = kqat.quantize_model(model, calibration_data=x)
        before = sqnr(qat, x)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        qat.compile(keras.optimizers.Adam(learning_rate), loss)
        qat.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0)
        after = sqnr(qat, x)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", kqat.CalibrationWarning)
            kqat.freeze(qat)
        warned = any("Dropout or noise" in str(warning.message) for warning in told)
        kqat.calibrate(qat, x)
        return before, after, sqnr(qat, x), warned


def task(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise of shape `(samples, 10, 10, 3)`, and something to learn: the brightest of ten parts."""
    draw = np.random.default_rng(0)
    x = draw.uniform(-1, 1, (samples, 10, 10, 3)).astype(np.float32)
    return x, x.reshape(samples, 10, -1).mean(axis=-1).argmax(axis=-1)


def network(rate: float) -> keras.Model:
    """Two convolutions with Dropout of `rate` behind each, and a Dense layer."""
    return keras.Sequential(
        [
            keras.Input((10, 10, 3)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Dropout(rate),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Dropout(rate),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def sqnr(qat: keras.Model, x: np.ndarray) -> float:
    """Of the QAT model against the float model of the same weights."""
    want = kqat.strip(qat).predict(x, verbose=0)
    return running.sqnr_db(want, qat.predict(x, verbose=0))


if __name__ == "__main__":
    main()
