"""Weights of one to four bits in the file: the integers that were trained, in lockstep."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.config.layer_config import PRESETS
from tests.tflite_export.file_weights import file_integers

LOW = [name for name, config in PRESETS.items() if next(config.weight_items())[1].bits < 8]
RNG = np.random.default_rng(0)


def cnn() -> keras.Model:
    chain = [
        layers.Conv2D(6, 3, use_bias=False, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.GlobalAveragePooling2D(name="pool"),
        layers.Dense(4, name="head"),
    ]
    return keras.Sequential([keras.Input((8, 8, 3), name="image"), *chain], name="cnn")


def mlp() -> keras.Model:
    chain = [layers.Dense(16, activation="relu", name="hidden"), layers.Dense(4, name="head")]
    return keras.Sequential([keras.Input((12,), name="x"), *chain], name="mlp")


def trained(model: keras.Model, policy: Any) -> tuple[keras.Model, np.ndarray]:
    x = RNG.normal(size=(32, *model.input_shape[1:])).astype(np.float32)
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    qat.compile(keras.optimizers.SGD(0.02), "mse")
    qat.fit(x, RNG.normal(size=(32, 4)), verbose=0)
    return qat, x


CASES = [
    ("w4a8", cnn, None),
    *(pytest.param(p, cnn, None, marks=pytest.mark.slow) for p in LOW if p != "w4a8"),
    ("w2a8", mlp, "litert"),
    ("binary", mlp, "tflite_micro"),
]


@pytest.mark.parametrize(("preset", "make", "target"), CASES)
def test_trained_is_shipped_in_lockstep(preset: str, make: Any, target: str | None) -> None:
    qat, x = trained(make(), preset)
    frozen = kqat.freeze(qat)
    blob = tflite_export.convert(frozen, target=target)
    for integers, weight in zip(file_integers(blob), frozen.weights, strict=True):
        ours = weight.integers
        if ours.shape[-1] > 1:  # The file has the output channels of all but depthwise in front.
            ours = np.moveaxis(ours, -1, 0)
        np.testing.assert_array_equal(integers, ours.reshape(-1))
    runtimes = tflite_export.RUNTIMES if target is None else (target,)
    report = tflite_export.verify(frozen, blob, x, runtimes=runtimes)
    # One step: kernels round twice where float arithmetic rounds once.
    found = [(part.problem, part.max_steps <= 1) for part in report.runtimes]
    assert found == [(None, True)] * len(runtimes)
    assert report.is_full_integer


@pytest.mark.slow
def test_precisions_mix_by_layer() -> None:
    policy = {"conv": "binary", "depthwise": "ternary", "head": "w3a8"}
    qat, x = trained(cnn(), policy)
    frozen = kqat.freeze(qat)
    assert [weight.bits for weight in frozen.weights] == [1, 2, 3]
    values = [set(np.unique(w.integers).tolist()) for w in frozen.weights]
    assert values[0] == {-1, 1}
    assert values[1] <= {-1, 0, 1}
    assert values[2] <= set(range(-3, 4))
    report = tflite_export.verify(frozen, tflite_export.convert(frozen), x)
    assert [(part.problem, part.max_steps <= 1) for part in report.runtimes] == [(None, True)] * 3
