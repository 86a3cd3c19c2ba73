"""`MovingAverage` and `Anchor`: how a range changes in training, by averages of batch ranges."""

import dataclasses
import math
from typing import Any

import numpy as np
from keras import ops

from kqat.base import SpecError

# A range narrows only if the batches' average is below this share of the calibration extremes.
_QUIET = 0.25
# A range widens only if the batches' average exceeds the calibration extremes by this share of
# their width.
_NEW = 1.0 / 16.0
# A range that widens goes this many times as fast as the extremes, until it has caught up.
_CATCHES_UP = 5.0
# After calibration the extremes grow at so many times the average's speed: one batch alone, cut at
# one and a half widths, widens a range by a tenth at most. And they shrink at this fraction of it.
_FOLLOWS = 4.0
_FORGETS = 0.1
# The extremes of a batch are cut at this many widths of the range.
_WIDEST = 1.5
# Near the largest float32.
_LARGEST = 3e38


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """In training, the debiased exponential moving average of batch minima and maxima.

    With `d = decay` and the `t`-th batch value `x_t`,

        m_t = m_{t-1} + (1 - d) / (1 - d**t) * (x_t - m_{t-1}),

    which is Adam's bias correction (Kingma & Ba 2015, section 3, https://arxiv.org/abs/1412.6980)
    applied at every step. So `m_1 == x_1`, and no initial value has any weight.
    Reference for the average itself: Jacob et al. 2018, section 3.1.

    This is the range of a model that was never calibrated. Calibration finds the range from all
    data by its own method, and afterwards `Anchor` decides how training changes it.

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
        """The weight of the next batch after `count` batches (float32, any shape)."""
        # expm1, because 1 - d**t loses its digits if d is near one.
        share = (1.0 - self.decay) / -ops.expm1((count + 1.0) * math.log(self.decay))
        return ops.where(count > 0.0, share, 1.0)

    def update(
        self, low: Any, high: Any, count: Any, batch_low: Any, batch_high: Any
    ) -> tuple[Any, Any]:
        """The range of a model without calibration, after one more batch.

        `count` is the number of batches before it. All float32: `low`, `high` and `count` of one
        shape, the others scalars.
        """
        weight = self.share(count)
        return low + weight * (batch_low - low), high + weight * (batch_high - high)


# The moving average that a calibrated range follows in training.
FOLLOWING = MovingAverage()


class Anchor:
    """The numbers that calibration leaves, so that training changes a range only if it must.

    Training batches are not a fair sample of the device's inputs: they may be small or of one
    class, and after a Dropout layer the values are scaled up. So training keeps a second pair of
    numbers, the extremes `e` (as magnitudes, `-low` and `high`). They start as the calibration
    extremes, and follow the batches' extremes as a moving average: with four times the weight
    `MovingAverage.share` if these are larger, and a tenth of it if they are smaller. So they come
    to lie near the largest of many batches. What Dropout and noise added to the extremes in
    calibration is taken off those of a batch, so that values that outgrow the noise show. But no
    more is taken off than the share by which noise widened them, so that small batches narrow
    nothing. They are cut at 1.5 widths of the range. The range is

        calibrated * min(1, 4 * e / seen) + min(5 * beyond, max(grown, beyond))
        beyond = max(0, e - seen - width / 16)
        grown = calibrated * (e / seen - 1)

    where `seen` are the calibration extremes and `width = seen_low + seen_high`. It does not
    change while the average stays above a quarter of `seen` and below `seen` plus a sixteenth of
    the width. So order, size and dropout of batches do not change a range while the weights stay
    the same. If weights change the values beyond these limits, the range follows: where it did not
    clip it soon is `e`.

    The rows, each `(2, sites)` for low and high, are: the calibrated range; the extreme above which
    it widens; the slope by which it narrows; what is added to a batch's extremes because of noise,
    zero or less; the weight of smaller extremes; the least width at which a batch is cut. Before
    calibration they make the range equal to `e`, the plain average.
    """

    ROWS = 6
    SLOPE = 2  # the row of the slope by which a range narrows
    ADDED = 3  # the row of what is added to a batch's extremes
    WIDEST = 5  # the row of the least width at which a batch is cut
    UNSET = (0.0, 0.0, 0.0, 0.0, 1.0, _LARGEST)

    @staticmethod
    def rows(calibrated: Any, seen: Any, noise: Any) -> list[Any]:
        """The rows of one site, from arrays of shape `(2,)`.

        Args:
            calibrated: `-low` and `high` of the range.
            seen: `-low` and `high` of all values in calibration.
            noise: what Dropout and noise add to `seen` in training mode, 0 or more.
        """
        slope = [min(1.0 / (_QUIET * s), _LARGEST) if s > 0.0 else 0.0 for s in seen]
        start = [min(s + _NEW * float(sum(seen)), _LARGEST) for s in seen]
        return [calibrated, start, slope, [-x for x in noise], [_FORGETS] * 2, [0.0] * 2]

    @staticmethod
    def seen(anchor: Any) -> Any:
        """The extremes that `rows` was given, `(2, sites)`, from a NumPy array of the rows."""
        slope = anchor[Anchor.SLOPE]
        return np.divide(1.0 / _QUIET, slope, out=np.zeros_like(slope), where=slope > 0.0)

    @staticmethod
    def without_noise(anchor: Any, batch: Any) -> Any:
        """Extremes of a batch (magnitudes, `(2, 1)`) without what noise adds to them."""
        added, slope = anchor[Anchor.ADDED], anchor[Anchor.SLOPE]
        least = ops.where(slope > 0.0, batch / (1.0 - added * slope * _QUIET), 0.0)
        return ops.maximum(batch + added, least)

    @staticmethod
    def of_older(anchor: Any) -> Any:
        """The rows of older releases as `rows` makes them, NumPy arrays.

        They held a factor of the extremes, above zero, in place of what is added to them.
        """
        factor, new = anchor[Anchor.ADDED], anchor.copy()
        if np.any(factor > 0.0):
            new[Anchor.ADDED] = (1.0 - 1.0 / factor) * Anchor.seen(anchor)
        return new

    @staticmethod
    def moved(method: MovingAverage, anchor: Any, extremes: Any, count: Any, batch: Any) -> Any:
        """The extremes after one more batch, and the range of them, as `(2, sites)` each.

        Args:
            method: the moving average whose decay is used.
            anchor: `(ROWS, 2, sites)`.
            extremes: `e`, `(2, sites)`.
            count: batches so far, `(sites,)`.
            batch: `-low` and `high` of the batch, `(2, 1)`.
        """
        calibrated, start, slope, _, less, most = ops.unstack(anchor, axis=0)
        widest = ops.sum(extremes, axis=0) * _WIDEST + most
        step = ops.minimum(Anchor.without_noise(anchor, batch), widest) - extremes
        share = method.share(count)
        more = ops.where(most > 0.0, 1.0, _FOLLOWS)  # The plain average before calibration.
        extremes = extremes + share * ops.where(step < 0.0, less, more) * step
        kept = calibrated * ops.minimum(extremes * slope, 1.0)
        # In the end as much wider as the values are; a range that clipped goes on to clip.
        grown = calibrated * (extremes * slope * _QUIET - 1.0)
        beyond = ops.relu(extremes - start)
        wider = ops.minimum(_CATCHES_UP * beyond, ops.maximum(grown, beyond))
        return extremes, kept + ops.relu(wider)
