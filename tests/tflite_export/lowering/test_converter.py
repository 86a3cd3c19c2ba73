"""How a frozen model becomes a float flatbuffer."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import kqat
import tflite_export
from tests.tflite_export.small_models import operators
from tflite_export import flatbuffer
from tflite_export.lowering import converter, lower
from tflite_export.lowering.converter import with_whole_pairs


class Noisy(L.Layer):
    """Adds something in training, which is its default, as that of Keras's augmenting layers."""

    def call(self, x: Any, training: bool = True) -> Any:
        return x + 100.0 if training else x * 2.0


def test_layers_run_as_in_inference_whatever_their_default() -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, L.Dense(2)(Noisy(name="noisy")(L.Dense(3)(inputs))))
    x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    qat = kqat.quantize_model(model, {"noisy": None}, calibration_data=x)
    names = operators(flatbuffer.read(tflite_export.convert(qat)))
    assert "MUL" in names
    assert "ADD" not in names


def test_ends_keep_the_order_of_the_model_beyond_ten() -> None:
    inputs = [keras.Input((size,), name=f"x{size}") for size in range(1, 13)]
    outputs = [L.Dense(size + 1, name=f"y{size}")(x) for size, x in enumerate(inputs, 1)]
    model = keras.Model(inputs, outputs)
    x = [np.ones((4, size), np.float32) for size in range(1, 13)]
    frozen = kqat.freeze(kqat.quantize_model(model, calibration_data=x))
    lowered = lower(frozen, batch_size=3)
    graph, signature = lowered.subgraphs[0], lowered.signatureDefs[0]
    for tensors, entries, extra in (
        (graph.inputs, signature.inputs, 0),
        (graph.outputs, signature.outputs, 1),
    ):
        shapes = [flatbuffer.tensor_shape(graph.tensors[int(t)]) for t in tensors]
        assert shapes == [(3, size + extra) for size in range(1, 13)]
        assert [int(entry.tensorIndex) for entry in entries] == [int(t) for t in tensors]


def test_names_that_keras_takes_and_tensorflow_refuses_at_the_root() -> None:
    inputs = keras.Input((4,), name="_x")
    hidden = L.Dense(3, name="_hidden", activation="relu")(inputs)
    model = keras.Model(inputs, L.Dense(2, name="-last")(hidden), name="_net")
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    blob = tflite_export.convert(qat)
    assert all(part.is_right for part in tflite_export.verify(qat, blob, x).runtimes)


def _gates(x: Any) -> Any:
    """Two dilated convolutions that read the same values, as WaveNet's gates do."""
    options: dict[str, Any] = {"dilation_rate": 2, "padding": "causal"}
    return L.Multiply()([L.Conv1D(4, 2, activation=a, **options)(x) for a in ("tanh", "sigmoid")])


def _pyramid(x: Any) -> Any:
    """Dilated convolutions of all kinds side by side, as in atrous spatial pyramid pooling."""
    rates = [2, 2, (2, 3)]
    full = [L.Conv2D(4, 3, dilation_rate=rate, padding="same")(x) for rate in rates]
    depthwise = [L.DepthwiseConv2D(3, dilation_rate=r, padding="same")(x) for r in rates]
    return L.Concatenate()([*full, *depthwise])


def _separable(x: Any) -> Any:
    return L.Add()([L.SeparableConv1D(3, 3, dilation_rate=2, padding="same")(x) for _ in range(2)])


@pytest.mark.parametrize(
    ("shape", "call"), [((9, 3), _gates), ((7, 8, 3), _pyramid), ((9, 3), _separable)]
)
def test_dilated_convolutions_of_one_value_are_one_operator_each(
    shape: tuple[int, ...], call: Any
) -> None:
    inputs = keras.Input(shape)
    model = keras.Model(inputs, call(inputs))
    x = np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    blob = tflite_export.convert(qat)
    names = operators(flatbuffer.read(blob))
    layers = [layer for layer in model.layers if "conv" in layer.name]
    each = 2 if call is _separable else 1
    assert sum(name.endswith("CONV_2D") for name in names) == each * len(layers)
    assert all(part.is_right for part in tflite_export.verify(qat, blob, x).runtimes)


