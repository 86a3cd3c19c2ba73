"""`Clipped`: the gradient passes inside the range and ends where the value is clipped."""

import dataclasses
from typing import Any

from kqat.grids.gradients.estimator import GradientEstimator, inside


@dataclasses.dataclass(frozen=True)
class Clipped(GradientEstimator):
    """`d out/d x = 1` where `low <= x <= high`, else 0: the saturated straight-through estimator.

    Reference: Hubara et al. 2016, section 1.3, equation 4 (https://arxiv.org/abs/1602.02830); for
    grids of more bits Jacob et al. 2018, section 3 (https://arxiv.org/abs/1712.05877).
    """

    def gradient(self, upstream: Any, x: Any, rounded: Any, low: Any, high: Any) -> Any:
        """`upstream` inside the range."""
        return upstream * inside(x, low, high)
