"""A rewritten layer takes the sizes of each call: not those of the first, nor those declared."""

from collections.abc import Callable

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export

_IMAGES = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype(np.float32)


def _head_over_levels() -> keras.Model:
    """One head for two levels of a pyramid, as in FCOS and RetinaNet."""
    x = keras.Input((8, 8, 3))
    fine = layers.Conv2D(8, 3, padding="same")(x)
    coarse = layers.MaxPooling2D()(fine)
    parts = [
        layers.Conv2D(8, 3, padding="same"),
        layers.GroupNormalization(2),
        layers.ReLU(),
        layers.CenterCrop(4, 4),
        layers.AdaptiveAveragePooling2D(2),
        layers.Conv2D(2, 1),
    ]
    outputs = []
    for level in (fine, coarse):
        for part in parts:
            level = part(level)
        outputs.append(level)
    return keras.Model(x, outputs)


def _open_backbone() -> keras.Model:
    """A backbone that leaves its sizes open, called at fixed ones."""
    x = keras.Input((None, None, 3))
    y = layers.GroupNormalization(2)(layers.Conv2D(8, 3, padding="same")(x))
    y = layers.AdaptiveAveragePooling2D(2)(layers.CenterCrop(6, 6)(y))
    backbone = keras.Model(x, y)
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(backbone(inputs))))


@pytest.mark.parametrize("build", [_head_over_levels, _open_backbone])
def test_sizes_are_those_of_the_call(build: Callable[[], keras.Model]) -> None:
    keras.utils.set_random_seed(0)
    model = build()
    qat = kqat.quantize_model(model, calibration_data=_IMAGES)
    blob = tflite_export.convert(qat)
    assert tflite_export.inspect(blob).float_operators == 0
    report = tflite_export.verify(qat, blob, _IMAGES, samples=4)
    assert all(part.is_right and not part.unmatched for part in report.runtimes)
    pairs = zip(keras.tree.flatten(model(_IMAGES)), keras.tree.flatten(qat(_IMAGES)), strict=True)
    for expected, found in pairs:
        noise = np.mean(np.square(np.asarray(expected) - np.asarray(found)))
        assert noise < 10**-2.4 * np.mean(np.square(expected))
