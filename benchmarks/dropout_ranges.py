"""What an epoch without learning does to the ranges: batch sizes 1, 8, 32, Dropout 0 to 0.99.

    python -m benchmarks.dropout_ranges

A small convolutional network is calibrated and then trained for one epoch at learning rate 0, so
that nothing but the ranges can move. The table has the SQNR of the QAT model against the float
model in dB, after calibration and after the epoch: they should be the same.
"""

import argparse
import warnings
from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

import kqat
from recipes import running
from recipes.timing import print_table

RATES = (0.0, 0.5, 0.8, 0.99)
BATCH_SIZES = (1, 8, 32)


def main(arguments: Sequence[str] | None = None) -> list[tuple[float, int, float, float]]:
    """Measures and prints; returns rate, batch size, and SQNR before and after."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=256, help="in an epoch")
    samples = parser.parse_args(arguments).samples
    found = [(rate, size, *measure(rate, size, samples)) for rate in RATES for size in BATCH_SIZES]
    rows = [(f"{rate:g}", str(size), f"{a:.1f}", f"{b:.1f}") for rate, size, a, b in found]
    print_table(("dropout", "batch size", "calibrated", "after an epoch"), rows)
    return found


def measure(rate: float, batch_size: int, samples: int) -> tuple[float, float]:
    """SQNR of the QAT model after calibration, and after an epoch at learning rate 0."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).uniform(-1, 1, (samples, 10, 10, 3)).astype(np.float32)
    model = keras.Sequential(
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
    want = model.predict(x, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kqat.CalibrationWarning)
        qat = kqat.quantize_model(model, calibration_data=x)
    before = running.sqnr_db(want, qat.predict(x, verbose=0))
    qat.compile(keras.optimizers.SGD(0.0), "mse")
    qat.fit(x, want, batch_size=batch_size, verbose=0)
    return before, running.sqnr_db(want, qat.predict(x, verbose=0))


if __name__ == "__main__":
    main()
