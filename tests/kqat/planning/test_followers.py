"""Layers left float that compute nothing are as their neighbours are."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export


def sequence(*parts: Any) -> keras.Model:
    return keras.Sequential([keras.Input((4, 4, 2)), *parts])


def floats(model: keras.Model, policy: Any) -> tuple[str, ...]:
    return kqat.plan(model, policy).float_layers()


@pytest.mark.parametrize(
    "parts",
    [
        (L.Conv2D(3, 1), L.Dropout(0.1, name="odd"), L.Flatten(), L.Dense(3)),
        (L.Conv2D(3, 1), L.Dropout(0.1, name="odd_1"), L.Flatten(name="odd_2"), L.Dense(3)),
        (L.Flatten(name="odd_1"), L.Dropout(0.1, name="odd_2"), L.Dense(3)),
        (L.Conv2D(3, 1), L.Permute((3, 1, 2), name="odd")),
        (L.Dropout(0.1), L.Reshape((2, 8, 2), name="odd"), L.Conv2D(3, 1)),
    ],
    ids=["between", "chain", "first", "last", "behind_an_input"],
)
def test_beside_integers_they_are_integers(parts: tuple[Any, ...]) -> None:
    assert floats(sequence(*parts), {"odd*": None}) == ()


def test_operations_follow_as_layers_do() -> None:
    x = keras.Input((4, 4, 2))
    y = keras.ops.transpose(keras.ops.reshape(L.Conv2D(3, 1)(x), (-1, 16, 3)), (0, 2, 1))
    assert floats(keras.Model(x, L.Dense(3)(y)), {"reshape*": None, "transpose*": None}) == ()


def test_what_an_annotated_layer_hands_on_stays_an_integer() -> None:
    annotated = kqat.quantize_annotate_layer(L.Dense(4))
    model = keras.Sequential([keras.Input((4, 2)), L.Flatten(), annotated, L.Reshape((2, 2))])
    with pytest.warns(kqat.RangeWarning):
        qat = kqat.quantize_apply(model)
    kinds = [type(layer).__name__ for layer in qat.layers]
    assert "PrecisionBoundary" not in kinds


@pytest.mark.parametrize(
    "parts",
    [
        (L.Conv2D(3, 1, name="odd"), L.Flatten(name="odd_1"), L.Dense(3)),
        (L.Flatten(name="odd_1"), L.Dense(3, name="odd_2"), L.Dense(3)),
        (L.Conv2D(3, 1), L.MaxPooling2D(name="odd_1"), L.Flatten(), L.Dense(3)),
        (L.Conv2D(3, 1, name="odd"), L.Dropout(0.1), L.Flatten(name="odd_1"), L.Dense(3)),
    ],
    ids=["behind_a_float", "before_a_float", "a_maximum", "behind_a_float_dropout"],
)
def test_others_stay_float(parts: tuple[Any, ...]) -> None:
    names = {part.name for part in parts if part.name.startswith("odd")}
    assert set(floats(sequence(*parts), {"odd*": None})) == names


class Penalty(L.Layer):
    def call(self, x: Any) -> Any:
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return x


@pytest.mark.parametrize(
    "odd",
    [
        Penalty(name="odd"),
        L.Lambda(lambda x: x, name="odd"),
        L.Rescaling(1.0, name="odd"),
        L.ReLU(negative_slope=1.0, name="odd"),
    ],
    ids=["penalty", "lambda", "rescaling", "relu"],
)
def test_what_the_converter_would_take_out_is_an_integer(odd: L.Layer) -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), odd, L.Dense(2)])
    data = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    qat = kqat.quantize_model(model, {"odd": None}, calibration_data=data)
    operators = tflite_export.inspect(tflite_export.convert(qat)).counts()
    assert not {"QUANTIZE", "DEQUANTIZE"} & set(operators)
    model(data), qat(data)
    assert len(qat.losses) == len(model.losses)


def test_a_follower_has_the_width_of_its_neighbour() -> None:
    model = sequence(L.Conv2D(3, 1, name="wide"), L.Flatten(name="odd"), L.Dense(3, name="narrow"))
    decided = kqat.plan(model, {"wide": "int16x8", "odd": None})
    bits = {layer.name: layer.bits for layer in decided.layers}
    assert (bits["wide"], bits["odd"], bits["narrow"]) == (16, 16, 8)


def test_indexes_follow_nobody() -> None:
    x = keras.Input((2, 3), dtype="int32")
    y = L.Embedding(10, 4)(L.Reshape((6,), name="odd")(x))
    assert floats(keras.Model(x, L.Dense(3)(L.Flatten()(y))), {"odd": None}) == ("odd",)
