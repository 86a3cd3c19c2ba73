"""What an operation or layer is asked for beside its inputs is honoured, or refused by name."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.registry import operation_table
from tests.coverage.cases import inputs_of

TABLE = np.arange(12, dtype=np.float32).reshape(3, 4)


def model_of(shape: tuple[int, ...], build: Callable[[Any], Any], dtype: str) -> keras.Model:
    x = keras.Input(shape, dtype=dtype, name="x")
    return keras.Model(x, build(x))


@pytest.mark.parametrize(
    ("shape", "build", "dtype"),
    [
        ((5, 6), lambda x: ops.roll(x * 1.5, (1, 2), axis=(2, 1)), "float32"),
        ((4,), lambda x: ops.take(TABLE, x, axis=0), "int32"),
        ((3, 4), lambda x: layers.TimeDistributed(layers.LayerNormalization(axis=1))(x), "float32"),
        ((4,), lambda x: ops.stack([x * 2.0], axis=1), "float32"),
    ],
)
def test_is_honoured(shape: tuple[int, ...], build: Any, dtype: str) -> None:
    model = model_of(shape, build, dtype)
    x = inputs_of(model, 8) if dtype == "float32" else np.arange(32).reshape(8, 4) % len(TABLE)
    stripped = kqat.strip(kqat.quantize_model(model, calibration_data=x))
    # A normalization's few operations in another order: some roundings of float32.
    np.testing.assert_allclose(
        stripped.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5
    )


class Nameless(keras.regularizers.Regularizer):  # type: ignore[misc]
    """A user's own penalty, of which Keras has no config."""

    def __call__(self, x: Any) -> Any:
        """The sum of squares."""
        return ops.sum(ops.square(x))


REFUSED: list[tuple[tuple[int, ...], Any, str, str]] = [
    ((4,), lambda x: ops.take(TABLE, x, axis=1), "int32", "axis=1, tensors for both"),
    ((4,), lambda x: ops.take(TABLE, x), "int32", "axis=None, tensors for both"),
    ((5, 5, 3), lambda x: ops.max(x * 1.0, (1, 2), initial=3.0), "float32", "without initial"),
    ((4, 5), lambda x: ops.softmax(x, axis=(1, 2)), "float32", r"one axis .*axis=\(1, 2\)"),
    ((6,), lambda x: ops.normalize(x, epsilon=10.0), "float32", "epsilon=10.0"),
    ((6,), lambda x: ops.cumsum(x, 1, dtype="int32"), "float32", "without dtype"),
    ((4,), lambda x: ops.append(x, x * 2.0), "float32", "leave the batch axis alone"),
    ((4,), lambda x: ops.tril(x), "float32", "a matrix for each sample"),
    ((4,), lambda x: ops.argmax(x * 1.0), "float32", "leave the batch axis alone"),
    (
        (2, 5, 5, 5),
        lambda x: layers.ConvLSTM2D(2, 3, data_format="channels_first")(x),
        "float32",
        "'conv_lstm2d.*channels_first",
    ),
    (
        (4, 5),
        lambda x: layers.EinsumDense(
            "abc,bd->acd", (5, 7), bias_axes="d", bias_regularizer="l2", name="permuted"
        )(x),
        "float32",
        "no bias_regularizer in layer 'permuted'",
    ),
    *(
        (
            (4, 8),
            lambda x, given=given: layers.MultiHeadAttention(2, 4, name="mha", **given)(x, x),
            "float32",
            f"no {next(iter(given))} in attention layer 'mha'",
        )
        # One that no config can name is kept by the layer in a private attribute.
        for given in ({"kernel_regularizer": Nameless()}, {"bias_regularizer": "l1"})
    ),
]


@pytest.mark.parametrize(("shape", "build", "dtype", "words"), REFUSED)
def test_is_refused(shape: tuple[int, ...], build: Any, dtype: str, words: str) -> None:
    with pytest.raises(kqat.UnsupportedLayerError, match=words):
        kqat.plan(model_of(shape, build, dtype))


def test_a_row_that_forgets_an_option_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial of every operation stands behind what the rows themselves check."""

    def forgetful(operation: Any, name: str) -> Any:
        return lambda x: layers.Rescaling(1.0, name=name)(x)

    monkeypatch.setitem(operation_table.OPERATIONS, "Flip", forgetful)
    model = model_of((4,), lambda x: ops.flip(x, axis=1), "float32")
    with pytest.raises(kqat.UnsupportedLayerError, match=r"'flip' of type Flip.*'axis': 1"):
        kqat.plan(model)


def test_a_permuted_kernel_keeps_its_regularizer() -> None:
    def penalty(model: keras.Model) -> float:
        return sum(float(loss) for loss in model.losses)

    layer = layers.EinsumDense("abc,bd->acd", (5, 7), kernel_regularizer=keras.regularizers.L2(0.5))
    model = model_of((4, 5), layer, "float32")
    x = inputs_of(model, 8)
    qat = kqat.quantize_model(model, calibration_data=x)
    assert penalty(model) > 0
    assert penalty(qat) == pytest.approx(penalty(model), rel=1e-6)


def test_a_step_that_was_asked_for_rounds_an_embedding() -> None:
    model = model_of((4,), layers.Embedding(5, 3, name="rows"), "int32")
    (plain, asked) = (
        kqat.plan(model, kqat.QuantizeConfig(**options))
        for options in ({}, {"weight_step": LeastSquares()})
    )
    assert [dict(layer.weights) for layer in plain.layers] == [{}]
    assert [list(layer.weights) for layer in asked.layers] == [["embeddings"]]


def test_a_range_that_was_given_is_not_scaled_away() -> None:
    x = keras.Input((6, 16))
    y = layers.LayerNormalization(name="norm")(x)
    y = layers.Dense(16, name="wide")(y)
    model = keras.Model(x, layers.Dense(4, name="head")(y))
    data = inputs_of(model, 8)
    config = kqat.QuantizeConfig(activation_range=Fixed(-4.0, 4.0))
    qat = kqat.quantize_model(model, {"norm": config}, calibration_data=data)
    with pytest.raises(kqat.ModelError, match="none whose channels can be scaled"):
        kqat.training.algorithms.smooth_quant(qat, data)


def test_a_function_of_the_users_own_is_planned_for_a_target_in_silence() -> None:
    model = model_of(
        (4,), layers.Dense(3, activation=lambda t: ops.tanh(t) * 2.0, name="own"), "float32"
    )
    (found,) = kqat.plan(model, target="edge_tpu").misfits
    assert (found.layer, found.replacement) == ("own", None)
