"""Calibration: what data may be, and the ranges that they give."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kqat
from kqat import ActivationQuantizer, MinMax, QuantizeConfig
from kqat.graph.tracer import trace
from kqat.planning.planner import make_plan
from kqat.training.build import wrap
from kqat.training.calibration import BATCH_SIZE, calibrate

RNG = np.random.default_rng(0)
# Whole numbers of at most 8 bits, so that the same data can come as bytes.
A = RNG.integers(0, 256, (80, 4)).astype(np.float32)
B = RNG.integers(0, 256, (80, 4)).astype(np.float32)
LABELS = np.zeros(80, np.float32)


def uncalibrated(model: keras.Model, config: QuantizeConfig | None = None) -> keras.Model:
    policy = kqat.QuantizePolicy.of(config or "int8")
    return wrap(make_plan(trace(model), policy, model.name))


def one_input() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,), name="a"),
            layers.Dense(6, name="dense"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Dense(2, name="head"),
        ],
        name="model",
    )


def two_inputs() -> keras.Model:
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    return keras.Model([b, a], layers.Subtract(name="difference")([b, a]), name="model")


def ranges(qat: keras.Model) -> dict[str, tuple[float, float]]:
    return {
        layer.name.removesuffix("_quantizer"): layer.range()
        for layer in qat.layers
        if isinstance(layer, ActivationQuantizer)
    }


def batches(*arrays: np.ndarray, size: int = 32) -> Iterator[tuple[np.ndarray, ...]]:
    for start in range(0, len(arrays[0]), size):
        yield tuple(x[start : start + size] for x in arrays)


def dataset(elements: Any) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(elements).batch(32)


ONE_INPUT: dict[str, Callable[[], Any]] = {
    "array": lambda: A,
    "float64": lambda: A.astype(np.float64),
    "bytes": lambda: A.astype(np.uint8),
    "half precision": lambda: A.astype(np.float16),
    "tensor": lambda: tf.constant(A),
    "list of one": lambda: [A],
    "list of lists": lambda: [A.tolist()],
    "dict": lambda: {"a": A},
    "dataset": lambda: dataset(A),
    "labelled dataset": lambda: dataset((A, LABELS)),
    "weighted dataset": lambda: dataset((A, LABELS, LABELS)),
    "dataset of dicts": lambda: dataset(({"a": A}, LABELS)),
    "generator": lambda: (x for (x,) in batches(A)),
    "generator of tuples": lambda: batches(A, LABELS),
    "generator of lists": lambda: ([x] for (x,) in batches(A)),
    "list of batches in a tuple": lambda: tuple((x,) for (x,) in batches(A)),
    "an empty batch between": lambda: iter([A[:32], A[:0], A[32:64], A[64:]]),
}

TWO_INPUTS: dict[str, Callable[[], Any]] = {
    "list in the model's order": lambda: [B, A],
    "dict in any order": lambda: {"a": A, "b": B},
    "dataset": lambda: dataset(((B, A), LABELS)),
    "dataset of dicts": lambda: dataset({"a": A, "b": B}),
    "labelled dataset of dicts": lambda: dataset(({"a": A, "b": B}, LABELS)),
    "generator": lambda: ([b, a] for b, a in batches(B, A)),
    "labelled generator": lambda: ((list(pair), None) for pair in batches(B, A)),
    "generator of dicts": lambda: ({"a": a, "b": b} for b, a in batches(B, A)),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, tuple[float, float]]]:
    """Ranges after the arrays themselves, which another test compares with NumPy."""
    keras.utils.set_random_seed(0)
    one, two = uncalibrated(one_input()), uncalibrated(two_inputs())
    calibrate(one, A)
    calibrate(two, [B, A])
    return {"one": ranges(one), "two": ranges(two)}


@pytest.mark.parametrize("data", ONE_INPUT.values(), ids=ONE_INPUT)
def test_one_input_may_come_as(data: Callable[[], Any], expected: Any) -> None:
    qat = uncalibrated(one_input())
    calibrate(qat, data())
    assert ranges(qat) == expected["one"]


@pytest.mark.parametrize("data", TWO_INPUTS.values(), ids=TWO_INPUTS)
def test_two_inputs_may_come_as(data: Callable[[], Any], expected: Any) -> None:
    qat = uncalibrated(two_inputs())
    calibrate(qat, data())
    assert ranges(qat) == expected["two"]


def moving_average(values: list[float]) -> float:
    """Debiased: weights (1 - d) * d**k for the k-th last value, scaled to sum to one."""
    weights = 0.99 ** np.arange(len(values))[::-1]
    return float(np.sum(weights * values) / np.sum(weights))


def test_ranges_are_the_moving_averages_of_batches_of_32() -> None:
    qat = uncalibrated(two_inputs())
    calibrate(qat, [B - 100, A])
    assert BATCH_SIZE == 32
    found = ranges(qat)
    for name, value in {"b": B - 100, "a": A, "difference": B - 100 - A}.items():
        chunks = [c for (c,) in batches(value)]
        low = moving_average([min(c.min(), 0.0) for c in chunks])
        high = moving_average([max(c.max(), 0.0) for c in chunks])
        # Three float32 updates.
        np.testing.assert_allclose(found[name], (low, high), rtol=1e-6)


def test_min_max_ranges_are_those_of_all_data() -> None:
    qat = uncalibrated(two_inputs(), QuantizeConfig(activation_range=MinMax()))
    calibrate(qat, [B - 100, A])
    difference = B - 100 - A
    assert ranges(qat) == {
        "b": ((B - 100).min(), (B - 100).max()),
        "a": (0.0, A.max()),
        "difference": (difference.min(), difference.max()),
    }


def test_weights_are_rounded_and_activations_are_not() -> None:
    model = one_input()
    qat = uncalibrated(model, QuantizeConfig(activation_range=MinMax()))
    for layer in ("dense", "head"):
        kernel = qat.get_layer(f"quant_{layer}").rounded("kernel")
        assert np.any(kernel != model.get_layer(layer).kernel)
        model.get_layer(layer).kernel.assign(kernel)
    calibrate(qat, A)
    found = ranges(qat)
    relu = keras.Model(model.inputs[0], model.get_layer("relu").output)
    # Batches of 32 and of 80 are multiplied in another order.
    np.testing.assert_allclose(found["relu"], (0.0, relu(A).numpy().max()), rtol=1e-5)
    out = model(A).numpy()
    np.testing.assert_allclose(found["head"], (min(out.min(), 0.0), max(out.max(), 0.0)), rtol=1e-5)


def test_calibration_trains_nothing() -> None:
    qat = uncalibrated(one_input())
    before = {v.path: v.numpy() for v in qat.weights if "quantizer" not in v.path}
    calibrate(qat, A)
    np.testing.assert_equal({v.path: v.numpy() for v in qat.weights if v.path in before}, before)
    assert all(
        layer.is_calibrated() for layer in qat.layers if isinstance(layer, ActivationQuantizer)
    )


def test_more_data_go_on_from_where_the_ranges_are() -> None:
    at_once, in_parts = uncalibrated(two_inputs()), uncalibrated(two_inputs())
    calibrate(at_once, [B, A])
    calibrate(in_parts, [B[:32], A[:32]])
    calibrate(in_parts, [B[32:], A[32:]])
    assert ranges(in_parts) == ranges(at_once)


def test_the_users_own_objects_stay_as_they_are() -> None:
    data = {"a": A.copy()}
    calibrate(uncalibrated(one_input()), data)
    np.testing.assert_array_equal(data["a"], A)
