"""A clip behind a kernel is where the grid of its output ends, and no operator."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from kqat.grids import Bounds
from kqat.training import ActivationQuantizer

X = np.random.default_rng(0).normal(scale=2.0, size=(64, 6, 6, 4)).astype(np.float32)


def conv(x: Any, **options: Any) -> Any:
    return L.Conv2D(4, 3, **options)(x)


def model_of(call: Callable[[Any], Any]) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input(X.shape[1:], name="x")
    return keras.Model(x, call(x))


def operators(blob: bytes) -> list[str]:
    return [op.name for op in tflite_export.inspect(blob).operators]


@keras.saving.register_keras_serializable("tests")
class Ends(L.Layer):
    """A clip whose ends are unlike."""

    def call(self, x: Any) -> Any:
        return ops.clip(x, -0.25, 0.5)


TABLE = ["CAST", "ADD", "GATHER"]
KINDS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "clip": (lambda x: ops.clip(conv(x), -0.5, 1.5), ["CONV_2D"]),
    "hard tanh": (lambda x: conv(x, activation="hard_tanh"), ["CONV_2D"]),
    "relu": (lambda x: L.ReLU(max_value=1.0)(L.BatchNormalization()(conv(x))), ["CONV_2D"]),
    "two": (lambda x: ops.maximum(ops.minimum(conv(x), 1.0), -2.0), ["CONV_2D"]),
    "relu6 of two": (lambda x: ops.minimum(ops.relu(conv(x)), 6.0), ["CONV_2D"]),
    "sum": (lambda x: ops.clip(L.Add()([x, conv(x, padding="same")]), -1, 2), ["CONV_2D", "ADD"]),
    "input": (lambda x: ops.clip(x, -1.0, 1.0), ["QUANTIZE"]),
    "not alone": (
        lambda x: (lambda y: L.Multiply()([y, ops.clip(y, -1.0, 1.0)]))(conv(x)),
        ["CONV_2D", "QUANTIZE", "MUL"],
    ),
    "pooled": (
        lambda x: ops.clip(L.MaxPooling1D(2)(L.Reshape((36, 4))(x)), -1.0, 1.0),
        ["RESHAPE", "MAX_POOL_2D", "RESHAPE", "QUANTIZE"],
    ),
    "beside another": (
        lambda x: L.Concatenate()([conv(x), ops.clip(conv(x), -0.25, 0.5)]),
        ["CONV_2D", "CONV_2D", "QUANTIZE", "CONCATENATION"],
    ),
    "of a table": (lambda x: ops.square(ops.sin(ops.clip(x, -1.0, 1.0))), [*TABLE, "MUL"]),
    "before a table": (lambda x: ops.sin(ops.clip(conv(x), -1.0, 1.0)), ["CONV_2D", *TABLE]),
    # No grid begins above zero.
    "above zero": (lambda x: ops.clip(conv(x), 0.5, 1.0), ["CONV_2D", *TABLE]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_ends_where_the_clip_does(kind: str) -> None:
    call, expected = KINDS[kind]
    model = model_of(call)
    qat = kqat.quantize_model(model, calibration_data=X)
    blob = tflite_export.convert(qat)
    assert operators(blob) == expected
    report = tflite_export.verify(qat, blob, X, samples=4)
    for part in report.runtimes:
        assert part.problem is None and part.is_right, part
        assert part.exact is None or part.exact.is_exact, part
    want, got = (np.asarray(m(X, training=False), np.float64) for m in (model, qat))
    # Measured: 35.9 to 40.2 dB; the rest is room for weights that other versions draw.
    assert 10 * np.log10(np.mean(want**2) / np.mean((got - want) ** 2)) > 33.0
    device = kqat.integer_model(qat, runtime="litert")
    np.testing.assert_array_equal(device(X[:4]).shape, got[:4].shape)
    stripped = kqat.strip(qat)
    np.testing.assert_allclose(stripped(X), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (KINDS["relu"][0], ["CONV_2D"]),
        pytest.param(KINDS["input"][0], ["QUANTIZE"], marks=pytest.mark.slow),
        pytest.param(lambda x: L.ReLU(max_value=2.0)(x), ["RELU"], marks=pytest.mark.slow),
    ],
)
def test_a_grid_of_sixteen_bits_ends_there_at_both_ends_or_above_zero(
    call: Callable[[Any], Any], expected: list[str]
) -> None:
    model = model_of(call)
    qat = kqat.quantize_model(model, "int16x8", calibration_data=X)
    blob = tflite_export.convert(qat)
    assert operators(blob) == expected
    for part in tflite_export.verify(qat, blob, X, samples=4).runtimes:
        assert part.problem is None and part.is_right, part
        assert part.exact is None or part.exact.is_exact, part
    want, got = (np.asarray(m(X, training=False), np.float64) for m in (model, qat))
    # Measured: 45.4 dB; the rest is room for weights that other versions draw.
    assert 10 * np.log10(np.mean(want**2) / np.mean((got - want) ** 2)) > 40.0
    shipped = np.asarray(kqat.integer_model(qat, runtime="litert")(X[:8], training=False))
    step = tflite_export.inspect(blob).outputs[0].scale
    assert want.min() - step <= shipped.min() and shipped.max() <= want.max() + step


FREE = {
    # Both ends of its grid are alike.
    "symmetric": "int16x8",
    "given": {"ends": kqat.QuantizeConfig(activation_range=kqat.Fixed(-4.0, 4.0))},
    "learned": {"ends": kqat.QuantizeConfig(activation_range="lsq_plus")},
}


@pytest.mark.parametrize("policy", FREE.values(), ids=FREE)
def test_a_grid_whose_ends_are_not_free_does_not_clip(policy: Any) -> None:
    model = model_of(lambda x: Ends(name="ends")(conv(x)))
    qat = kqat.quantize_model(model, policy, calibration_data=X)
    assert "GATHER" in operators(tflite_export.convert(qat))


def test_the_range_keeps_to_the_clip_in_training(tmp_path: Path) -> None:
    model = model_of(lambda x: ops.clip(conv(x), -0.5, 0.75))
    qat = kqat.quantize_model(model, calibration_data=X)
    qat.compile(keras.optimizers.SGD(0.5), "mse")
    qat.fit(X, np.full((64, 4, 4, 4), 10.0), epochs=2, verbose=0)
    qat.save(tmp_path / "qat.keras")
    loaded = kqat.load_model(tmp_path / "qat.keras")
    for one in (qat, loaded):
        (quantizer,) = (
            layer
            for layer in one.layers
            if isinstance(layer, ActivationQuantizer) and layer.clamp is not None
        )
        assert quantizer.clamp == Bounds(-0.5, 0.75)
        low, high = quantizer.range()
        assert -0.5 <= low <= 0.0 < high <= 0.75
        assert float(np.max(quantizer.clamped(X))) == 0.75
    np.testing.assert_array_equal(qat(X), loaded(X))
    assert tflite_export.convert(qat) == tflite_export.convert(loaded)


def test_what_it_makes_wider_stays_inside() -> None:
    """The kernel resolves less than the clip leaves: the range ends at the clip all the same."""
    model = model_of(lambda x: ops.clip(L.Add()([x, conv(x, padding="same")]), -1e-3, 1e-3))
    qat = kqat.quantize_model(model, calibration_data=X)
    y = np.asarray(qat(X, training=False))
    assert np.abs(y).max() < 1.01e-3


def test_calls_of_one_layer_are_told_apart() -> None:
    """Both clips have the same grid, and the one has a name that the other's output bears."""

    def call(x: Any) -> Any:
        clip = L.ReLU(max_value=0.5)
        return [clip(conv(x)), clip(conv(x))]

    qat = kqat.quantize_model(model_of(call), calibration_data=X)
    blob = tflite_export.convert(qat)
    assert operators(blob) == ["CONV_2D", "CONV_2D"]
    for part in tflite_export.verify(qat, blob, X, samples=4).runtimes:
        assert part.problem is None and part.is_right and part.unmatched == (), part


def test_bounds_in_a_plan() -> None:
    plan = kqat.plan(model_of(lambda x: ops.minimum(conv(x), 2.0)))
    (group,) = (group for group in json.loads(plan.to_json())["groups"] if group["clamp"])
    assert group["clamp"] == [None, 2.0]
