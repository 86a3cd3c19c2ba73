"""`Fixed`: a range that is given and not observed."""

import dataclasses
import math

from kqat.base import SpecError
from kqat.grids import arithmetic


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Range `[low, high]` that the user gives or that an integer kernel demands.

    Raises:
        SpecError: if the range, in float32, is not finite, does not contain zero, or is empty.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):  # JSON does not take NumPy's floats
            object.__setattr__(self, name, float(getattr(self, name)))
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise SpecError(
                f"Expected a finite range. Received: [{self.low}, {self.high}]. Give two finite "
                "numbers, such as kqat.Fixed(-1.0, 1.0)."
            )
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
