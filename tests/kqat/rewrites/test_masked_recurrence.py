"""Masks of recurrent layers: a step that is left out keeps the state, to the integer."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.base.errors import UnsupportedLayerError
from kqat.graph.tracer import rebuild, trace
from kqat.planning.expansion import expand
from tests.newer_keras import needs_keras
from tflite_export.runtimes.execution import run

STEPS, WORDS, WIDTH, UNITS = 5, 9, 4, 3
Make = Callable[[Any], Any]


def _filled(model: keras.Model) -> keras.Model:
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(generator.normal(size=weight.shape, scale=0.5))
    return model


def _of_words(make: Make) -> keras.Model:
    x = keras.Input((STEPS,), dtype="int32", name="words")
    embedded = layers.Embedding(WORDS, WIDTH, mask_zero=True, name="table")(x)
    return _filled(keras.Model(x, make(embedded), name="net"))


def _of_numbers(make: Make, padding: float = 0.0) -> keras.Model:
    x = keras.Input((STEPS, WIDTH), name="x")
    return _filled(keras.Model(x, make(layers.Masking(padding, name="masking")(x)), name="net"))


def _words(samples: int = 24) -> np.ndarray:
    """Rows of all lengths, padded behind, before, or with holes; one is all padding."""
    generator = np.random.default_rng(0)
    words = generator.integers(1, WORDS, (samples, STEPS)).astype(np.int32)
    for row, length in enumerate(generator.integers(0, STEPS + 1, samples)):
        if row % 3 == 0:
            words[row, length:] = 0
        elif row % 3 == 1:
            words[row, : STEPS - length] = 0
        else:
            words[row, generator.random(STEPS) < 0.4] = 0
    words[0] = 0
    return words


def _numbers(samples: int = 24, padding: float = 0.0) -> np.ndarray:
    counts = (_words(samples) != 0)[..., None]
    values = np.random.default_rng(2).normal(size=(samples, STEPS, WIDTH))
    return np.where(counts, values, padding).astype(np.float32)


def _expanded(model: keras.Model) -> keras.Model:
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    return rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _next(kind: type, weights: list[Any], x: Any, h: Any, c: Any) -> tuple[Any, Any]:
    """One step of a cell in NumPy, with Keras's order of gates."""
    kernel, recurrent, bias = weights
    if kind is layers.SimpleRNN:
        return np.tanh(x @ kernel + h @ recurrent + bias), c
    if kind is layers.LSTM:
        i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4, axis=-1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        return _sigmoid(o) * np.tanh(c), c
    fed = np.split(x @ kernel + bias[0], 3, axis=-1)
    back = np.split(h @ recurrent + bias[1], 3, axis=-1)
    z, r = (_sigmoid(a + b) for a, b in zip(fed[:2], back[:2], strict=True))
    return z * h + (1 - z) * np.tanh(fed[2] + r * back[2]), c


@pytest.mark.parametrize("kind", [layers.SimpleRNN, layers.LSTM, layers.GRU])
def test_masked_steps_keep_the_state(kind: Any) -> None:
    """The masked recurrence in NumPy against Keras's layer and against its parts."""
    layer = kind(UNITS, return_sequences=True)
    model, words = _of_words(layer), _words()
    table = np.asarray(model.get_layer("table").embeddings, np.float64)
    h = c = np.zeros((len(words), UNITS))
    outputs = []
    for step in range(STEPS):
        counts = (words[:, step] != 0)[:, None]
        new, carry = _next(kind, layer.get_weights(), table[words[:, step]], h, c)
        h, c = np.where(counts, new, h), np.where(counts, carry, c)
        outputs.append(h)
    expected = np.stack(outputs, axis=1)
    np.testing.assert_allclose(model(words), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(_expanded(model)(words), expected, rtol=1e-4, atol=1e-5)


def _with_states(x: Any) -> Any:
    """An explicit mask beside initial states: no output before a step counted."""
    start = layers.Dense(UNITS)(keras.ops.max(x, axis=1))
    counts = keras.ops.greater(keras.ops.max(x, axis=-1), 0.1)
    return layers.GRU(UNITS, return_sequences=True)(x, initial_state=[start], mask=counts)


WHOLES: dict[str, Make] = {
    "backwards": layers.LSTM(UNITS, return_sequences=True, go_backwards=True),
    "states": layers.LSTM(UNITS, return_sequences=True, return_state=True),
    "zeros": layers.GRU(UNITS, return_sequences=True, zero_output_for_mask=True),
    "last of zeros": layers.LSTM(UNITS, zero_output_for_mask=True, return_state=True),
    "last": layers.Bidirectional(layers.LSTM(UNITS)),
    "sequences": layers.Bidirectional(layers.GRU(UNITS, return_sequences=True), merge_mode="sum"),
    "cells": layers.RNN([layers.LSTMCell(UNITS), layers.GRUCell(2)], go_backwards=True),
    "sequences of cells": layers.RNN(
        [layers.SimpleRNNCell(UNITS), layers.GRUCell(2)], return_sequences=True, go_backwards=True
    ),
    "stack": lambda x: layers.SimpleRNN(2)(
        layers.Dropout(0.1)(layers.Bidirectional(layers.LSTM(UNITS, return_sequences=True))(x))
    ),
    "initial states": _with_states,
}


DEAR = ("backwards", "states", "last of zeros", "cells", "sequences of cells", "stack")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in DEAR else []) for n in WHOLES]
)
def test_wholes_compute_what_the_layers_compute(name: str) -> None:
    make, words = WHOLES[name], _words()
    if isinstance(make, layers.Layer):  # Parameters are made once; each test has layers of its own.
        make = type(make).from_config(make.get_config())
    model = _of_words(make)
    expected, found = model(words), _expanded(model)(words)
    for ours, theirs in zip(*map(keras.tree.flatten, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0.0, -1.3])
