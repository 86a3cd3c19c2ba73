"""Layers that are one operator: what they say of their outputs before they run."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from kqat.parts import (
    ConstantKind,
    Tabulated,
    WithConstant,
    computes_each_number,
    is_elementwise,
)
from kqat.parts.single_op_layers import (
    DepthToSpace,
    IndexOperation,
    Matmul,
    ReciprocalSquareRoot,
    Reduce,
    Remainder,
    Slice,
    SpaceToDepth,
    SquaredDifference,
    Take,
)
from kqat.registry import ACTIVATIONS

SLICE, TAKE = (lambda: Slice([1], [3], [1]), (4,)), (lambda: Take([0, 2], 1), (4,))


@pytest.mark.parametrize(
    ("make", "shape", "dtype"),
    [
        *((*move, dtype) for move in (SLICE, TAKE) for dtype in ("float32", "int32", "bool")),
        (lambda: DepthToSpace(2), (2, 2, 4), "float32"),
        (lambda: SpaceToDepth(2), (2, 2, 1), "float32"),
    ],
)
def test_a_move_foresees_the_type_that_it_gives(
    make: Callable[[], Any], shape: tuple[int, ...], dtype: str
) -> None:
    layer = make()
    foreseen = layer(keras.Input(shape, dtype=dtype))
    given = layer(ops.ones((1, *shape), dtype))
    assert (str(foreseen.dtype), foreseen.shape[1:]) == (
        keras.backend.standardize_dtype(given.dtype),
        tuple(given.shape[1:]),
    )


@pytest.mark.parametrize(
    ("layer", "shapes", "dtype"),
    [
        (Reduce("mean", [1, -1]), [(3, 4, 5)], "float32"),
        (Remainder("mean", [2]), [(3, 4, 5)], "float32"),
        (Reduce("max", [2], keepdims=False), [(3, 4, 5)], "float32"),
        (Reduce("max", [1]), [(3,)], "int32"),
        (Reduce("mean", [1]), [(3,)], "int32"),
        (Matmul(), [(2, 3, 4), (2, 4, 5)], "float32"),
        (Matmul(), [(2, 3, 4), (1, 4, 5)], "float32"),
        (Matmul(), [(1, 3, 4), (2, 4, 5)], "float32"),
        (Matmul(dtype="mixed_float16"), [(3, 4), (4, 5)], "float32"),
        (SquaredDifference(), [(3, 4), (3, 1)], "float32"),
        (ReciprocalSquareRoot(), [(3, 4)], "float32"),
        (Tabulated(keras.layers.Activation("tanh"), 0), [(3, 4)], "float32"),
    ],
)
def test_a_layer_foresees_what_it_makes(
    layer: Any, shapes: list[tuple[int, ...]], dtype: str
) -> None:
    symbolic = [keras.Input(shape, dtype=dtype) for shape in shapes]
    values = [ops.ones((6, *shape), dtype) for shape in shapes]
    foreseen, made = (layer(x if len(x) > 1 else x[0]) for x in (symbolic, values))
    assert foreseen.shape == (None, *made.shape[1:])
    assert foreseen.dtype == keras.backend.standardize_dtype(made.dtype)


@pytest.mark.parametrize("kind", [ConstantKind.ADD, ConstantKind.MULTIPLY])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_vector_beside_a_matrix_keeps_its_axes(kind: ConstantKind, samples: int) -> None:
    """Distances to centers; Keras takes one sample for a bias, and drops its axes."""
    layer = WithConstant(kind, [8, 4])
    expected = layer(keras.Input((1, 4))).shape[1:]
    found = layer(ops.ones((samples, 1, 4))).shape
    assert tuple(found) == (samples, *expected) == (samples, 8, 4)


# Keras takes the smaller of these for a bias, along the last axis or the one behind the batch, for
# one sample or as many as the value has numbers.
@pytest.mark.parametrize(
    ("shape", "value"),
    [((1,), (4,)), ((1,), (1, 4)), ((4, 1), (4, 4)), ((4, 1), (4,)), ((1, 4), (4, 1))],
)
@pytest.mark.parametrize("kind", [kind for kind in ConstantKind if kind is not ConstantKind.HIDE])
def test_a_constant_is_no_bias(
    kind: ConstantKind, shape: tuple[int, ...], value: tuple[int, ...]
) -> None:
    layer = WithConstant(kind, list(value))
    constant = np.arange(np.prod(value), dtype=np.float32).reshape(value)
    layer.build((None, *shape))
    layer.set_weights([constant])
    as_numpy = {
        ConstantKind.ADD: lambda x: x + constant,
        ConstantKind.SUBTRACT: lambda x: constant - x,
        ConstantKind.MULTIPLY: lambda x: x * constant,
        ConstantKind.SQUARED_DIFFERENCE: lambda x: (x - constant) ** 2,
    }[kind]
    for samples in (1, 2, 4):
        x = np.arange(samples * np.prod(shape), dtype=np.float32).reshape(samples, *shape)
        np.testing.assert_array_equal(layer(x), as_numpy(x))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's graph")
def test_a_sum_of_indexes_is_one_that_tflite_converts() -> None:
    """The places of several tables in one: Keras makes a BiasAdd of integers."""
    import tensorflow as tf

    layer = IndexOperation("add", {"x2": [0, 2, 5]})
    call = tf.function(layer.call).get_concrete_function(tf.TensorSpec((1, 3), tf.int32))
    assert "BiasAdd" not in {operation.type for operation in call.graph.get_operations()}
    found = layer(np.int32([[1, 1, 1]]))
    assert found.dtype == "int32" and np.array_equal(found, [[1, 3, 6]])
    assert IndexOperation("add", {"x1": 1})(np.array([True, False])).dtype == "int32"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_each_number_are_told_from_those_of_rows(name: str) -> None:
    layer = keras.layers.Activation(name)
    assert computes_each_number(layer) == is_elementwise(layer, (None, 5))
