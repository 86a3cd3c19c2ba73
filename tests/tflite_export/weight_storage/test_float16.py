"""Weights of float layers in float16: half the bytes, at most one step on LiteRT."""

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from tests.newer_keras import needs_tensorflow
from tflite_export import flatbuffer


def _x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)


def _qat(policy: dict[str, None], size: float = 1.0) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input((16,), name="x")
    y = layers.Dense(32, activation="relu", name="left")(layers.Dense(32, name="a")(x))
    model = keras.Model(x, layers.Dense(4, name="b")(y))
    left = model.get_layer("left")
    left.kernel.assign(left.kernel * size)
    return kqat.quantize_model(model, policy, calibration_data=_x())


def test_float_weights_take_half_the_bytes() -> None:
    qat = _qat({"left": None})
    whole = tflite_export.convert(qat, target="litert")
    blob = tflite_export.convert(qat, target="litert", float_weights="float16")
    # 32 by 32 weights, less the operator that widens them.
    assert 1500 < len(whole) - len(blob) <= 2048
    report = tflite_export.verify(qat, blob, _x(), target="litert")
    for runtime in ("litert_reference", "litert"):
        part = report.on(runtime)
        # One step: a sum of weights that are rounded to 2**-11 of their size.
        assert (part.problem, part.unmatched, part.max_steps <= 1) == (None, (), True)
    model = flatbuffer.read(blob)
    halves = [
        flatbuffer.tensor_data(model, tensor)
        for tensor in model.subgraphs[0].tensors
        if tensor.type == tflite_export.flatbuffer.tree.schema.TensorType.FLOAT16
    ]
    (kernel,) = halves
    trained = np.asarray(qat.get_layer("left").kernel, np.float16).T
    np.testing.assert_array_equal(np.asarray(kernel).reshape(trained.shape), trained)


def test_a_model_without_float_layers_is_refused() -> None:
    with pytest.raises(
        kqat.ExportError, match=r"stays float, with 128 weights or more.*float_weights"
    ):
        tflite_export.convert(_qat({}), target="litert", float_weights="float16")


def test_what_float16_does_not_hold_is_refused() -> None:
    needs_tensorflow("2.21", "a constant that bears its layer's name")
    with pytest.raises(kqat.ExportError, match=r"within ±65504.*Received: '.*left.*'"):
        tflite_export.convert(_qat({"left": None}, 1e6), target="litert", float_weights="float16")


@pytest.mark.parametrize("target", [None, "tflite_micro", "ethos_u55", "edge_tpu"])
def test_other_targets_are_refused(target: str | None) -> None:
    with pytest.raises(kqat.TargetError, match="target='litert' with float_weights='float16'"):
        tflite_export.convert(_qat({"left": None}), target=target, float_weights="float16")


def test_other_types_are_refused() -> None:
    with pytest.raises(kqat.ExportError, match=r"'float32' or 'float16'. Received: 'bfloat16'"):
        tflite_export.convert(_qat({}), target="litert", float_weights="bfloat16")
