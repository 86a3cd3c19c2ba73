"""`Identity`: the gradient passes as if nothing were rounded or clipped."""

import dataclasses
from typing import Any

from kqat.grids.gradients.estimator import GradientEstimator


@dataclasses.dataclass(frozen=True)
class Identity(GradientEstimator):
    """The straight-through estimator: `d out/d x = 1` everywhere, also where `x` is clipped.

    Reference: Bengio et al. 2013, "Straight-Through Estimator" (https://arxiv.org/abs/1308.3432).
    """

    def gradient(self, upstream: Any, x: Any, rounded: Any, low: Any, high: Any) -> Any:
        """`upstream`."""
        return upstream
