"""Functions that move, pick or add values: their layers compute the same, on as few axes."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from kqat.graph import operations_between
from kqat.parts.single_op_layers import sliced
from tests.kqat.graph.test_tracing_of_calls import _parts
from tests.newer_keras import needs_keras

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
AROUND = ((0, 0), (2, 1), (0, 3), (0, 0))
ORDER = (0, 5, 1, 4, 3, 6, 2)


def _model(*outputs: Callable[[Any], Any]) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3), name="x")
    y = layers.Conv2D(4, 1, name="conv")(x)
    return keras.Model(x, [layers.Identity(name=f"y{i}")(f(y)) for i, f in enumerate(outputs)])


def _patches(x: Any, *args: Any, **options: Any) -> Any:
    needs_keras("3.13", "extract_patches with strides")
    return ops.image.extract_patches(x, *args, **options)


def _pooled(x: Any) -> Any:
    return layers.MaxPooling2D(3, 2)(
        ops.pad(x, ((0, 0), (1, 1), (0, 2), (0, 0)), constant_values=-np.inf)
    )


CALLS: dict[str, Callable[[Any], Any]] = {
    "the lowest number": _pooled,
    "a number": lambda x: ops.pad(x, AROUND, constant_values=7.0),
    "mirrored": lambda x: ops.pad(x, AROUND, "reflect"),
    "mirrored with the edge": lambda x: ops.pad(x, AROUND, "symmetric"),
    "patches side by side": lambda x: ops.image.extract_patches(x, (4, 4)),
    "patches that overlap": lambda x: _patches(x, (3, 2), 2, padding="same"),
    "patches with gaps": lambda x: _patches(x, (3, 3), 1, 2),
    "indexes of an axis": lambda x: ops.take_along_axis(x, np.int32([[[[3, 0, 1]]]]), axis=3),
    "other indexes at each place": lambda x: ops.take_along_axis(
        x, np.random.default_rng(0).integers(0, 8, (1, 8, 5, 1)), axis=2
    ),
    "stacked rows": lambda x: ops.stack([x, x[:, ::-1], x], axis=1),
    "stacked before the last": lambda x: ops.stack(ops.split(x, 2, axis=-1), axis=-2),
    "stacked behind the last": lambda x: ops.stack([x, x[:, ::-1]], axis=-1),
    "zeros": lambda x: ops.concatenate([x, ops.zeros_like(x)], axis=-1),
    "ones and threes": lambda x: x * ops.full_like(x, 3.0) + ops.ones_like(x),
    "seven axes": lambda x: ops.transpose(ops.reshape(x, (-1, 2, 4, 2, 4, 2, 2)), ORDER),
    "windows": lambda x: ops.transpose(ops.reshape(x, (-1, 2, 4, 2, 4, 4)), (0, 1, 3, 2, 4, 5)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_layers_compute_what_the_function_computes(call: Callable[[Any], Any]) -> None:
    model = _model(call)
    np.testing.assert_allclose(_parts(model)(IMAGES)[0], model(IMAGES)[0], rtol=1e-5, atol=1e-6)


def test_a_stack_is_reshaped_once() -> None:
    """Rotary positions of KerasHub stack two halves and flatten them again."""
    qat = kqat.quantize_model(_model(CALLS["stacked before the last"]), calibration_data=IMAGES)
    found = [op.name for op in tflite_export.inspect(tflite_export.convert(qat)).operators]
    assert found.count("CONCATENATION") == 1 and found.count("RESHAPE") == 1


@pytest.mark.parametrize("dtype", ["float32", "int32", "bool"])
@pytest.mark.parametrize(
    ("key", "kind"),
    [((..., None), layers.Reshape), ((slice(None), slice(0, 4)), layers.Identity)],
)
def test_what_takes_all_of_a_value_is_no_slice(key: Any, kind: type, dtype: str) -> None:
    x = keras.Input((4, 3), dtype=dtype)
    y = sliced(x, key, "y")
    assert [type(layer) for layer in operations_between([x], y)] == [kind]
    values = np.arange(24).reshape(2, 4, 3).astype(dtype)
    np.testing.assert_array_equal(keras.Model(x, y)(values), values[key])


def test_zeros_of_indexes_are_indexes() -> None:
    x = keras.Input((5,), dtype="int32", name="tokens")
    table = layers.Embedding(10, 4, name="table")
    model = keras.Model(x, table(x) + layers.Embedding(2, 4)(ops.zeros_like(x)))
    tokens = RNG.integers(0, 10, (3, 5)).astype(np.int32)
    np.testing.assert_allclose(_parts(model)(tokens), model(tokens), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.pad(x, AROUND, "edge"), r"mode 'constant', 'reflect'.*'edge'"),
        (
            lambda x: ops.take_along_axis(x, ops.argmax(x, axis=-1, keepdims=True), axis=-1),
            "constant indices into a tensor in operation 'take_along_axis'",
        ),
    ],
)
def test_what_no_layer_computes_is_named(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(kqat.UnsupportedLayerError, match=message):
        kqat.plan(_model(call))


@pytest.mark.parametrize("shape", [(5, 3), (5,)], ids=["rows", "numbers"])
def test_rows_are_picked_at_computed_places(shape: tuple[int, ...]) -> None:
    """As the heads of masked language models do."""
    x, places = keras.Input(shape), keras.Input((2,), dtype="int32", name="places")
    indices = ops.expand_dims(places, -1) if len(shape) == 2 else places
    model = keras.Model([x, places], ops.take_along_axis(x, indices, axis=1))
    data = [RNG.normal(size=(32, *shape)).astype(np.float32), RNG.integers(0, 5, (32, 2))]
    data[1] = data[1].astype(np.int32)
    np.testing.assert_allclose(_parts(model)(data), model(data), rtol=1e-6)
    qat = kqat.quantize_model(model, calibration_data=data)
    outputs = np.asarray(qat(data))
    np.testing.assert_allclose(outputs, model(data), atol=0.02 * np.abs(data[0]).max())


def test_paddings_ship_as_one_operator() -> None:
    names = ("the lowest number", "mirrored", "a number", "other indexes at each place")
    model = _model(*(CALLS[name] for name in names))
    qat = kqat.quantize_model(model, calibration_data=IMAGES)
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, IMAGES, samples=2)
    assert report.float_operators == 0
    assert {"PADV2", "MIRROR_PAD", "CONCATENATION"} <= set(report.operators)
    for part in report.runtimes:
        assert part.problem is None
        assert part.max_steps <= 1
        assert not part.unmatched
        assert part.exact is not None
        assert part.exact.is_exact


class Squeezed(layers.Layer):
    """Drops all axes of size one, the batch among them where it is of one sample."""

    def __init__(self, undo: Callable[[Any], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.undo = undo

    def call(self, x: Any) -> Any:
        """What is made of the axes that are left."""
        return self.undo(ops.squeeze(x))


@pytest.mark.parametrize("undo", [lambda y: y[None, 1:], lambda y: ops.expand_dims(y, 0)])
def test_a_batch_of_one_that_is_dropped_is_refused_with_what_to_do(undo: Any) -> None:
    x = keras.Input((1, 6), batch_size=1)
    with pytest.raises(kqat.UnsupportedLayerError, match="squeeze without axis="):
        kqat.plan(keras.Model(x, Squeezed(undo, name="own")(x)))
