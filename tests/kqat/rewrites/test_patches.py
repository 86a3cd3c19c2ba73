"""Patches of images are the numbers of the image, at every size, stride, rate and padding."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from tests.newer_keras import needs_keras

_IMAGES = np.random.default_rng(0).normal(size=(64, 7, 9, 2)).astype(np.float32)
_VOLUMES = np.random.default_rng(0).normal(size=(64, 4, 5, 6, 2)).astype(np.float32)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "edge to edge": ({"size": 3, "padding": "valid"}, "SPACE_TO_DEPTH"),
    "edge to edge, padded": ({"size": 2, "padding": "same"}, "SPACE_TO_DEPTH"),
    "oblong": ({"size": (2, 3)}, "STRIDED_SLICE"),
    "overlapping": ({"size": 3, "strides": 2, "padding": "same"}, "STRIDED_SLICE"),
    "dilated": ({"size": 2, "strides": 1, "dilation_rate": 3}, "STRIDED_SLICE"),
    "single": ({"size": 1, "strides": 2}, "STRIDED_SLICE"),
    "volumes": ({"size": (2, 2, 3)}, "STRIDED_SLICE"),
}


@pytest.mark.parametrize("case", CASES)
def test_patches_are_copies(case: str) -> None:
    options, operator = CASES[case]
    if "strides" in options:
        needs_keras("3.13", "extract_patches with strides")
    if case == "volumes":
        needs_keras("3.14", "extract_patches of volumes")
    data = _VOLUMES if case == "volumes" else _IMAGES
    x = keras.Input(data.shape[1:])
    model = keras.Model(x, ops.image.extract_patches(x, **options))
    qat = kqat.quantize_model(model, calibration_data=data)
    blob = tflite_export.convert(qat)
    assert operator in [o.name for o in tflite_export.inspect(blob).operators]
    report = tflite_export.verify(qat, blob, data, samples=4)
    assert all(part.max_steps == 0 for part in report.runtimes if part.problem is None)
    step = tflite_export.inspect(blob).outputs[0].scale
    assert step is not None
    assert np.max(np.abs(np.asarray(model(data)) - np.asarray(qat(data)))) <= 0.51 * step


def test_patches_feed_a_transformer_as_keras_io_teaches_it() -> None:
    class Patches(layers.Layer):
        def call(self, images: Any) -> Any:
            patches = ops.image.extract_patches(images, size=3)
            return ops.reshape(patches, (ops.shape(images)[0], 6, 18))

    x = keras.Input(_IMAGES.shape[1:])
    model = keras.Model(x, layers.Dense(4)(Patches()(x)))
    qat = kqat.quantize_model(model, calibration_data=_IMAGES)
    assert tflite_export.inspect(tflite_export.convert(qat)).float_operators == 0


def test_patches_of_images_with_their_channels_first() -> None:
    x = keras.Input((2, 8, 8))
    model = keras.Model(x, ops.image.extract_patches(x, 2, data_format="channels_first"))
    assert [layer.kind for layer in kqat.plan(model).layers] == [
        "Permute",
        "SpaceToDepth",
        "Permute",
    ]
