"""`LastValue`: the range of the last batch only."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LastValue:
    """Range `[min, max]` of the last batch; earlier batches have no effect.

    It follows a distribution that changes, but it also jumps with every batch. tfmot calls it
    `LastValueQuantizer`.
    """

    def update(
        self, low: Any, high: Any, count: Any, batch_low: Any, batch_high: Any
    ) -> tuple[Any, Any]:
        """The range after one more batch.

        All float32: `low`, `high` and `count` of one shape, the others scalars.
        """
        return batch_low, batch_high
