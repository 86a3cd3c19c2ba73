"""`MinMax`: the range from the smallest to the largest value of all batches."""

import dataclasses
from typing import Any

from keras import ops


@dataclasses.dataclass(frozen=True)
class MinMax:
    """Range `[min, max]` of all batches: nothing seen is clipped, and one outlier widens it.

    Reference: Krishnamoorthi 2018, section 3.1 (https://arxiv.org/abs/1806.08342).
    """

    def update(
        self, low: Any, high: Any, count: Any, batch_low: Any, batch_high: Any
    ) -> tuple[Any, Any]:
        """The range after one more batch.

        All float32: `low`, `high` and `count` of one shape, the others scalars.
        """
        return ops.minimum(low, batch_low), ops.maximum(high, batch_high)
