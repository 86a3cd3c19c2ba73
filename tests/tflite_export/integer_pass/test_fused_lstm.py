"""LSTMs as one operator: in lockstep on every runtime, without a difference."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from ai_edge_litert import interpreter as litert
from keras import layers

import kqat
import tflite_export
from kqat.config.layer_config import QuantizeConfig
from kqat.kernels.lstm_arithmetic import Numbers
from kqat.parts.lstm_step import FrozenLSTM
from tflite_export import flatbuffer
from tflite_export.integer_pass import fused_lstm
from tflite_export.integer_pass.fused_lstm import call_layer
from tflite_export.verification.report import Report

STEPS, FEATURES, UNITS = 7, 5, 6
FUSED = QuantizeConfig(recurrence="fused")
OPERATOR = "UNIDIRECTIONAL_SEQUENCE_LSTM"


def _data(steps: int = STEPS, features: int = FEATURES) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, steps, features)).astype(np.float32)


def _qat(
    call: Callable[[Any], Any], steps: int = STEPS, features: int = FEATURES, size: float = 0.5
) -> keras.Model:
    x = keras.Input((steps, features), name="x")
    model = keras.Model(x, call(x), name="net")
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape, scale=size))
    return kqat.quantize_model(model, FUSED, calibration_data=_data(steps, features))


def _verified(qat: keras.Model, **options: Any) -> Report:
    blob = tflite_export.convert(qat, **options)
    report = tflite_export.verify(qat, blob, _data(*qat.inputs[0].shape[1:]))
    for part in report.runtimes:
        assert part.problem is None, part.problem
        assert part.unmatched == ()
        assert part.max_steps <= 1
        assert part.by_operator()[OPERATOR].max_steps == 0
    return report


def _many(x: Any) -> list[Any]:
    """Every way to call one, in one model."""
    shared = layers.LSTM(FEATURES, return_sequences=True, name="shared")
    rows = layers.Dense(4, name="rows")(x)
    return [
        layers.LSTM(UNITS, name="last")(x),
        layers.LSTM(UNITS, return_sequences=True, go_backwards=True, name="backwards")(x),
        layers.Bidirectional(layers.LSTM(UNITS), name="both")(x),
        layers.Bidirectional(
            layers.LSTM(UNITS, return_sequences=True, use_bias=False), merge_mode="sum", name="sums"
        )(x),
        layers.Dense(3, name="head")(layers.LSTM(UNITS, return_sequences=True, name="deep")(rows)),
        layers.RNN([layers.LSTMCell(4), layers.LSTMCell(3)], name="stack")(x),
        shared(shared(x)),
    ]


@pytest.mark.slow
def test_every_way_to_call_one() -> None:
    report = _verified(_qat(_many))
    assert report.operators[OPERATOR] == 11
    # The input is turned once for three layers that read it backwards, and one output is.
    assert report.operators["GATHER"] == 2
    assert report.float_operators == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.0, 20.0], ids=["dead", "saturated"])
def test_weights_of_all_sizes(size: float) -> None:
    _verified(_qat(layers.LSTM(UNITS), size=size))


@pytest.mark.slow
@pytest.mark.parametrize("units", [1, UNITS])
def test_a_single_feature(units: int) -> None:
    """Where the product that stands in for the operator is another one to the converter."""
    _verified(_qat(layers.LSTM(units), features=1))


@pytest.mark.slow
def test_a_batch_of_two_and_float_ends() -> None:
    qat = _qat(layers.Bidirectional(layers.LSTM(UNITS, return_sequences=True)))
    floats = {"inference_input_type": "float32", "inference_output_type": "float32"}
    _verified(qat, batch_size=2, **floats)


@pytest.mark.slow
def test_a_hundred_steps_take_the_memory_of_one() -> None:
    report = _verified(_qat(layers.LSTM(UNITS, name="lstm"), steps=100))
    arena_bytes = report.on("tflite_micro").arena_bytes
    # 500 bytes of input, 600 of output, and what the interpreter has for three operators.
    assert arena_bytes is not None and arena_bytes < 5000
    assert {row.name: row.macs for row in report.layers}["lstm_steps"] == 100 * 4 * UNITS * 11


def test_a_wrong_export_shows_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lockstep is with the file's own numbers; the outputs are compared with the trained layer."""
    own = fused_lstm.numbers

    def swapped(layer: FrozenLSTM) -> Numbers:
        numbers = own(layer)
        first, second, *rest = numbers.kernels.values()
        kernels = dict(zip(numbers.kernels, (second, first, *rest), strict=True))
        return dataclasses.replace(numbers, kernels=kernels)

    monkeypatch.setattr(fused_lstm, "numbers", swapped)
    qat = _qat(layers.LSTM(UNITS))
    report = tflite_export.verify(qat, tflite_export.convert(qat), _data())
    assert all(part.outputs[0].max_steps > 10 for part in report.runtimes)


def test_the_frozen_model_in_floats_is_close() -> None:
    """It rounds where the operator does, but for the products within a step."""
    (layer,) = kqat.freeze(_qat(layers.LSTM(UNITS, return_sequences=True), steps=28)).lstms
    x = layer.source.reals(layer.source.integers(_data(28)))
    exact = np.asarray(call_layer(layer, "tflite_micro", x))
    steps = (np.asarray(layer(x)) - exact) / layer.result.scale
    # The carry's rounding errors, 1/256 of an output step or less, move few outputs over a tie.
    assert np.abs(steps).max() <= 1.01
    assert np.mean(np.abs(steps) > 0.5) < 0.05


def test_states_live_on_until_they_are_reset() -> None:
    """What `recurrence="fused"` says of the device."""
    blob = tflite_export.convert(_qat(layers.LSTM(UNITS)))
    interpreter = litert.Interpreter(model_content=blob)
    interpreter.allocate_tensors()
    (end,) = interpreter.get_output_details()

    def invoked() -> np.ndarray:
        interpreter.invoke()
        return interpreter.get_tensor(end["index"])

    first, second = invoked(), invoked()
    assert np.any(first != second)
    interpreter.reset_all_variables()
    np.testing.assert_array_equal(invoked(), first)


def test_the_file_has_the_trained_numbers() -> None:
    qat = _qat(layers.LSTM(UNITS, name="lstm"))
    layer: FrozenLSTM = kqat.freeze(qat).lstms[0]
    model = flatbuffer.read(tflite_export.convert(qat))
    tensors = {flatbuffer.tensor_name(t): t for t in model.subgraphs[0].tensors}
    (wrapper,) = (
        la for la in qat.get_layer("quant_lstm").parts.wrappers if la.layer.kind == "output"
    )
    kernel = wrapper.layer.output_kernel.numpy()
    scale = np.abs(kernel).max() / 127
    np.testing.assert_allclose(layer.gates["output"].kernel_scale, scale, rtol=1e-6)
    # Every weight lies within half a step of the one that was trained.
    assert np.abs(layer.gates["output"].kernel - kernel / scale).max() <= 0.5 + 1e-4
    operator = next(
        o for o in model.subgraphs[0].operators if flatbuffer.op_name(model, o) == OPERATOR
    )
    shipped = model.subgraphs[0].tensors[operator.inputs[4]]
    data = flatbuffer.tensor_data(model, shipped)
    np.testing.assert_array_equal(data, layer.gates["output"].kernel.T)
    power = np.log2(model.subgraphs[0].tensors[operator.inputs[19]].quantization.scale[0])
    assert power == np.rint(power)
    assert tensors["x"].quantization.scale[0] == layer.source.scale