def test_masking_finds_steps_of_one_value(padding: float) -> None:
    model = _of_numbers(layers.GRU(UNITS, return_sequences=True), padding)
    x = _numbers(padding=padding)
    np.testing.assert_allclose(_expanded(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [-1.3, pytest.param(-10.0, marks=pytest.mark.slow)])
def test_a_file_finds_steps_of_a_value_between_two_points_of_its_grid(padding: float) -> None:
    """The rounded input was compared with the value itself, which no integer stands for."""
    model = _of_numbers(layers.Dense(2), padding)
    x = _numbers(padding=padding)
    qat = kqat.quantize_model(model, calibration_data=x)
    nothing = np.asarray(qat(np.zeros_like(x)))[0, 0]
    shown = (x != np.float32(padding)).any(-1)
    found = np.asarray(qat(x))
    assert (found[~shown] == nothing).all() and not (found[shown] == nothing).all(-1).any()
    report = tflite_export.verify(qat, tflite_export.convert(qat), x, samples=4)
    assert report.is_full_integer and all(part.is_right for part in report.runtimes), report


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x: layers.LSTM(UNITS, name="rnn")(layers.Masking(-1e9, name="pad")(x)),
            "Expected a mask_value in Masking layer 'pad' beside which a grid holds other values. "
            "Received: -1000000000.0",
        ),
        (
            lambda x: _twice(layers.GRU(UNITS, name="rnn"), x),
            "Expected a mask in all calls of layer 'rnn' or in none",
        ),
        (
            lambda x: layers.LSTM(UNITS, name="rnn")(x, mask=keras.ops.max(x, axis=-1)),
            "Expected a boolean mask of shape (batch, steps) in layer 'rnn'",
        ),
        (
            lambda x: layers.LSTM(UNITS, name="rnn")(x, mask=np.ones((1, STEPS), bool)),
            "Expected a boolean mask of shape (batch, steps) in layer 'rnn'",
        ),
        (
            lambda x: layers.TimeDistributed(layers.LSTM(UNITS), name="each")(
                layers.Reshape((STEPS, 2, 2))(x), mask=keras.ops.greater(x[:, :, 0], 0.0)
            ),
            "Expected a mask of shape (batch, steps, inner steps) in TimeDistributed layer 'each'",
        ),
    ],
)
def test_what_cannot_ship_is_refused(make: Make, message: str) -> None:
    x = keras.Input((STEPS, WIDTH))
    with pytest.raises(UnsupportedLayerError, match=re.escape(message)):
        kqat.plan(keras.Model(x, make(x)))


def _twice(layer: Any, x: Any) -> Any:
    return layers.Add()([layer(x), layer(layers.Masking()(x))])


def test_a_fused_lstm_has_no_mask() -> None:
    model = _of_words(layers.LSTM(UNITS, name="rnn"))
    policy = {"rnn": kqat.QuantizeConfig(recurrence="fused")}
    with pytest.raises(UnsupportedLayerError, match=r"Expected mask=None for recurrence='fused'"):
        kqat.plan(model, policy)


def test_a_masked_layer_that_stays_float_is_refused() -> None:
    model = _of_words(lambda x: layers.Dense(2)(layers.LSTM(UNITS, name="rnn")(x)))
    with pytest.raises(kqat.ModelError, match=r"layer 'rnn' of type LSTM, which stays as it is\."):
        kqat.plan(model, {"rnn": None})


