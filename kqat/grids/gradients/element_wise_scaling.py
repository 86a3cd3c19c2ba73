"""`ElementWiseScaling`: gradients grow and shrink with the rounding error (EWGS)."""

import dataclasses
from typing import Any

from keras import ops

from kqat.base import SpecError
from kqat.grids.gradients.estimator import GradientEstimator, inside


@dataclasses.dataclass(frozen=True)
class ElementWiseScaling(GradientEstimator):
    """Element-wise gradient scaling (EWGS): with the gradient `g` of the rounded value,

        d loss/d x = g * (1 + delta * sign(g) * (x - rounded) / (high - low)) inside, else 0

    so that a step moves a value further that is to cross to the next integer. With `delta=0` this
    is `Clipped`. The paper derives `delta` from the trace of the loss's Hessian, or keeps 0.001.
    Its unit is the width of the range: with 8 bits a rounding error is 1/510 of it at the most, and
    only a `delta` of some tens changes much.

    Args:
        delta: how much gradients are scaled.

    Raises:
        SpecError: if `delta` is negative.

    Reference: Lee et al. 2021, section 3.2, equation 5 (https://arxiv.org/abs/2104.00903).
    """

    delta: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 <= self.delta < float("inf"):
            raise SpecError(
                f"Expected a delta of 0 or more. Received: delta={self.delta!r}. Use 0.001."
            )

    def gradient(self, upstream: Any, x: Any, rounded: Any, low: Any, high: Any) -> Any:
        """`upstream`, scaled element by element."""
        error = (x - rounded) * (1.0 / (high - low))
        scaled = upstream + ops.abs(upstream) * error * self.delta
        return scaled * inside(x, low, high)
