"""What kernels clamp their output to: `Clamp` by a fused activation, `Bounds` by the grid."""

import dataclasses
import math
from collections.abc import Sequence

from kqat.base import TextEnum


class Clamp(TextEnum):
    """A clamp by Keras's name of the activation; TFLite has a fused activation of that name.

    `BOUNDS` stands in rows for a clamp whose two numbers are those of the layer; see `Bounds`.
    """

    RELU = "relu"
    RELU6 = "relu6"
    BOUNDS = "bounds"

    @property
    def low(self) -> float:
        """The least value that passes."""
        return 0.0

    @property
    def high(self) -> float:
        """The greatest value that passes."""
        return 6.0 if self is Clamp.RELU6 else math.inf


@dataclasses.dataclass(frozen=True)
class Bounds:
    """A clamp to `[low, high]` that no operator carries out, but the ends of the output's grid.

    The grid lies inside: an integer kernel saturates there in any case.

    Invariant: low <= 0 < high. One of the two may be infinite.
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    def to_list(self) -> list[float | None]:
        """The two numbers for JSON, which has no infinity."""
        return [end if math.isfinite(end) else None for end in (self.low, self.high)]

    @classmethod
    def from_list(cls, ends: Sequence[float | None]) -> "Bounds":
        """The inverse of `to_list`."""
        low, high = ends
        return cls(-math.inf if low is None else low, math.inf if high is None else high)


SavedClamp = str | list[float | None] | None


def clamp_to_json(clamp: Clamp | Bounds | None) -> SavedClamp:
    """A clamp as plain JSON types."""
    return clamp.to_list() if isinstance(clamp, Bounds) else clamp and clamp.value


def clamp_from_json(saved: Clamp | Bounds | SavedClamp) -> Clamp | Bounds | None:
    """The inverse of `clamp_to_json`; takes a clamp itself, too."""
    if saved is None or isinstance(saved, Bounds):
        return saved
    return Clamp(saved) if isinstance(saved, str) else Bounds.from_list(saved)
