"""`MovingAverage`: the exponential moving average of batch ranges, without start-up bias."""

import dataclasses
import math
from typing import Any

from keras import ops

from kqat.base import SpecError


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """Range as the debiased exponential moving average of batch minima and maxima.

    With `d = decay` and the `t`-th batch value `x_t`,

        m_t = m_{t-1} + (1 - d) / (1 - d**t) * (x_t - m_{t-1}),

    which is Adam's bias correction (Kingma & Ba 2015, section 3, https://arxiv.org/abs/1412.6980)
    applied at every step. So `m_1 == x_1`, and no initial value has any weight.
    Reference for the average itself: Jacob et al. 2018, section 3.1.

    Raises:
        SpecError: if `decay` is not inside (0, 1).
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise SpecError(
                f"Expected a decay inside (0, 1). Received: decay={self.decay!r}. Use 0.99."
            )

    def update(
        self, low: Any, high: Any, count: Any, batch_low: Any, batch_high: Any
    ) -> tuple[Any, Any]:
        """The range after one more batch; `count` is the number of batches before it.

        All float32: `low`, `high` and `count` of one shape, the others scalars.
        """
        # expm1, because 1 - d**t loses its digits if d is near one.
        share = (1.0 - self.decay) / -ops.expm1((count + 1.0) * math.log(self.decay))
        weight = ops.where(count > 0.0, share, 1.0)
        return low + weight * (batch_low - low), high + weight * (batch_high - high)
