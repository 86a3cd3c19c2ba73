"""Models that leave sizes open are quantized at given sizes, or at those of the data."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export


def _convolutional() -> keras.Model:
    x = keras.Input((None, None, 3), name="image")
    y = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    return keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling2D()(y)))


class _Words(keras.Model):
    """A subclassed model of any number of steps, as Keras recorded it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x: Any) -> Any:
        return ops.mean(self.dense(x), axis=1)


def _subclassed() -> keras.Model:
    model = _Words()
    model(keras.Input((None, 5)))
    return model


def _two_inputs() -> keras.Model:
    words = keras.Input((None,), dtype="int32", name="words")
    weights = keras.Input((None, 1), name="weights")
    rows = layers.Multiply()([layers.Embedding(10, 4)(words), weights])
    outputs = layers.Dense(2)(layers.GlobalAveragePooling1D()(rows))
    return keras.Model({"words": words, "weights": weights}, outputs)


def _nested() -> keras.Model:
    image, age = keras.Input((None, None, 3), name="image"), keras.Input((2,), name="age")
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, padding="same")(image))
    both = layers.Concatenate()([pooled, age])
    return keras.Model({"camera": {"image": image}, "age": age}, layers.Dense(2)(both))


class _OfNested(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = layers.Dense(3), layers.Dense(3)

    def call(self, x: Any) -> Any:
        return self.left(x["camera"]["rows"]) + self.right(x["pair"][1])


def _subclassed_of_nested() -> keras.Model:
    model = _OfNested()
    model(_SUBCLASSED)
    return model


_random = np.random.default_rng(0)
_IMAGES = _random.normal(size=(64, 8, 12, 3)).astype(np.float32)
_STEPS = _random.normal(size=(64, 7, 5)).astype(np.float32)
_BOTH = {
    "weights": _random.uniform(0, 1, (64, 6, 1)).astype(np.float32),
    "words": _random.integers(0, 10, (64, 6), dtype=np.int32),
}
_NESTED = {"camera": {"image": _IMAGES}, "age": _random.normal(size=(64, 2)).astype(np.float32)}
_SUBCLASSED = {"camera": {"rows": _STEPS[:, 0]}, "pair": [_STEPS[:, 1], _STEPS[:, 2, :4]]}
MODELS: dict[str, tuple[Callable[[], keras.Model], Any, dict[str, tuple[int, ...]]]] = {
    "convolutional": (_convolutional, _IMAGES, {"image": (8, 12, 3)}),
    "subclassed": (_subclassed, _STEPS, {"input": (7, 5)}),
    "two inputs": (_two_inputs, _BOTH, {"words": (6,), "weights": (6, 1)}),
    "nested dicts": (_nested, _NESTED, {"image": (8, 12, 3), "age": (2,)}),
    "nested, subclassed": (
        _subclassed_of_nested,
        _SUBCLASSED,
        {"camera_rows": (5,), "pair_0": (5,), "pair_1": (4,)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_open_sizes_are_those_of_the_data(name: str) -> None:
    build, data, shapes = MODELS[name]
    model = build()
    qat = kqat.quantize_model(model, calibration_data=data)
    assert [tuple(t.shape[1:]) for t in qat.inputs] == [
        shapes.get(t.name, next(iter(shapes.values()))) for t in qat.inputs
    ]
    expected, found = np.asarray(model(data)), np.asarray(qat(data))
    assert np.max(np.abs(expected - found)) < 0.05 * np.max(np.abs(expected))
    blob = tflite_export.convert(qat)
    assert sorted(t.shape[1:] for t in tflite_export.inspect(blob).inputs) == sorted(
        shapes.values()
    )


def test_batches_that_can_be_read_twice_give_sizes_too() -> None:
    import tensorflow as tf

    batches = tf.data.Dataset.from_tensor_slices((_IMAGES, np.zeros(64))).batch(16)
    qat = kqat.quantize_model(_convolutional(), calibration_data=batches)
    assert qat.input_shape == (None, 8, 12, 3)
    # The batch that told the sizes was calibrated with, like all others.
    same = kqat.quantize_model(_convolutional(), calibration_data=[_IMAGES])
    assert same.input_shape == qat.input_shape


def test_sizes_can_be_given() -> None:
    model = _two_inputs()
    by_name = {"weights": (6, 1), "words": (6,)}
    for shapes in (by_name, [(6,), [6, 1]]):
        assert kqat.plan(model, input_shapes=shapes).layers
    with pytest.warns(kqat.RangeWarning):
        qat = kqat.quantize_model(_convolutional(), input_shapes=(16, 16, 3))
    assert qat.input_shape == (None, 16, 16, 3)
    generator = (batch for batch in [_IMAGES])
    qat = kqat.quantize_model(_convolutional(), calibration_data=generator, input_shapes=(8, 12, 3))
    assert qat.input_shape == (None, 8, 12, 3)


def test_layers_keep_their_names() -> None:
    """Policies name layers as the user named them, also where the sizes were open."""
    x = keras.Input((None, None, 3), name="image")
    y = layers.GlobalAveragePooling2D(name="mean")(layers.Conv2D(4, 3, name="conv")(x))
    model = keras.Model(x, layers.Dense(2, name="head")(y), name="open")
    plan = kqat.plan(model, {"conv": None}, input_shapes=(8, 8, 3))
    assert [layer.name for layer in plan.layers] == ["conv", "mean", "head"]
    assert plan.float_layers() == ("conv",)


def test_a_generator_cannot_tell_sizes() -> None:
    generator = (batch for batch in [_IMAGES])
    with pytest.raises(kqat.ModelError, match=r"input 'image' .*input_shapes=\(64, 64, 3\)"):
        kqat.quantize_model(_convolutional(), calibration_data=generator)


@pytest.mark.parametrize(
    "shapes", [(16, 16, 4), (16, 16), (None, 16, 3), (0, 16, 3), {"picture": (16, 16, 3)}, 7]
)
def test_shapes_that_do_not_fit_are_named(shapes: Any) -> None:
    with pytest.raises(kqat.ModelError, match=r"Expected a shape .*Received"):
        kqat.plan(_convolutional(), input_shapes=shapes)


def test_a_fixed_model_stays_as_it_is() -> None:
    x = keras.Input((8, 8, 3), name="image")
    model = keras.Model(x, layers.Dense(2)(layers.Flatten()(x)))
    assert kqat.plan(model, input_shapes={"image": (8, 8, 3)}) == kqat.plan(model)
