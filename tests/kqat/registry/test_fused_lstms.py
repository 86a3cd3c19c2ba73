"""Which LSTM takes the fused road, what is refused by name, and where a step rounds."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat.base.errors import PolicyError, SpecError, UnsupportedLayerError
from kqat.config.layer_config import QuantizeConfig
from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from kqat.parts.lstm_step import CARRY, LstmState

STEPS, FEATURES, UNITS = 4, 5, 3
FUSED = QuantizeConfig(recurrence="fused")


def _model(call: Callable[[Any], Any]) -> keras.Model:
    x = keras.Input((STEPS, FEATURES), name="x")
    return keras.Model(x, call(x), name="net")


def _kinds(model: keras.Model, policy: Any) -> set[str]:
    return {layer.kind for layer in kqat.plan(model, policy).layers}


def test_only_the_config_that_asks_for_it_fuses() -> None:
    model = _model(layers.LSTM(UNITS, name="lstm"))
    assert "LstmState" not in _kinds(model, "int8")
    assert _kinds(model, {"lstm": FUSED}) == {"Recurrence", "LstmState"}
    plan = kqat.plan(model, {"lstm": FUSED})
    carry = next(layer for layer in plan.layers if layer.name == "lstm_carry")
    assert carry.ops == ("UNIDIRECTIONAL_SEQUENCE_LSTM",)
    assert {spec.axis for spec in carry.weights.values()} == {None}
    assert "6 × int8  own, int16" in str(plan)


def test_a_default_reaches_the_lstm_and_leaves_the_rest() -> None:
    model = _model(lambda x: layers.Dense(2)(layers.LSTM(UNITS)(x)))
    assert _kinds(model, FUSED) == {"Recurrence", "LstmState", "Dense"}


def test_a_wrapped_lstm_takes_its_wrapper_s_config() -> None:
    x = keras.Input((2, STEPS, FEATURES))
    rows = layers.TimeDistributed(layers.LSTM(UNITS))(x)
    assert "LstmState" in _kinds(keras.Model(x, rows), FUSED)


REFUSED = (
    (lambda: layers.LSTM(UNITS, "relu"), "Expected activation='tanh'"),
    (
        lambda: layers.LSTM(UNITS, recurrent_activation="hard_sigmoid"),
        "Expected recurrent_activation='sigmoid'",
    ),
    (lambda: layers.LSTM(UNITS, recurrent_dropout=0.1), "Expected recurrent_dropout=0.0"),
    (lambda: layers.LSTM(UNITS, return_state=True), "Expected return_state=False"),
    (lambda: layers.GRU(UNITS), "Expected cell='LSTMCell'"),
    (
        lambda: layers.RNN([layers.LSTMCell(2), layers.GRUCell(2)]),
        "Expected cell='LSTMCell'",
    ),
    (
        lambda: layers.Bidirectional(
            layers.LSTM(2), backward_layer=layers.SimpleRNN(2, go_backwards=True)
        ),
        "Expected cell='LSTMCell'",
    ),
)


@pytest.mark.parametrize(("layer", "message"), REFUSED)
def test_what_the_operator_does_not_compute_is_refused(layer: Any, message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=f"{re.escape(message)}.*recurrence='unrolled'"):
        kqat.plan(_model(layer()), FUSED)


def test_initial_states_are_refused() -> None:
    x = keras.Input((STEPS, FEATURES))
    states = [keras.Input((UNITS,)), keras.Input((UNITS,))]
    model = keras.Model([x, *states], layers.LSTM(UNITS)(x, initial_state=states))
    with pytest.raises(UnsupportedLayerError, match="Expected initial_state=None"):
        kqat.plan(model, FUSED)


@pytest.mark.parametrize(
    "rows",
    [
        lambda: layers.Dense(2, name="rows"),
        lambda: layers.TimeDistributed(layers.Dense(2), name="rows"),
    ],
    ids=["dense", "wrapped"],
)
def test_a_config_that_no_recurrent_layer_takes_is_refused(rows: Any) -> None:
    model = _model(lambda x: layers.LSTM(UNITS)(rows()(x)))
    with pytest.raises(PolicyError, match=r"a recurrent layer for .* Received: 'rows'"):
        kqat.plan(model, {"rows": FUSED})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recurrence": "fuse"}, "'unrolled' or 'fused'"),
        (
            {"recurrence": "fused", "activation": QuantSpec(bits=16, symmetric=True)},
            "8 bits for recurrence='fused'",
        ),
    ],
)
def test_a_wrong_config_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        QuantizeConfig(**options)


def test_a_config_is_read_back() -> None:
    assert QuantizeConfig.from_dict(FUSED.to_dict()) == FUSED


def test_stripped_it_is_the_float_layer() -> None:
    model = _model(lambda x: layers.Bidirectional(layers.LSTM(UNITS, return_sequences=True))(x))
    x = np.random.default_rng(0).normal(size=(8, STEPS, FEATURES)).astype(np.float32)
    stripped = kqat.strip(kqat.quantize_model(model, FUSED, calibration_data=x))
    # Sums run in another order: a few float32 roundings of values below one.
    np.testing.assert_allclose(stripped(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("high", "power"), [(0.1, -15), (1.0, -14), (32767 / 32768, -15), (5.0, -12), (900.0, -9)]
)
def test_the_carry_has_the_least_power_of_two(high: float, power: int) -> None:
    low, high = arithmetic.symmetrize(np.float32(-0.01), np.float32(high), CARRY)
    scale, zero_point = arithmetic.nudge(low, high, CARRY)
    assert (np.log2(scale), zero_point) == (power, 0)


def test_a_power_of_two_without_symmetry_is_refused() -> None:
    with pytest.raises(SpecError, match="Expected a symmetric grid for power_of_two=True"):
        QuantSpec(bits=16, power_of_two=True)


def test_a_step_rounds_as_the_operator() -> None:
    """In NumPy: products to 1/4096 within ±8, sigmoid and tanh to 1/32768."""
    rng = np.random.default_rng(3)
    x, h, c = (rng.normal(size=(50, n), scale=2).astype(np.float32) for n in (FEATURES, UNITS, 3))
    layer = LstmState("output", UNITS)
    unrounded = layer([x, h, c])
    kernel, recurrent, bias = (rng.normal(size=w.shape, scale=2) for w in layer.weights)
    layer.set_weights([kernel, recurrent, bias])

    def rounded(value: np.ndarray, steps: int, low: float, high: float) -> np.ndarray:
        return np.clip(np.floor(value * steps + 0.5), low, high) / steps

    int16 = -32768, 32767
    fed = rounded(x @ kernel + bias, 4096, *int16)
    sums = np.clip(fed + rounded(h @ recurrent, 4096, *int16), -8, 32767 / 4096)
    assert np.any(np.abs(fed) > 7.99)
    gate, squashed = (rounded(v, 32768, *int16) for v in (1 / (1 + np.exp(-sums)), np.tanh(c)))
    # Sums in float32 may fall to the other side of a tie: 1/4096 of a sum, a quarter in the gate.
    np.testing.assert_allclose(layer.rounded([x, h, c]), gate * squashed, atol=2.0**-13)
    assert unrounded.shape == (50, UNITS)
