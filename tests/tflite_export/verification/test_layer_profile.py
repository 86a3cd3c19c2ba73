"""Range use and noise of one value, against numbers that can be done by hand."""

import math

import numpy as np
import pytest

from kqat.grids.site import Site
from tflite_export.verification.layer_profile import grid_use

SITE = Site("x", np.float32(0.5), 0, 8, (4,))


def test_values_on_the_grid_lose_nothing() -> None:
    real = np.array([[-64.0, 0.0, 0.5, 63.5]], np.float32)
    use = grid_use(SITE, 3, real, SITE.integers(real))
    assert (use.tensor, use.clipped_share, use.sqnr_db) == (3, 0.0, None)
    assert use.grid_share == 4 / 256


def test_noise_is_the_power_lost() -> None:
    real = np.array([[1.0, 1.0, 1.0, 1.2]], np.float32)
    use = grid_use(SITE, 0, real, np.array([[2.0, 2.0, 2.0, 2.0]], np.float32))
    assert use.sqnr_db == pytest.approx(10 * math.log10((3 + 1.44) / 0.04), abs=1e-5)
    assert use.grid_share == 1 / 256


def test_values_that_round_outside_are_clipped() -> None:
    # The grid reaches from −64 to 63.5; half a step more still rounds onto it.
    real = np.array([[63.74, 63.76, -64.24, -64.26]], np.float32)
    use = grid_use(SITE, 0, real, SITE.integers(real))
    assert use.clipped_share == 0.5


def test_no_signal_has_no_ratio() -> None:
    zeros = np.zeros((1, 4), np.float32)
    assert grid_use(SITE, 0, zeros, zeros).sqnr_db is None
    assert grid_use(SITE, 0, zeros, zeros + 1).sqnr_db is None
