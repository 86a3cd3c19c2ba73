"""Functions of each number that follow one another are one table in the file."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export

SHAPE = (6, 8)
X = np.random.default_rng(0).normal(size=(32, *SHAPE)).astype(np.float32)


def root_mean_square(x: Any) -> Any:
    """As KerasHub's Gemma writes it."""
    variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
    return x * ops.reciprocal(ops.sqrt(variance + 1e-6))


def softened(x: Any) -> Any:
    return ops.log1p(ops.absolute(x * 0.5 + 1.0) + 0.1) * 2.0


def bent(x: Any) -> Any:
    return x * (1.0 + ops.erf(x / np.sqrt(2.0))) * 0.5


CHAINS: dict[str, Callable[[Any], Any]] = {
    "root mean square": root_mean_square,
    "log of a sum": softened,
    "gelu by hand": bent,
}


def model_of(function: Callable[[Any], Any]) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input(SHAPE, name="x")
    y = L.Dense(8, name="first")(x)
    return keras.Model(x, L.Dense(3, name="head")(function(y)), name="chain")


def tables(blob: bytes) -> int:
    return sum(op.name == "GATHER" for op in tflite_export.inspect(blob).operators)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_one_table(name: str) -> None:
    model = model_of(CHAINS[name])
    qat = kqat.quantize_model(model, calibration_data=X)
    blob = tflite_export.convert(qat)
    assert tables(blob) == 1
    report = tflite_export.verify(qat, blob, X, samples=8)
    assert all(part.problem is None and part.max_steps <= 1 for part in report.runtimes)
    want, got = (np.asarray(m(X, training=False), np.float64) for m in (model, qat))
    # Measured: 34.7 to 46.5 dB; the rest is room for weights that other versions draw.
    assert 10 * np.log10(np.mean(want**2) / np.mean((got - want) ** 2)) > 27.0


def test_it_is_saved_and_trained(tmp_path: Any) -> None:
    qat = kqat.quantize_model(model_of(softened), calibration_data=X)
    qat.compile(keras.optimizers.SGD(0.01), "mse")
    before = qat.trainable_weights[0].numpy()
    qat.train_on_batch(X, np.zeros((len(X), 6, 3), np.float32))
    assert np.any(qat.trainable_weights[0].numpy() != before)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(loaded(X, training=False), qat(X, training=False))


def test_a_value_that_others_read_ends_a_chain() -> None:
    def call(x: Any) -> Any:
        root = ops.sqrt(ops.absolute(x))
        return ops.log1p(root) + root

    qat = kqat.quantize_model(model_of(call), calibration_data=X)
    # |x| and its root are one table, the logarithm is another.
    assert tables(tflite_export.convert(qat)) == 2


@pytest.mark.parametrize("policy", [{"sqrt": None}, {"*": "int16x8"}])
def test_layers_of_another_config_are_left_apart(policy: Any) -> None:
    x = keras.Input(SHAPE, name="x")
    y = ops.sqrt(ops.absolute(L.Dense(8)(x)))
    model = keras.Model(x, L.Dense(3)(y))
    names = {layer.name: type(layer).__name__ for layer in model.operations}
    root = next(name for name, kind in names.items() if kind == "Sqrt")
    policy = {root if key == "sqrt" else key: value for key, value in policy.items()}
    kqat.plan(model, policy)
    simple = [layer.name for layer in kqat.plan(model, policy).layers]
    assert root in simple and any("absolute" in name for name in simple)
