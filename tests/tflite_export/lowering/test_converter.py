"""How a frozen model becomes a float flatbuffer."""

from typing import Any

import keras
import numpy as np
from keras import layers as L

import kqat
import tflite_export
from tests.tflite_export.small_models import operators
from tflite_export import flatbuffer
from tflite_export.lowering import lower


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
