"""uint8 inputs: the file's integers are the bytes, on the scale of the Rescaling behind them."""

import warnings
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
from kqat.base import ExportError, ModelError, PolicyError
from kqat.parts import ByteInput

SHAPE = (6, 6, 3)
BYTES = np.random.default_rng(0).integers(0, 256, (16, *SHAPE)).astype(np.uint8)


class Unit(L.Layer):
    """Preprocessing as users write it."""

    def call(self, x: Any) -> Any:
        return ops.cast(x, "float32") / 127.5 - 1.0


def image_model(preprocess: Callable[[Any], Any]) -> keras.Model:
    x = keras.Input(SHAPE, dtype="uint8", name="image")
    y = L.Conv2D(4, 3, padding="same", name="stem")(preprocess(x))
    return keras.Model(x, L.Dense(3)(L.Flatten()(y)))


def byte_inputs(model: keras.Model, policy: Any = "int8") -> list[ByteInput]:
    nodes = kqat.plan(model, policy).graph.nodes
    return [node.layer for node in nodes if isinstance(node.layer, ByteInput)]


@pytest.mark.parametrize(
    ("preprocess", "scale", "zero_point"),
    [
        (lambda x: L.Rescaling(1 / 255)(x), 1 / 255, 0),
        (lambda x: L.Rescaling(1 / 127.5, -1)(x), 1 / 127.5, 128),
        (lambda x: (ops.cast(x, "float32") - 100.0) * 0.5, 0.5, 100),
        (lambda x: (x / 255.0 - 0.5) * 2.0, 1 / 127.5, 128),
        (lambda x: L.Rescaling(1 / 255)(x[..., ::-1]), 1 / 255, 0),
        (lambda x: L.Rescaling(1 / 255)(L.RandomFlip()(L.Resizing(4, 4)(x))), 1 / 255, 0),
        (lambda x: L.Normalization(axis=None, mean=128.0, variance=64.0**2)(x), 1 / 64, 128),
        (lambda x: Unit()(x), 1 / 127.5, 128),
        (lambda x: L.Lambda(lambda t: ops.cast(t, "float32") / 255.0)(x), 1 / 255, 0),
        (lambda x: L.Add()([L.Rescaling(0.5)(x), L.Rescaling(0.5)(x)]), 0.5, 0),
    ],
    ids=[
        "rescaling", "signed", "operations", "division", "backwards", "augmented",
        "normalization", "custom", "lambda", "two_readers",
    ],
)  # fmt: skip
def test_the_scale_of_bytes_is_that_of_the_preprocessing(
    preprocess: Callable[[Any], Any], scale: float, zero_point: int
) -> None:
    model = image_model(preprocess)
    (found,) = byte_inputs(model)
    assert found.scale == pytest.approx(scale, rel=1e-5)
    assert found.zero_point == zero_point
    kinds = {layer.kind for layer in kqat.plan(model).layers}
    assert not kinds & {"Rescaling", "Normalization", "WithConstant", "Lambda", "Unit"}


@pytest.mark.parametrize(
    "preprocess",
    [
        lambda x: L.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0])(x),
        lambda x: L.Rescaling(-1 / 255, 1.0)(x),
        lambda x: L.Rescaling(1 / 255, 5.0)(x),
        lambda x: L.Concatenate()([L.Rescaling(1 / 255)(x), L.Rescaling(1 / 127.5, -1)(x)]),
        lambda x: L.Rescaling(1 / 255)(L.RandomContrast(0.2)(x)),
        lambda x: L.Rescaling(1 / 255)(L.ZeroPadding2D(1)(x)),
    ],
    ids=["per_channel", "negative", "zero_outside", "two_scales", "contrast", "padding"],
)
def test_other_preprocessing_is_a_layer_of_integers(preprocess: Callable[[Any], Any]) -> None:
    model = image_model(preprocess)
    (found,) = byte_inputs(model)
    assert (found.scale, found.zero_point) == (1.0, 0)
    assert not kqat.plan(model).float_layers()


def quantized(model: keras.Model, policy: Any = "int8", data: Any = BYTES) -> keras.Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kqat.CalibrationWarning)  # few samples
        return kqat.quantize_model(model, policy, calibration_data=data)


