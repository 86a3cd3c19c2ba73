"""A QAT model that is no longer whole is refused by the name of what is wrong with it."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat


@pytest.fixture(scope="module")
def qat() -> keras.Model:
    """Conv2D with ReLU, mean, Dense."""
    x = keras.Input((6, 6, 3), name="x")
    y = layers.GlobalAveragePooling2D(name="mean")(layers.Conv2D(4, 3, activation="relu")(x))
    model = keras.Model(x, layers.Dense(3, name="head")(y))
    data = np.random.default_rng(0).uniform(-1, 1, (512, 6, 6, 3)).astype(np.float32)
    return kqat.quantize_model(model, calibration_data=data)


@pytest.mark.parametrize("kind", [kqat.QuantizeWrapper, layers.GlobalAveragePooling2D])
def test_a_part_that_ends_before_its_rounding_is_told_where_to_end(
    qat: keras.Model, kind: Any
) -> None:
    last = next(layer for layer in qat.layers if isinstance(layer, kind))
    with pytest.raises(kqat.ModelError, match=f"ends at '{last.name}'.*ActivationQuantizer"):
        kqat.freeze(keras.Model(qat.input, last.output))


def test_a_part_that_ends_at_a_rounding_is_whole(qat: keras.Model) -> None:
    for layer in qat.layers:
        if isinstance(layer, kqat.ActivationQuantizer):
            assert kqat.freeze(keras.Model(qat.input, layer.output)).sites


def test_a_layer_that_was_added_inside_is_not_called_an_end(qat: keras.Model) -> None:
    added = layers.Dense(2, name="added")(qat.output)
    with pytest.raises(kqat.ModelError, match=r"'added', '\w+' was added after(?!.*ends at)"):
        kqat.freeze(keras.Model(qat.input, [qat.output, layers.ReLU()(added)]))
