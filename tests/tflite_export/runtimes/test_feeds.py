"""Floats to a file's integers and back, and random inputs."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from kqat.base.errors import ExportError
from tflite_export.flatbuffer.tree import ModelT, TensorT
from tflite_export.kernels.weight_layout import quantization
from tflite_export.runtimes import feeds


def tensor(kind: int, shape: tuple[int, ...] = (1, 4), scale: float | None = 0.5) -> TensorT:
    found = TensorT()
    found.name, found.type, found.shape = b"x", kind, list(shape)
    found.quantization = None if scale is None else quantization([scale], [-3], 0)
    return found


def test_floats_are_rounded_half_up_and_clipped_as_in_training() -> None:
    x = np.array([[0.25, -0.25, 0.75, -0.75, 1e9, -1e9]], np.float32)
    found = feeds.as_type(x, tensor(schema.TensorType.INT8))
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, [[1 - 3, 0 - 3, 2 - 3, -1 - 3, 127, -128]])
    np.testing.assert_array_equal(
        feeds.real(found[:, :4], tensor(schema.TensorType.INT8)), [[0.5, 0.0, 1.0, -0.5]]
    )


def test_indexes_and_floats_are_left_as_they_are() -> None:
    index = np.array([[7]], np.int32)
    assert feeds.as_type(index, tensor(schema.TensorType.INT32, scale=None)) is index
    assert feeds.real(index, tensor(schema.TensorType.INT32, scale=None)) is index
    with pytest.raises(ExportError, match=r"a scale for tensor 'x' of integers"):
        feeds.as_type(np.ones((1, 1), np.float32), tensor(schema.TensorType.INT32, scale=None))


@pytest.mark.parametrize("kind", [schema.TensorType.BOOL, schema.TensorType.STRING])
def test_an_input_that_holds_no_numbers_takes_no_floats(kind: int) -> None:
    with pytest.raises(ExportError, match=r"of numbers.*'x'"):
        feeds.as_type(np.ones((1, 4), np.float32), tensor(kind, scale=None))


def test_random_integers_take_the_whole_range() -> None:
    model = ModelT()
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs = [tensor(schema.TensorType.INT8, (1, 4096))], [0]
    model.subgraphs = [graph]
    (found,) = feeds.random_inputs(model, 4)
    assert (found.dtype, found.shape) == (np.int8, (4, 4096))
    assert (found.min(), found.max()) == (-128, 127)
    np.testing.assert_array_equal(found, feeds.random_inputs(model, 4)[0])
    assert np.any(found != feeds.random_inputs(model, 4, seed=1)[0])