def operators(blob: bytes) -> list[str]:
    return [operator.name for operator in tflite_export.inspect(blob).operators]


@pytest.mark.slow
def test_bytes_go_in_and_the_rescaling_is_no_operator(tmp_path: Path) -> None:
    model = image_model(lambda x: L.Rescaling(1 / 127.5, -1)(x))
    qat = quantized(model)
    qat.compile("sgd", "mse")
    qat.fit(BYTES, np.zeros((16, 3), np.float32), verbose=0)
    qat.save(tmp_path / "qat.keras")
    qat = keras.models.load_model(tmp_path / "qat.keras")
    expected = qat.predict(BYTES, verbose=0)
    for asked, dtype, first in ((None, "uint8", ["QUANTIZE"]), ("int8", "int8", [])):
        blob = tflite_export.convert(qat, inference_input_type=asked)
        (entry,) = tflite_export.inspect(blob).inputs
        zero = {"uint8": 128, "int8": 0}[dtype]
        assert (entry.name, entry.dtype, entry.zero_point) == ("image", dtype, zero)
        assert entry.scale == pytest.approx(1 / 127.5)
        assert operators(blob) == [*first, "CONV_2D", "FULLY_CONNECTED"]
        report = tflite_export.verify(qat, blob, BYTES, runtimes=("litert",))
        assert all(site.max_steps == 0 for site in report.runtimes[0].sites)
        assert not report.runtimes[0].unmatched
    np.testing.assert_allclose(kqat.integer_model(qat).predict(BYTES, verbose=0), expected)
    assert kqat.strip(qat).inputs[0].dtype == "uint8"
    with pytest.raises(ExportError, match=r"'uint8' or 'int8' for 'image'.*float32"):
        tflite_export.convert(qat, inference_input_type="float32")


def test_pixels_beside_other_values_are_requantized() -> None:
    image, more = keras.Input(SHAPE, dtype="uint8", name="image"), keras.Input(SHAPE, name="more")
    joined = L.Concatenate()([L.Rescaling(1 / 255)(image), more])
    model = keras.Model([image, more], L.Conv2D(2, 1)(joined))
    floats = 3 * np.random.default_rng(1).normal(size=BYTES.shape).astype(np.float32)
    qat = quantized(model, data=[BYTES, floats])
    blob = tflite_export.convert(qat)
    assert [entry.dtype for entry in tflite_export.inspect(blob).inputs] == ["uint8", "int8"]
    report = tflite_export.verify(qat, blob, [BYTES, floats], runtimes=("litert",))
    assert report.runtimes[0].is_right and not report.runtimes[0].unmatched


@pytest.mark.parametrize(
    ("policy", "op"),
    [
        ("int16x8", "QUANTIZE"),
        ({"stem": None}, "DEQUANTIZE"),
        ({L.Rescaling: None, "stem": None}, "CAST"),
    ],
)
def test_bytes_before_wide_and_float_layers(policy: Any, op: str) -> None:
    qat = quantized(image_model(lambda x: L.Rescaling(1 / 255)(x)), policy)
    blob = tflite_export.convert(qat)
    assert tflite_export.inspect(blob).inputs[0].dtype == "uint8"
    assert op in operators(blob)
    report = tflite_export.verify(qat, blob, BYTES, runtimes=("litert",))
    assert report.runtimes[0].is_right


def test_what_takes_bytes_for_something_else_is_named() -> None:
    x = keras.Input((4,), dtype="uint8", name="tokens")
    with pytest.raises(ModelError, match=r"type OneHot, which takes them for indexes.*int32"):
        kqat.plan(keras.Model(x, L.Dense(2)(ops.one_hot(x, 9))))
    with pytest.raises(ModelError, match=r"type Add, which computes with bytes, modulo 256"):
        kqat.plan(keras.Model(x, L.Dense(2)(ops.cast(x + x, "float32"))))
    with pytest.raises(PolicyError, match=r"no rule for input 'tokens' of dtype uint8"):
        kqat.plan(
            keras.Model(x, L.Dense(2)(L.Rescaling(0.1)(x))), {"tokens": kqat.QuantizeConfig()}
        )
