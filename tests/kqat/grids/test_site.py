"""A site's grid: integers of real values, by hand, in NumPy and as tensors."""

import numpy as np
import pytest
from keras import ops

from kqat.grids.site import Site

SITE = Site("x", np.float32(0.5), -3, 8, (5,))


@pytest.mark.parametrize("bits", [8, 16])
def test_integers_by_hand(bits: int) -> None:
    site = Site("x", np.float32(0.5), -3, bits, (5,))
    real = np.float32([0.0, 0.24, 0.25, -0.25, 1e9, -1e9])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = [-3, -3, -2, -3, high, low]
    np.testing.assert_array_equal(site.integers(real), expected)
    np.testing.assert_array_equal(site.integers(ops.convert_to_tensor(real)), expected)


def test_what_is_rounded_is_the_real_value_of_its_integer() -> None:
    real = np.linspace(-80, 80, 1001, dtype=np.float32)
    rounded = np.asarray(SITE.rounded(ops.convert_to_tensor(real)))
    np.testing.assert_array_equal(rounded, SITE.reals(SITE.integers(real)))
    assert rounded.min() == (-128 + 3) * 0.5 and rounded.max() == (127 + 3) * 0.5


def test_sites_of_one_grid_are_told_by_it() -> None:
    assert SITE.grid == Site("y", np.float32(0.5), -3, 8, ()).grid
    others = [(0.25, -3, 8), (0.5, 0, 8), (0.5, -3, 16)]
    assert all(SITE.grid != Site("x", np.float32(s), z, b, (5,)).grid for s, z, b in others)
