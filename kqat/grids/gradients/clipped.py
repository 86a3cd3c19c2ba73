"""`Clipped`: the gradient passes inside the range and ends where the value is clipped."""

import dataclasses
from typing import Any

from kqat.grids.gradients.estimator import GradientEstimator, inside


@dataclasses.dataclass(frozen=True)
class Clipped(GradientEstimator):
    """`d out/d x = 1` where `low <= x <= high`, else 0: the saturated straight-through estimator.

    Reference: Hubara et al. 2016, section 1.3, equation 4 (https://arxiv.org/abs/1602.02830); for
    grids of more bits Krishnamoorthi 2018, section 2.4, equation 15
    (https://arxiv.org/abs/1806.08342).
    """

    def gradient(self, upstream: Any, x: Any, rounded: Any, low: Any, high: Any) -> Any:
        """`upstream` inside the range."""
        return upstream * inside(x, low, high)