@pytest.mark.slow
def test_training_keeps_the_mask() -> None:
    """Padding tells nothing: outputs of the trained model do not see where it stands."""
    model = _of_words(layers.GRU(UNITS))
    words = _words()
    qat = kqat.quantize_model(model, calibration_data=words)
    qat.compile(keras.optimizers.SGD(0.1), "mse")
    before = qat.get_weights()
    qat.fit(words, np.ones((len(words), UNITS)), epochs=2, verbose=0)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(before, qat.get_weights(), strict=True))
    behind, ahead = _padded_both_ways()
    np.testing.assert_array_equal(qat(behind), qat(ahead))
    restored = kqat.strip(qat)
    np.testing.assert_allclose(restored(behind), restored(ahead), rtol=1e-5)


def _padded_both_ways() -> tuple[np.ndarray, np.ndarray]:
    """The same words of lengths 0 to STEPS, padded behind them and before them."""
    generator = np.random.default_rng(5)
    behind = np.zeros((STEPS + 1, STEPS), np.int32)
    ahead = behind.copy()
    for length in range(1, STEPS + 1):
        said = generator.integers(1, WORDS, length)
        behind[length, :length], ahead[length, STEPS - length :] = said, said
    return behind, ahead


SHIPPED: dict[str, tuple[Make, str]] = {
    "LSTM": (layers.LSTM(UNITS), "int8"),
    "GRU": (layers.GRU(UNITS), "int16x8"),
    "Bidirectional": (
        lambda x: layers.Dense(2)(layers.Bidirectional(layers.LSTM(UNITS))(x)),
        "int8",
    ),
    "stack": (
        lambda x: layers.SimpleRNN(2)(
            layers.Bidirectional(layers.GRU(UNITS, return_sequences=True))(x)
        ),
        "int8",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_file_leaves_padding_out(name: str) -> None:
    make, policy = SHIPPED[name]
    model, words = _of_words(make), _words()
    qat = kqat.quantize_model(model, policy, calibration_data=words)
    blob = tflite_export.convert(qat)
    runtimes = ["litert_reference", "litert"]
    if policy == "int8":  # TFLite Micro has no int16 GATHER.
        runtimes.append("tflite_micro")
    _check_lockstep(qat, blob, words, runtimes)
    behind, ahead = _padded_both_ways()
    for runtime in runtimes:
        (a,), (b,) = (run(blob, [x], runtime=runtime).outputs for x in (behind, ahead))
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_file_finds_steps_of_zeros() -> None:
    """Also on a grid so fine that comparing kernels round its lowest numbers to zero."""
    model = _of_numbers(layers.Bidirectional(layers.SimpleRNN(UNITS, return_sequences=True)))
    x = _numbers() * np.float32(0.01)
    qat = kqat.quantize_model(model, calibration_data=x)
    blob = tflite_export.convert(qat)
    _check_lockstep(qat, blob, x, ["litert_reference", "litert", "tflite_micro"])
    # A step counts by one number of one step off zero.
    (site,) = (site for site in kqat.freeze(qat).sites if site.name == "x")
    least = np.zeros((2, STEPS, WIDTH), np.float32)
    least[1, 2, 1] = site.scale
    floats = np.asarray(qat(least))
    assert np.all(floats[0] == 0) and np.any(floats[1] != 0)
    (found,) = run(blob, [site.integers(least).astype(np.int8)], runtime="litert_reference").outputs
    assert len(np.unique(found[0])) == 1 and len(np.unique(found[1])) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "runtime"),
    [
        ("int16x8", "litert_reference"),
        # It has no GATHER and no REDUCE_MAX of 16 bits.
        ({"masking_*": "int8", "*": "int16x8"}, "tflite_micro"),
    ],
)
def test_masking_beside_values_of_16_bits(policy: Any, runtime: str) -> None:
    model, x = _of_numbers(layers.GRU(UNITS)), _numbers()
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    _check_lockstep(qat, tflite_export.convert(qat), x, [runtime])


def _check_lockstep(qat: Any, blob: bytes, x: np.ndarray, runtimes: list[str]) -> None:
    report = tflite_export.verify(qat, blob, x, runtimes=tuple(runtimes))
    for result in report.runtimes:
        assert result.is_right and result.exact is not None and result.exact.is_exact, report
        held = [site for site in result.sites if site.operator == "SELECT_V2"]
        assert held and all(site.max_steps == 0 for site in held), report


