"""Sums over the last axis, weighed by constants, are one FULLY_CONNECTED."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from tests.tflite_export.small_models import operators
from tflite_export import flatbuffer

X = np.random.default_rng(0).normal(size=(64, 6, 8)).astype(np.float32)
PLACES = np.linspace(-1.0, 1.0, 8, dtype=np.float32)


def _model(call: Callable[[Any], Any]) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input(X.shape[1:], name="x")
    return keras.Model(x, call(x))


def _expected_place(x: Any) -> Any:
    """A soft argmax, as of key points in a heat map."""
    return ops.sum(ops.softmax(x) * PLACES, axis=-1)


def _column(x: Any) -> Any:
    return ops.tanh(x) * ops.sum(x, axis=-1, keepdims=True)


def _weighed_mean(x: Any) -> Any:
    return ops.mean(3.0 * x * (PLACES * PLACES), axis=-1, keepdims=True)


def test_the_file_holds_one_kernel_for_each_sum() -> None:
    model = _model(lambda x: [_expected_place(x), _column(x), _weighed_mean(x)])
    qat = kqat.quantize_model(model, calibration_data=X)
    blob = tflite_export.convert(qat)
    found = operators(flatbuffer.read(blob))
    assert found.count("FULLY_CONNECTED") == 3
    # That of the column by the hyperbolic tangent is of two values.
    assert found.count("MUL") == 1 and "MEAN" not in found
    report = tflite_export.verify(qat, blob, X[:16])
    assert all(
        runtime.is_right and runtime.exact and runtime.exact.is_exact for runtime in report.runtimes
    )
    for wanted, got in zip(model(X), qat(X), strict=True):
        error = np.mean((np.asarray(got) - np.asarray(wanted)) ** 2)
        assert error < 1e-3 * np.mean(np.asarray(wanted) ** 2)
    trained = [sum(int(np.size(v)) for v in m.trainable_variables) for m in (model, qat)]
    assert trained == [0, 0]  # The constants are the user's.


@pytest.mark.parametrize(
    ("call", "policy"),
    [
        (_expected_place, "int16x8"),
        (_expected_place, "w4a8"),
        (lambda x: ops.sum(x, axis=-1), "int8"),  # A Reshape would stand behind it.
        (lambda x: L.Dense(3)(ops.sum(x, axis=-1, keepdims=True)), "int8"),  # It takes the count.
        (lambda x: ops.mean(x, axis=-1, keepdims=True), "int8"),
    ],
    ids=["16 bits", "4 bits", "no column", "before a kernel", "mean"],
)
def test_other_sums_stay_means(call: Callable[[Any], Any], policy: str) -> None:
    kinds = [layer.kind for layer in kqat.plan(_model(call), policy).layers]
    assert "Reduce" in kinds


def test_constants_that_others_read_or_of_another_axis_stay_apart() -> None:
    def read_twice(x: Any) -> Any:
        product = x * PLACES
        return ops.sum(product, axis=-1, keepdims=True) + product

    def of_steps(x: Any) -> Any:
        return ops.sum(x * PLACES[:6, None], axis=-1, keepdims=True)

    kinds = [[layer.kind for layer in kqat.plan(_model(f)).layers] for f in (read_twice, of_steps)]
    assert kinds == [["ChannelAffine", "Dense", "Add"], ["WithConstant", "Dense"]]


def test_a_weighed_mean_that_drops_its_axis_has_names_of_its_own() -> None:
    """It is a Dense and a Reshape, of which one has the mean's name."""
    model = _model(lambda x: ops.mean(x * PLACES, axis=-1))
    qat = kqat.quantize_model(model, calibration_data=X)
    assert len({layer.name for layer in qat.layers}) == len(qat.layers)
    want, got = np.asarray(model(X)), np.asarray(qat(X))
    assert np.mean((got - want) ** 2) < 1e-3 * np.mean(want**2)
