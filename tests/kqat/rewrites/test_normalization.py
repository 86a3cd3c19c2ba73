"""LayerNormalization in parts: how much of the signal their roundings leave."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export


def in_one(x: Any) -> Any:
    return L.LayerNormalization(epsilon=1e-5, center=False, scale=False)(x)


def centered_first(x: Any) -> Any:
    """The same function, whose difference is rounded before it is divided."""
    centered = x - ops.mean(x, axis=-1, keepdims=True)
    variance = ops.mean(centered * centered, axis=-1, keepdims=True)
    return centered * ops.rsqrt(variance + 1e-5)


def sqnr(call: Callable[[Any], Any], x: np.ndarray) -> float:
    """Signal over the noise of all roundings, in dB."""
    inputs = keras.Input(x.shape[1:], name="x")
    model = keras.Model(inputs, call(inputs))
    qat = kqat.quantize_model(model, calibration_data=x)
    want = np.asarray(model(x, training=False), np.float64)
    noise = np.mean(np.square(np.asarray(qat(x, training=False)) - want))
    return float(10.0 * np.log10(np.mean(np.square(want)) / noise))


@pytest.mark.parametrize("deviations", [(0.2, 1.0), (0.1, 0.3, 1.0)])
def test_rows_of_small_values_keep_their_signal_beside_others(
    deviations: tuple[float, ...],
) -> None:
    rng = np.random.default_rng(0)
    rows = np.resize(deviations, 16)[:, None]
    x = (rng.normal(size=(256, 16, 32)) * rows).astype(np.float32)
    # benchmarks/normalization.md has 1.3 and 0.3 dB between them.
    assert sqnr(in_one, x) > sqnr(centered_first, x) + 0.2


def test_rows_alike_lose_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(64, 16, 32)).astype(np.float32)
    assert sqnr(in_one, x) > sqnr(centered_first, x) - 0.3


def test_rows_whose_mean_is_all_but_zero_stay_within_a_step() -> None:
    """A second normalization reads rows of mean zero, whose mean has no range to speak of."""
    rows = keras.Input((6, 16), name="rows")
    y = L.LayerNormalization(epsilon=1e-5, name="first")(rows)
    y = L.LayerNormalization(epsilon=1e-5, name="second")(y)
    model = keras.Model(rows, L.Dense(4, name="head")(y))
    x = np.random.default_rng(0).normal(size=(32, 6, 16)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    report = tflite_export.verify(qat, tflite_export.convert(qat), x, samples=4)
    assert all(part.problem is None and part.max_steps <= 1 for part in report.runtimes)


@pytest.mark.parametrize(
    ("mean", "channels", "gain"), [(10.0, 4, 0.5), (10.0, 32, 0.3), (100.0, 64, 2.0)]
)
def test_rows_of_a_large_mean_lose_little(mean: float, channels: int, gain: float) -> None:
    """The error of rounding the mean is taken off behind the division, as far as 16 steps."""
    x = np.random.default_rng(0).normal(mean, 1.0, (64, 16, channels)).astype(np.float32)
    # Most of what benchmarks/normalization.md has between them.
    assert sqnr(in_one, x) > sqnr(centered_first, x) + gain


def test_rows_of_unlike_means_lose_little() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 16, 32)) + rng.normal(0, 10, (64, 16, 1))).astype(np.float32)
    assert sqnr(in_one, x) > sqnr(centered_first, x) + 2.0


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        ((8,), lambda x: ops.normalize(x, axis=1)),
        ((8,), L.UnitNormalization(axis=1)),
        ((4, 8), L.UnitNormalization(axis=1)),
        ((4, 6, 3), L.UnitNormalization(axis=[1, 2, 3])),
        ((4, 6, 3), L.UnitNormalization(axis=(-3, -2))),
    ],
)
def test_rows_of_length_one_over_any_axes(shape: tuple[int, ...], call: Any) -> None:
    """The last axis by its number, as in SimCLR, was refused as not the last."""
    x = np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
    # Inputs and outputs that round to their grids leave 38.8 to 40.9 dB. Squares, their sum and
    # its root take 0.9 to 2.2 of them, and 5.2 where a row has 72 values.
    assert sqnr(call, x) > 33


def test_normalization_over_samples_is_refused() -> None:
    x = keras.Input((4,))
    with pytest.raises(kqat.UnsupportedLayerError, match="within each sample in layer 'norm'"):
        kqat.plan(keras.Model(x, L.UnitNormalization(axis=0, name="norm")(x)))
