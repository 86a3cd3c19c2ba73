"""The smallest and the largest value ever seen."""

import dataclasses
from typing import Any

from keras import ops

from kqat.grids.histogram import Histogram
from kqat.grids.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class MinMax:
    """Range `[min, max]` over everything seen; nothing is clipped, outliers rule.

    In training it goes on growing, and never shrinks.
    Reference: Krishnamoorthi 2018, section 3.1 (https://arxiv.org/abs/1806.08342).
    """

    def calibrated(self, seen: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range `(low, high)` of what calibration has seen."""
        return seen.low, seen.high

    def update(
        self, low: Any, high: Any, count: Any, batch_low: Any, batch_high: Any
    ) -> tuple[Any, Any]:
        """The range after one more batch.

        All float32: `low`, `high` and `count` of one shape, the others scalars.
        """
        return ops.minimum(low, batch_low), ops.maximum(high, batch_high)
