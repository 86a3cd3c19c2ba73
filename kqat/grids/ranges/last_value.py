"""The range of the last batch alone."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LastValue:
    """Range `[min, max]` of the batch seen last; nothing earlier remains.

    It follows a distribution that moves, and jumps with every batch; after calibration it is that
    of the last batch. Known from tfmot as `LastValueQuantizer`.
    """

    def update(
        self, low: Any, high: Any, count: Any, batch_low: Any, batch_high: Any
    ) -> tuple[Any, Any]:
        """The range after one more batch.

        All float32: `low`, `high` and `count` of one shape, the others scalars.
        """
        return batch_low, batch_high
