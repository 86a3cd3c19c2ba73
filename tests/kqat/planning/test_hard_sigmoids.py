"""A hard sigmoid behind a kernel is that kernel's bias and clamp, and one factor."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export

X = np.random.default_rng(0).normal(scale=3.0, size=(32, 6, 6, 4)).astype(np.float32)


def squeezed(x: Any) -> Any:
    gate = L.GlobalAveragePooling2D(keepdims=True)(x)
    gate = L.Conv2D(4, 1)(L.Conv2D(2, 1, activation="relu")(gate))
    return L.Multiply()([x, L.Activation("hard_sigmoid")(gate)])


KINDS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "squeeze and excitation": (squeezed, 0),
    "normalized": (lambda x: keras.ops.hard_sigmoid(L.BatchNormalization()(L.Conv2D(4, 3)(x))), 0),
    "fused": (lambda x: L.Dense(4, "hard_sigmoid")(x), 0),
    # Nothing before it has a bias: a table, as it was.
    "pooled": (lambda x: L.Activation("hard_sigmoid")(L.MaxPooling2D()(x)), 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_carries_it_out(kind: str) -> None:
    call, tables = KINDS[kind]
    keras.utils.set_random_seed(0)
    x = keras.Input(X.shape[1:], name="x")
    model = keras.Model(x, call(x))
    qat = kqat.quantize_model(model, calibration_data=X)
    blob = tflite_export.convert(qat)
    found = Counter(op.name for op in tflite_export.inspect(blob).operators)
    assert found["GATHER"] == tables and found["ADD"] == tables
    report = tflite_export.verify(qat, blob, X, samples=4)
    assert all(part.problem is None and part.max_steps <= 1 for part in report.runtimes)
    want, got = (np.asarray(m(X, training=False), np.float64) for m in (model, qat))
    # Measured: 38.7 to 49.5 dB; the rest is room for weights that other versions draw.
    assert 10 * np.log10(np.mean(want**2) / np.mean((got - want) ** 2)) > 30.0
