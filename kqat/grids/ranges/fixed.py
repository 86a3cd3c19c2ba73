"""A range known beforehand."""

import dataclasses
import math

from kqat.base import SpecError
from kqat.grids import arithmetic


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Range `[low, high]` given by the user or demanded by an integer kernel.

    Raises:
        SpecError: if it is not finite, does not contain zero, or is empty; all in float32.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):  # NumPy's floats are not JSON's
            object.__setattr__(self, name, float(getattr(self, name)))
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise SpecError(f"Expected a finite range. Received: [{self.low}, {self.high}].")
        if not self.low <= 0.0 <= self.high or self.low == self.high:
            raise SpecError(
                f"Expected low <= 0 <= high and low < high, so that zero is exact. "
                f"Received: [{self.low}, {self.high}]."
            )
        widest = max(-self.low, self.high)
        if self.high - self.low < arithmetic.SMALLEST_RANGE or widest > arithmetic.LARGEST_BOUND:
            raise SpecError(
                f"Expected a range of {arithmetic.SMALLEST_RANGE:.1e} at least, inside "
                f"±{arithmetic.LARGEST_BOUND:.1e}. Received: [{self.low}, {self.high}]."
            )
