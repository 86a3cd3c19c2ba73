"""Layers that are one operator: what they say of their outputs before they run."""

from collections.abc import Callable
from typing import Any

import keras
import pytest
from keras import ops

from kqat.parts.single_op_layers import DepthToSpace, Slice, SpaceToDepth, Take

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