@pytest.mark.parametrize("policy", [{}, {"times": None}], ids=["integer", "float"])
@pytest.mark.parametrize("shape", [(3,), (6, 6, 3)], ids=["few", "many"])
def test_tensors_that_a_layer_closes_over_are_constants(policy: Any, shape: Any) -> None:
    """TensorFlow lists them among the inputs of an exported function."""
    factors = tf.constant(np.linspace(1, 2, int(np.prod(shape))).reshape(shape), tf.float32)
    inputs = keras.Input((6, 6, 3))
    hidden = L.Lambda(lambda x: x * factors, name="times")(L.Dense(3)(inputs))
    check_ships(keras.Model(inputs, L.Dense(2)(hidden)), policy)


def test_losses_of_training_are_none_of_the_files() -> None:
    """A regularizer holds its factor as a tensor."""
    inputs = keras.Input((6, 6, 3))
    hidden = L.Conv2D(4, 3, activation="relu", activity_regularizer="l1")(inputs)
    hidden = L.ActivityRegularization(1e-3)(hidden)
    check_ships(keras.Model(inputs, L.Dense(2, activity_regularizer="l2")(hidden)), {})


def check_ships(model: keras.Model, policy: Any) -> None:
    x = np.random.default_rng(0).normal(size=(32, 6, 6, 3)).astype(np.float32)
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, x, samples=8)
    assert all(part.is_right and not part.unmatched for part in report.runtimes)


def test_a_variable_that_is_no_layers_own_is_named() -> None:
    factors = tf.Variable([1.0, 2.0, 3.0])
    inputs = keras.Input((6, 6, 3))
    hidden = L.Lambda(lambda x: x * factors, name="times")(L.Dense(3)(inputs))
    model, x = keras.Model(inputs, L.Dense(2)(hidden)), np.ones((4, 6, 6, 3), np.float32)
    qat = kqat.quantize_model(model, {"times": None}, calibration_data=x)
    with pytest.raises(kqat.LoweringError, match=r"variable behind.*add_weight"):
        tflite_export.convert(qat)


@pytest.mark.parametrize("units", [1, 3])
def test_a_pair_without_its_dequantize_is_made_whole(units: int) -> None:
    """Converters before TensorFlow 2.20 leave it out before a FULLY_CONNECTED."""
    inputs = keras.Input((4,))
    hidden = L.Dense(units, activation="relu", name="first")(inputs)
    model = keras.Model(inputs, [L.Dense(2)(hidden), L.Dense(3)(hidden)])
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    marked = lower(kqat.freeze(kqat.quantize_model(model, calibration_data=x)))
    whole = [flatbuffer.op_name(marked, o) for o in marked.subgraphs[0].operators]
    graph = marked.subgraphs[0]
    sources = {
        int(o.outputs[0]): int(o.inputs[0])
        for o in graph.operators
        if flatbuffer.op_name(marked, o) == "DEQUANTIZE"
    }
    readers = {
        int(t) for o in graph.operators for t in o.inputs
        if flatbuffer.op_name(marked, o) == "FULLY_CONNECTED"
    }  # fmt: skip
    graph.operators = [
        o for o in graph.operators
        if not (flatbuffer.op_name(marked, o) == "DEQUANTIZE" and int(o.outputs[0]) in readers)
    ]  # fmt: skip
    for operator in graph.operators:
        operator.inputs = [sources.get(int(t), int(t)) for t in operator.inputs]
    broken = len(graph.operators)
    with_whole_pairs(marked)
    assert broken < len(whole)
    assert [flatbuffer.op_name(marked, o) for o in graph.operators] == whole
    written = {int(t) for o in graph.operators for t in o.outputs}
    assert len(written) == len(graph.operators)


def test_tensorflow_does_not_read_the_file_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the method that is replaced; where it has not, a conversion only takes longer."""
    base = tf.compat.v1.lite.TFLiteConverter
    assert callable(base._optimize_tflite_model)
    assert converter._converter_class()._optimize_tflite_model(None, b"file", None) == b"file"
