"""Where LayerNormalization subtracts the mean: before the division, behind it, or both.

    python -m benchmarks.normalization

Each row is one LayerNormalization over random rows, calibrated on them. The table has the SQNR in
dB of the QAT model against the float model: as kqat rewrites the layer, which subtracts the mean
twice; as two layers of `keras.ops` that subtract it once, before the division or behind it; and
that of the file which TensorFlow's converter makes of the layer (post-training int8).
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

import kqat
from recipes import converter
from recipes.timing import print_table

STEPS, EPSILON = 16, 1e-5
# Mean, channels, and the deviations that rows have in turn.
CELLS: tuple[tuple[float, int, tuple[float, ...]], ...] = (
    *((mean, channels, (1.0,)) for mean in (0.0, 10.0, 100.0) for channels in (4, 32, 512)),
    (0.0, 32, (0.2, 1.0)),
    (0.0, 32, (0.1, 0.3, 1.0)),
    (0.0, 32, (0.07, 0.2, 1.0)),
)
Row = tuple[float, int, tuple[float, ...], float, float, float, float]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints; returns the cell and SQNRs: both, before, behind, the converter's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--cells", type=int, default=len(CELLS), help="how many, from the first on")
    options = parser.parse_args(arguments)
    found: list[Row] = []
    for mean, channels, deviations in CELLS[: options.cells]:
        rng = np.random.default_rng(0)
        scale = np.resize(deviations, STEPS)[:, None]
        x = mean + scale * rng.normal(size=(options.samples, STEPS, channels))
        x = x.astype(np.float32)
        ours = [sqnr_of_qat(call, x) for call in (twice, before, behind)]
        found.append((mean, channels, deviations, *ours, sqnr_of_converter(x)))
    rows = [
        (f"{mean:g}", str(channels), ", ".join(map(str, ends)), *(f"{db:.1f}" for db in dbs))
        for mean, channels, ends, *dbs in found
    ]
    header = "mean", "channels", "deviations", "twice", "before", "behind", "converter"
    print_table(header, rows)
    return found


def twice(x: Any) -> Any:
    """The layer, as kqat rewrites it."""
    return layers.LayerNormalization(epsilon=EPSILON, center=False, scale=False)(x)


def before(x: Any) -> Any:
    """The mean is subtracted before the division."""
    centered = x - ops.mean(x, axis=-1, keepdims=True)
    return centered * ops.rsqrt(ops.mean(centered * centered, axis=-1, keepdims=True) + EPSILON)


def behind(x: Any) -> Any:
    """The mean is subtracted behind the division."""
    centered = x - ops.mean(x, axis=-1, keepdims=True)
    scaled = x * ops.rsqrt(ops.mean(centered * centered, axis=-1, keepdims=True) + EPSILON)
    return scaled - ops.mean(scaled, axis=-1, keepdims=True)


def sqnr_of_qat(call: Callable[[Any], Any], x: np.ndarray) -> float:
    """Of a model of one function, calibrated on the data that it is measured on."""
    model = _model(call, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kqat.CalibrationWarning)
        qat = kqat.quantize_model(model, calibration_data=x)
    return _sqnr(model, x, qat(x, training=False))


def sqnr_of_converter(x: np.ndarray) -> float:
    """Of the file that TensorFlow's converter makes of the layer."""
    model = _model(twice, x)
    blob = converter.post_training_int8_of_many(model, x)
    return _sqnr(model, x, converter.run_signature(blob, model, x))


def _model(call: Callable[[Any], Any], x: np.ndarray) -> keras.Model:
    inputs = keras.Input(x.shape[1:], name="x")
    return keras.Model(inputs, call(inputs), name="normalization")


def _sqnr(model: keras.Model, x: np.ndarray, found: Any) -> float:
    expected = np.asarray(model(x, training=False), np.float64)
    noise = np.mean(np.square(expected - np.asarray(found).reshape(expected.shape)))
    return float(10.0 * np.log10(np.mean(np.square(expected)) / noise))


if __name__ == "__main__":
    main()
