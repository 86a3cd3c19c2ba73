"""`MinMax`: the range from the smallest to the largest value of all batches."""

import dataclasses
from typing import Any

from keras import ops

from kqat.grids.histogram import Histogram
from kqat.grids.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class MinMax:
    """Range `[min, max]` of all batches: nothing seen is clipped, and one outlier widens it.

    In training the range can grow, but not shrink.
    Reference: Wu et al. 2020, "Max" of "Calibration" in section 3, with a bound for each side
    (https://arxiv.org/abs/2004.09602).
    """

    def calibrated(self, seen: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range `(low, high)` for the values in calibration."""
        return seen.low, seen.high

    def update(
        self, low: Any, high: Any, count: Any, batch_low: Any, batch_high: Any
    ) -> tuple[Any, Any]:
        """The range after one more batch.

        All float32: `low`, `high` and `count` of one shape, the others scalars.
        """
        return ops.minimum(low, batch_low), ops.maximum(high, batch_high)
