"""Convolutions on integers: exact, and by the slow way equal to the fast one."""

import keras
import numpy as np
import pytest

from kqat.kernels.arrays import KERAS, NUMPY
from kqat.kernels.grids import Grid
from kqat.kernels.sums import Window, convolve, exact_dtype, same_padding, spread

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    ("strides", "dilations"),
    [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 3))],
)
def test_numpy_and_keras_add_up_the_same(
    strides: tuple[int, int], dilations: tuple[int, int], depthwise: bool
) -> None:
    x = RNG.integers(-255, 256, (2, 9, 8, 4)).astype(np.int32)
    kernel = RNG.integers(-127, 128, (3, 2, 4, 2 if depthwise else 5)).astype(np.float32)
    window = Window(strides=strides, dilations=dilations, padding=((1, 0), (0, 1)))
    options = {"dtype": "float32", "depthwise": depthwise}
    fast = convolve(KERAS, keras.ops.convert_to_tensor(x), kernel, window, **options)
    slow = convolve(NUMPY, x, kernel, window, **options)
    np.testing.assert_array_equal(np.asarray(fast), slow)
    np.testing.assert_array_equal(slow, np.rint(slow))


def test_padding_is_that_of_the_same_size() -> None:
    assert same_padding((5, 6), (3, 3), (1, 1)) == ((1, 1), (1, 1))
    assert same_padding((5, 6), (3, 3), (2, 2)) == ((1, 1), (0, 1))
    assert same_padding((5, 6), (1, 1), (2, 2)) == ((0, 0), (0, 0))
    assert same_padding((8, 8), (3, 3), (1, 1), (2, 2)) == ((2, 2), (2, 2))


def test_sums_that_float32_does_not_hold_take_float64() -> None:
    weights = np.full((3, 3, 100, 1), 127)
    assert exact_dtype(weights, (0, 1, 2), 127) == "float32"
    assert exact_dtype(weights, (0, 1, 2), 255) == "float64"
    # The bound is strict: 2**24 itself has a neighbour that rounds to it.
    assert exact_dtype(np.array([[1]]), (0,), 2**24) == "float64"
    assert exact_dtype(np.array([[1]]), (0,), 2**24 - 1) == "float32"


def test_zeros_come_between_but_not_behind() -> None:
    x = np.arange(1, 5).reshape(1, 2, 2, 1)
    found = spread(NUMPY, x, (2, 3))[0, ..., 0]
    assert found.tolist() == [[1, 0, 0, 2], [0, 0, 0, 0], [3, 0, 0, 4]]


def test_a_fused_activation_ends_at_its_integers() -> None:
    grid = Grid((np.float32(0.1),), -10, "int8")
    assert grid.activation("none") == (-128, 127)
    assert grid.activation("relu") == (-10, 127)
    assert grid.activation("relu6") == (-10, 50)
    assert grid.activation("relu_n1_to_1") == (-20, 0)
