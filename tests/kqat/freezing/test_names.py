"""Names carry no data: a user's layers may bear any, and keep them in reports and files."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from kqat.base import ModelError
from kqat.grids import MovingAverage, QuantSpec
from kqat.training import ActivationQuantizer, QuantizedRecurrence, QuantizeWrapper


def data(model: keras.Model) -> np.ndarray:
    shape = (16, *model.inputs[0].shape[1:])
    return np.random.default_rng(0).random(shape).astype(np.float32)


def generated() -> keras.Model:
    """Names as wrapping, freezing and lowering make them."""
    x = keras.Input((8, 8, 3), name="image_quantizer")
    conv = L.Conv2D(4, 3, name="conv")(x)
    y = L.Add(name="conv_quantizer")([L.Conv2D(4, 3, name="quant_conv")(x), conv])
    y = L.Conv2D(4, 3, name="kqat_marker_0")(L.ReLU(name="precision_boundary")(y))
    y = L.Rescaling(2.0, 1.0, name="kqat_fence_1")(L.Activation("gelu", name="kqat_clamp_1")(y))
    y = L.GlobalAveragePooling2D(name="quant_conv_quantizer")(y)
    y = L.Rescaling(3.0, 1.0, name="r")(L.Rescaling(2.0, 0.0, name="kqat_r_image")(y))
    y = L.Activation("gelu", name="g_table_0")(L.Activation("gelu", name="g")(y))
    return keras.Model(x, L.Dense(3, name="g_table_0_marker")(y))


def called_again() -> keras.Model:
    x = keras.Input((6,), name="x")
    dense = L.Dense(6, name="a")
    y = L.Dense(6, name="a_2")(dense(dense(dense(x))))
    return keras.Model(x, L.Add(name="a_call2")([y, x]))


def recurrent() -> keras.Model:
    x = keras.Input((3, 4), name="x")
    y = L.LSTM(3, return_sequences=True, go_backwards=True, name="lstm")(x)
    for name in ("lstm_backwards", "lstm_stand_in", "quant_lstm_stack", "quant_lstm_zeros_0"):
        y = L.Activation("gelu", name=name)(y)
    y = L.LSTM(3, name="quant_lstm")(y)
    for name in ("quant_lstm_last", "quant_lstm_last_slice", "quant_quant_lstm_unstack_0"):
        y = L.Dense(2, name=name)(y)
    return keras.Model(x, y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "fused"),
    [(generated, ()), (called_again, ()), (recurrent, ()), (recurrent, ("lstm", "quant_lstm"))],
)
def test_layers_keep_their_names(make: Any, fused: tuple[str, ...]) -> None:
    model = make()
    x = data(model)
    whole = kqat.QuantizeConfig(recurrence="fused")
    qat = kqat.quantize_model(model, dict.fromkeys(fused, whole), calibration_data=x)
    report = tflite_export.verify(qat, tflite_export.convert(qat), x, runtimes=["litert_reference"])
    assert report.on("litert_reference").unmatched == ()
    assert report.on("litert_reference").max_steps <= 1
    rows = [row.name for row in report.layers]
    assert len(set(rows)) == len(rows)
    inside = {"conv", "quant_conv", "conv_quantizer"}  # computed inside another's kernel
    named = {layer.name for layer in model.layers if not isinstance(layer, L.LSTM)}
    assert named - inside <= set(rows)
    assert {layer.name for layer in model.layers} <= {
        layer.name for layer in kqat.strip(qat).layers
    }


def test_older_files_name_their_layers_by_prefix_and_suffix() -> None:
    config = ActivationQuantizer(QuantSpec(), MovingAverage(), name="relu_quantizer").get_config()
    assert ActivationQuantizer.from_config(dict(config)).label == "relu_quantizer"
    del config["label"]
    assert ActivationQuantizer.from_config(config).label == "relu"

    x = keras.Input((3, 4), name="x")
    model = keras.Model(x, L.SimpleRNN(2, name="rnn")(x))
    recurrence = kqat.quantize_model(model, calibration_data=data(model)).get_layer("quant_rnn")
    config = recurrence.get_config()
    assert config.pop("label") == "rnn"
    assert QuantizedRecurrence.from_config(config).label == "rnn"


def test_older_files_take_their_facts_from_the_stock_table() -> None:
    grid = QuantSpec(symmetric=True, narrow_range=True)
    wrapper = QuantizeWrapper(L.DepthwiseConv2D(3), {"depthwise_kernel": grid}, name="quant_d")
    config = wrapper.get_config()
    del config["facts"]
    assert QuantizeWrapper.from_config(config).facts == wrapper.facts
    assert wrapper.facts.channel_axes == {"kernel": (-2, -1)}


def backbone() -> tuple[keras.Model, np.ndarray]:
    model = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(4, 3, activation="relu")])
    x = data(model)
    return kqat.quantize_model(model, calibration_data=x), x


def test_layers_behind_a_qat_model_are_named() -> None:
    qat, _ = backbone()
    pooled = L.GlobalAveragePooling2D(name="pool")(qat.output)
    model = keras.Model(qat.input, L.Dense(3, name="new_head")(pooled))
    with pytest.raises(ModelError, match=r"'pool', 'new_head' was added .*kqat\.quantize_model"):
        tflite_export.convert(model)


def test_layers_before_a_qat_model_are_named() -> None:
    qat, _ = backbone()
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, qat(L.Rescaling(0.5, name="new_scaling")(x)))
    with pytest.raises(ModelError, match=r"'new_scaling' was added"):
        tflite_export.convert(model)


def test_layers_that_move_integers_may_be_added() -> None:
    qat, x = backbone()
    model = keras.Model(qat.input, L.Flatten(name="new_flat")(L.Dropout(0.5)(qat.output)))
    blob = tflite_export.convert(model)
    report = tflite_export.verify(model, blob, x, runtimes=["litert_reference"])
    assert report.float_operators == 0
