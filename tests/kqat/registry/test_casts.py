"""`keras.ops.cast` between quantities, indexes and truth values."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from kqat.graph.tracer import rebuild, trace
from kqat.planning.expansion import expand
from recipes import running

STEPS = 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, STEPS, 8)).astype(np.float32)
SHOWN = (np.arange(STEPS) < RNG.integers(2, STEPS + 1, (32, 1))).astype(np.int32)


def hidden_scores(x: Any, shown: Any) -> Any:
    """The mask that everybody writes by hand."""
    scores = ops.matmul(x, ops.transpose(x, (0, 2, 1))) * 0.3
    return ops.softmax(scores + (1.0 - ops.cast(shown, "float32"))[:, None, :] * -1e9)


def mean_of_shown(x: Any, shown: Any) -> Any:
    """A mean over the steps that are shown."""
    weights = ops.cast(shown, x.dtype)[..., None]
    return ops.sum(x * weights, axis=1) / ops.maximum(ops.sum(weights, axis=1), 1.0)


def truth_and_back(x: Any, shown: Any) -> Any:
    """Integers as truth values, those as integers, and those as quantities."""
    whole = ops.cast(ops.logical_not(ops.cast(shown, "bool")), "int32")
    return x * ops.cast(whole, "float32")[..., None]


def constant_first(x: Any, shown: Any) -> Any:
    """A constant mask before a tensor."""
    both = ops.logical_and(np.arange(STEPS) > 0, ops.cast(shown, "bool"))
    return x * ops.cast(both, x.dtype)[..., None]


def truth_of_quantities(x: Any, shown: Any) -> Any:
    """Floats as truth values: all but zero, which every grid has."""
    some = ops.cast(ops.relu(x) * ops.cast(shown, x.dtype)[..., None], "bool")
    return ops.where(some, x, 0.25 * x)


CALLS = (hidden_scores, mean_of_shown, truth_and_back, constant_first, truth_of_quantities)


def _model(call: Callable[[Any, Any], Any], mask: str = "int32") -> keras.Model:
    x = keras.Input((STEPS, 8), name="x")
    shown = keras.Input((STEPS,), dtype=mask, name="shown")
    return keras.Model([x, shown], call(x, shown))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_parts_compute_what_the_casts_compute(call: Callable[[Any, Any], Any]) -> None:
    model = _model(call)
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    parts = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    np.testing.assert_allclose(parts([X, SHOWN]), model([X, SHOWN]), rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["int32", "bool"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_casts_ship(call: Callable[[Any, Any], Any], mask: str) -> None:
    model, data = _model(call, mask), [X, SHOWN.astype(mask)]
    qat = kqat.quantize_model(model, calibration_data=data)
    blob = tflite_export.convert(qat)
    assert tflite_export.inspect(blob).inputs[1].dtype == mask
    report = tflite_export.verify(qat, blob, data, samples=4)
    assert report.is_full_integer
    assert all(part.is_right and not part.unmatched for part in report.runtimes)
    expected = np.asarray(model(data))
    noise = np.mean(np.square(expected - np.asarray(qat(data))))
    # Eight bits leave 30 dB and more here; a mask that is lost leaves less than 10.
    assert noise < 10**-2.5 * np.mean(np.square(expected))
    exact = tflite_export.integer_model(blob).predict(data, verbose=0)
    np.testing.assert_array_equal(exact, running.predict(blob, data, runtime="litert")[0])


def test_other_integers_than_zero_and_one_are_refused_in_calibration() -> None:
    with pytest.raises(kqat.CalibrationError, match=r"0 to 1 in input 'shown'.*Received: 5\."):
        kqat.quantize_model(_model(mean_of_shown), calibration_data=[X, 5 * SHOWN])


@pytest.mark.parametrize("wrong", [-1, 10])
def test_an_index_without_a_row_is_refused_in_calibration(wrong: int) -> None:
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    rows = layers.Embedding(10, 8, name="words")(ops.reshape(tokens, (-1, 2, 3)))
    model = keras.Model(tokens, layers.Dense(2)(rows))
    data = np.full((8, STEPS), 3)
    data[5, 2] = wrong
    message = rf"0 to 9 in input 'tokens', as layer 'words'.*Received: {wrong}\."
    with pytest.raises(kqat.CalibrationError, match=message):
        kqat.quantize_model(model, calibration_data=data)


@pytest.mark.parametrize(
    "whole",
    [
        lambda i: ops.clip(i, 2, 9),
        lambda i: ops.minimum(ops.maximum(i - 2, 0), 3),
        lambda i: ops.maximum(5 - i, 0),
        lambda i: ops.clip(i - 5, -3, 4) * ops.clip(i, 1, 2),
        lambda i: ops.clip(i, 0, 9) - ops.clip(i, 3, 5),
        lambda i: ops.clip(ops.sum(i, 1, keepdims=True), 0, 30),
    ],
)
def test_a_table_has_a_row_for_all_that_a_clip_leaves(whole: Callable[[Any], Any]) -> None:
    """An input was taken for zeros and ones before the clip; other integers had no row."""
    integers = keras.Input((STEPS,), dtype="int32")
    model = keras.Model(integers, layers.Dense(3)(ops.cast(whole(integers), "float32")))
    data = np.random.default_rng(0).integers(0, 9, (64, STEPS)).astype(np.int32)
    narrow = kqat.quantize_model(model, calibration_data=data % 2 + 2)
    assert np.isfinite(np.asarray(narrow(data))).all()
    wide = kqat.quantize_model(model, calibration_data=data)
    expected = np.asarray(model(data))
    noise = np.mean(np.square(expected - np.asarray(wide(data))))
    assert noise < 10**-2.5 * np.mean(np.square(expected))
