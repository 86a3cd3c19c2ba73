"""Moving averages of batch ranges: what a range does in training."""

import dataclasses
import math
from typing import Any

from keras import ops

from kqat.base import SpecError

# Down to this share of what calibration saw, batches say nothing: they are small, or quiet.
_QUIET = 0.25
# Beyond what calibration saw by this share of its width, values are new and widen the range.
_NEW = 0.25
# How much slower a range forgets than it learns.
_FORGETS = 0.1
# One batch counts for no more than this many widths of the range.
_WIDEST = 4.0
# What float32 still holds.
_LARGEST = 3e38


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """In training, the debiased exponential moving average of batch minima and maxima.

    With `d = decay` and the `t`-th batch value `x_t`,

        m_t = m_{t-1} + (1 - d) / (1 - d**t) * (x_t - m_{t-1}),

    which is Adam's bias correction (Kingma & Ba 2015, section 3, https://arxiv.org/abs/1412.6980)
    carried out at every step: `m_1 == x_1`, and no initial value ever remains.
    Reference for the average itself: Jacob et al. 2018, section 3.1.

    That is the range of a model that was never calibrated. After calibration the range is found
    from all data by the method that `calibrate` is given, and `Anchor` says how it then moves.

    Raises:
        SpecError: if `decay` is not inside (0, 1).
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise SpecError(
                f"Expected a decay inside (0, 1). Received: decay={self.decay!r}. Use 0.99."
            )

    def share(self, count: Any) -> Any:
        """The weight of the next batch, `count` of which came before (float32, any shape)."""
        # expm1, because 1 - d**t loses its digits where d is near one.
        share = (1.0 - self.decay) / -ops.expm1((count + 1.0) * math.log(self.decay))
        return ops.where(count > 0.0, share, 1.0)

    def update(
        self, low: Any, high: Any, count: Any, batch_low: Any, batch_high: Any
    ) -> tuple[Any, Any]:
        """The range after one more batch, `count` of which came before, without calibration.

        All float32: `low`, `high` and `count` of one shape, the others scalars.
        """
        weight = self.share(count)
        return low + weight * (batch_low - low), high + weight * (batch_high - high)


# How a range that calibration found moves in training.
FOLLOWING = MovingAverage()


class Anchor:
    """What calibration leaves behind, so that training moves a range only where it has to.

    Batches of training are no fair sample of what the device will see: they are small, or of one
    class, and behind a Dropout values are scaled up. So training keeps a second pair of numbers,
    the extremes `e` (as magnitudes, `-low` and `high`). They begin as those that calibration saw
    and go to the batch's extremes, divided by the factor by which Dropout stretches them here, as a
    moving average with `MovingAverage.share` where those are larger, ten times slower where they
    are smaller. One batch counts for at most four widths. The range is

        calibrated * min(1, 4 * e / seen) + max(0, e - seen - width / 4)

    with `seen` what calibration saw and `width = seen_low + seen_high`: it stands still while the
    batches' average lies within a quarter of what was seen and a quarter of the width more, and
    beyond it follows. So no order, size or dropout of batches moves it while weights stand still,
    and weights that move far take it along.

    Rows, each `(2, sites)` for low and high: the calibrated range; where widening begins;
    the slope of narrowing; the factor of a batch; the weight of a smaller one; what one batch may
    count at least. Before calibration they make the range equal to `e`, the plain average.
    """

    ROWS = 6
    FACTOR = 3  # the row of the factor of a batch
    UNSET = (0.0, 0.0, 0.0, 1.0, 1.0, _LARGEST)

    @staticmethod
    def rows(calibrated: Any, seen: Any, stretched: Any) -> list[Any]:
        """The rows of one site, from arrays of shape `(2,)`.

        Args:
            calibrated: `-low` and `high` of the range.
            seen: `-low` and `high` of all values that calibration saw.
            stretched: how many times as wide they are in training mode, 1 or more.
        """
        slope = [min(1.0 / (_QUIET * s), _LARGEST) if s > 0.0 else 0.0 for s in seen]
        start = [min(s + _NEW * float(sum(seen)), _LARGEST) for s in seen]
        return [calibrated, start, slope, [1.0 / stretched] * 2, [_FORGETS] * 2, [0.0] * 2]

    @staticmethod
    def moved(method: MovingAverage, anchor: Any, extremes: Any, count: Any, batch: Any) -> Any:
        """The extremes after one more batch, and the range of them, as `(2, sites)` each.

        Args:
            method: whose decay rules.
            anchor: `(ROWS, 2, sites)`.
            extremes: `e`, `(2, sites)`.
            count: batches so far, `(sites,)`.
            batch: `-low` and `high` of the batch, `(2, 1)`.
        """
        calibrated, start, slope, factor, less, most = ops.unstack(anchor, axis=0)
        widest = ops.sum(extremes, axis=0) * _WIDEST + most
        step = ops.minimum(batch * factor, widest) - extremes
        share = method.share(count)
        extremes = extremes + ops.where(step < 0.0, share * less, share) * step
        kept = calibrated * ops.minimum(extremes * slope, 1.0)
        return extremes, kept + ops.relu(extremes - start)
