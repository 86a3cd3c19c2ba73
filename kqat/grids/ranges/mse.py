"""`MSE`: the range with the least squared rounding error of the values."""

import dataclasses

import numpy as np

from kqat.grids.histogram import Histogram
from kqat.grids.spec import QuantSpec

# The bounds to try, as shares of the extreme.
_SHARES = np.linspace(1.0, 0.02, 197)
_PASSES = 4


@dataclasses.dataclass(frozen=True)
class MSE:
    """Range with the least mean squared error on the layer's grid (least squares).

    For a range of step `s` the error has two parts: the clipping error of the values outside, from
    the calibration histogram, and `s**2 / 12` for each value inside, except zeros, which are exact.
    In training the range changes as described in `Anchor`.
    Reference: Sung et al. 2015, section 2 (https://arxiv.org/abs/1511.06488), for the search;
    Nagel et al. 2021, section 3.1 (https://arxiv.org/abs/2106.08295), for ranges of activations.
    """

    def calibrated(self, seen: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range `(low, high)` for the values in calibration."""
        return least_error(seen, spec, 1.0)


def least_error(seen: Histogram, spec: QuantSpec, clipping: float) -> tuple[float, float]:
    """The range of least error, with clipping errors weighted by `clipping`."""
    lower, upper = seen.tail(upper=False), seen.tail(upper=True)
    lows, highs = -seen.low * _SHARES, seen.high * _SHARES
    beyond_low = clipping * lower.squares_beyond(lows)
    beyond_high = clipping * upper.squares_beyond(highs)
    some = float(lower.count[0] + upper.count[0])
    levels = spec.qmax - spec.qmin
    if spec.symmetric:
        bound = max(-seen.low, seen.high) * _SHARES
        error = clipping * (lower.squares_beyond(bound) + upper.squares_beyond(bound))
        error += some * (2.0 * bound / levels) ** 2 / 12.0
        best = float(bound[np.argmin(error)])
        return -min(best, -seen.low), min(best, seen.high)
    low = high = 0
    for _ in range(_PASSES):
        high = int(np.argmin(beyond_high + some * ((lows[low] + highs) / levels) ** 2 / 12.0))
        low = int(np.argmin(beyond_low + some * ((lows + highs[high]) / levels) ** 2 / 12.0))
    return -float(lows[low]), float(highs[high])