def _inner(sequential: bool) -> keras.Model:
    if sequential:
        embedding = layers.Embedding(WORDS, WIDTH, mask_zero=True)
        rnn = layers.GRU(UNITS, return_sequences=True)
        return keras.Sequential([keras.Input((STEPS,), dtype="int32"), embedding, rnn])
    x = keras.Input((STEPS,), dtype="int32")
    return keras.Model(x, layers.Embedding(WORDS, WIDTH, mask_zero=True)(x))


@pytest.mark.parametrize("sequential", [True, False])
def test_a_mask_comes_out_of_a_model_inside(sequential: bool) -> None:
    """The symbolic outputs of its call bear none."""
    x, words = keras.Input((STEPS,), dtype="int32"), _words()
    model = _filled(keras.Model(x, layers.LSTM(UNITS)(_inner(sequential)(x))))
    np.testing.assert_allclose(_expanded(model)(words), model(words), rtol=1e-4, atol=1e-5)


def _beside(other: Any, axis: int) -> Make:
    return lambda x: layers.LSTM(UNITS)(layers.Concatenate(axis=axis)([x, other(x)]))


# Each mask is made anew where Keras's own reads the numbers as well.
JOINED: dict[str, Make] = {
    "steps": _beside(layers.Activation("tanh"), 1),
    "steps of two layers": lambda x: layers.Bidirectional(layers.GRU(2))(
        layers.Concatenate(axis=1)([layers.Activation("tanh")(x), x, layers.ReLU()(x)])
    ),
    "steps that all count": _beside(layers.Reshape((STEPS, WIDTH)), 1),
    "more steps that all count": _beside(lambda x: layers.Reshape((STEPS, WIDTH))(x)[:, :3], -2),
    "features": _beside(layers.Activation("tanh"), -1),
    "features that all count": _beside(layers.Reshape((STEPS, WIDTH)), 2),
}


@pytest.mark.filterwarnings("ignore:Layer 'reshape.* does not support masking")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if "of two" in n else []) for n in JOINED],
)
def test_masks_of_joined_sequences(name: str) -> None:
    needs_keras("3.12", "a mask of joined sequences")
    model, words = _of_words(JOINED[name]), _words()
    np.testing.assert_allclose(_expanded(model)(words), model(words), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer 'reshape.* does not support masking")
def test_the_file_of_joined_sequences_is_right() -> None:
    model, words = _of_words(JOINED["more steps that all count"]), _words()
    qat = kqat.quantize_model(model, calibration_data=words)
    runtimes = ["litert_reference", "litert", "tflite_micro"]
    _check_lockstep(qat, tflite_export.convert(qat), words, runtimes)


def _of_sentences(inner: Any) -> keras.Model:
    x = keras.Input((STEPS * 2,), dtype="int32", name="words")
    y = layers.Embedding(WORDS, WIDTH, mask_zero=True)(layers.Reshape((2, STEPS))(x))
    y = layers.Flatten()(layers.TimeDistributed(inner, name="each")(y))
    return _filled(keras.Model(x, layers.Dense(2)(y), name="net"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer 'flatten.* does not support masking")
def test_each_step_of_a_sequence_of_sequences_has_its_mask() -> None:
    words = _words(24).reshape(12, -1)
    model = _of_sentences(layers.GRU(UNITS))
    np.testing.assert_allclose(_expanded(model)(words), model(words), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer 'flatten.* does not support masking")
def test_the_file_of_a_sequence_of_sequences_is_right() -> None:
    words = _words(24).reshape(12, -1)
    qat = kqat.quantize_model(_of_sentences(layers.LSTM(UNITS)), calibration_data=words)
    runtimes = ["litert_reference", "litert", "tflite_micro"]
    _check_lockstep(qat, tflite_export.convert(qat), words, runtimes)


def test_a_normalization_computes_the_same_without_its_mask() -> None:
    """Only its statistics leave steps out, which is said."""
    model, words = (
        _of_words(lambda x: layers.GRU(UNITS)(layers.BatchNormalization(name="norm")(x))),
        _words(),
    )
    with pytest.warns(kqat.TrainerWarning, match="Layer 'norm' of type BatchNormalization leaves"):
        expanded = _expanded(model)
    np.testing.assert_allclose(expanded(words), model(words), rtol=1e-4, atol=1e-5)
    model.get_layer("norm").trainable = False
    kqat.plan(model)


@pytest.mark.slow
def test_what_a_mask_puts_in_place_of_outputs_is_no_guess() -> None:
    """It is zero by construction."""
    model = _of_words(layers.GRU(UNITS, return_sequences=True, zero_output_for_mask=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", kqat.CalibrationWarning)
        kqat.quantize_model(model, calibration_data=_words(1024))
