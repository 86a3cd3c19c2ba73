"""Arithmetic of integers without a scale, and layers that move or merge them."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
from kqat.base.errors import UnsupportedLayerError
from kqat.graph.tracer import rebuild, trace
from kqat.parts.single_op_layers import IndexOperation
from kqat.planning.expansion import expand
from kqat.rewrites.layers import whole_numbers

SIZE = 6
IDS = np.random.default_rng(0).integers(-20, 20, (64, SIZE)).astype(np.int32)


def _model(call: Callable[[Any], Any]) -> keras.Model:
    x = keras.Input((SIZE,), dtype="int32", name="x")
    return keras.Model(x, call(x), name="net")


def _steps(x: Any) -> Any:
    return layers.Reshape((SIZE, 1))(x)


ARITHMETIC: dict[str, Callable[[Any], Any]] = {
    "mod": lambda x: x % 7,
    "mod of each": lambda x: ops.mod(x, np.array([1, 2, 3, 4, 5, 6])),
    "floor": lambda x: x // 4,
    "of what is not negative": lambda x: ops.floor_divide(ops.maximum(x, 0), 3),
    "negative": lambda x: -x,
    "square": lambda x: ops.square(x) + x**2,
    "sign": ops.sign,
    "truth": lambda x: ops.mod(x > 3, 2),
    "pad": lambda x: ops.pad(x, ((0, 0), (1, 2)), constant_values=3),
    "pad with zeros": lambda x: ops.pad(x, ((0, 0), (2, 0))),
}
LAYERS: dict[str, Callable[[Any], Any]] = {
    "crop": lambda x: layers.Cropping1D((1, 2))(_steps(x)),
    "crop images": lambda x: layers.Cropping2D(((1, 0), (0, 1)))(layers.Reshape((3, 2, 1))(x)),
    "pad": lambda x: layers.ZeroPadding1D((2, 1))(_steps(x)),
    "pad images": lambda x: layers.ZeroPadding2D(1)(layers.Reshape((3, 2, 1))(x)),
    "repeat": lambda x: layers.RepeatVector(3)(x),
    "repeat once": lambda x: layers.RepeatVector(1)(x),
    "repeat each": lambda x: layers.UpSampling1D(2)(layers.Reshape((3, 2))(x)),
    "concatenate": lambda x: layers.Concatenate()([x, x + 1, x]),
    "add": lambda x: layers.Add()([x, x, x + 1]),
    "subtract": lambda x: layers.Subtract()([x, x // 2]),
    "multiply": lambda x: layers.Multiply()([x, x]),
    "extremes": lambda x: layers.Maximum()([layers.Minimum()([x, x % 5]), x - 3]),
}


def _expanded(model: keras.Model) -> keras.Model:
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    return rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")


@pytest.mark.parametrize(
    "call",
    [*ARITHMETIC.values(), *LAYERS.values()],
    ids=[*ARITHMETIC, *map("layer {}".format, LAYERS)],
)
def test_integers_stay_integers(call: Callable[[Any], Any]) -> None:
    model = _model(call)
    parts = _expanded(model)
    assert parts.outputs[0].dtype == "int32"
    np.testing.assert_array_equal(parts(IDS), model(IDS))


def test_what_is_not_negative_is_divided_at_once() -> None:
    kinds = []
    for call in (ARITHMETIC["of what is not negative"], ARITHMETIC["floor"]):
        parts = _expanded(_model(call)).layers
        kinds.append([part.kind for part in parts if isinstance(part, IndexOperation)])
    assert kinds[0] == ["maximum", "divide"]
    assert kinds[1] == ["divide", "multiply", "subtract", "less", "multiply", "subtract"]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: ops.clip(x, -9, 9) // 4, (-3, 2)),
        (lambda x: ops.pad(ops.clip(x, 0, 3), ((0, 0), (1, 1)), constant_values=7), (0, 7)),
        (lambda x: ops.maximum(x, 0) % 5, (0, 4)),
        (lambda x: ops.top_k(ops.cast(x, "float32"), 2)[1], (0, SIZE - 1)),
    ],
    ids=["floor", "pad", "mod", "top_k"],
)
def test_bounds_hold_what_is_computed(call: Callable[[Any], Any], expected: Any) -> None:
    model = _model(call)
    low, high = whole_numbers.bounds(_expanded(model).outputs[0]) or (1, 0)
    assert low <= np.min(model(IDS)) and np.max(model(IDS)) <= high
    assert (low, high) == expected


def test_a_rest_becomes_a_quantity() -> None:
    model = _model(lambda x: layers.Dense(2)(ops.cast(x % 7, "float32")))
    qat = kqat.quantize_model(model, calibration_data=IDS)
    np.testing.assert_allclose(qat(IDS), model(IDS), atol=0.3)


@pytest.mark.parametrize("divisor", [0, -3, [1, 2, 3, 0, 1, 2]], ids=["zero", "below", "one zero"])
def test_other_divisors_are_refused(divisor: Any) -> None:
    message = "divided by constant integers above zero in 'floor_divide"
    model = _model(lambda x: ops.floor_divide(x, np.array(divisor)))
    with pytest.raises(UnsupportedLayerError, match=re.escape(message)):
        kqat.plan(model)
