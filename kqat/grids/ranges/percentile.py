"""`Percentile`: the range that contains a given share of the values."""

import dataclasses

from kqat.base import SpecError
from kqat.grids.histogram import Histogram
from kqat.grids.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Percentile:
    """Range with `percent` of the values in calibration; half of the others lie on each side.

    If no value lies on one side of zero, that side clips nothing. In training the range changes as
    described in `Anchor`.
    Reference: Wu et al. 2020, "Calibration" in section 3 (https://arxiv.org/abs/2004.09602).

    Raises:
        SpecError: if `percent` is not inside (50, 100].
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50.0 < self.percent <= 100.0:
            raise SpecError(
                f"Expected a percentile inside (50, 100]. Received: percent={self.percent!r}. "
                "Use 99.99."
            )

    def calibrated(self, seen: Histogram, spec: QuantSpec) -> tuple[float, float]:
        """The range `(low, high)` for the values in calibration."""
        outside = seen.total * (100.0 - self.percent) / 200.0
        low, high = (seen.tail(upper).bound_of(outside) for upper in (False, True))
        return max(-low, seen.low), min(high, seen.high)
