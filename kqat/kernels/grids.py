"""The integer grid of a tensor of a file, and integers clipped to it."""

import dataclasses
from typing import Any

import numpy as np

from kqat.kernels.arrays import Arrays

_LIMITS = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scale (float32), zero point and dtype of integers; `scales` has one entry per channel."""

    scales: tuple[np.float32, ...]
    zero_point: int
    dtype: str

    @property
    def scale(self) -> np.float32:
        """The one scale of an activation."""
        return self.scales[0]

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest integer."""
        return _LIMITS[self.dtype]

    @property
    def wide(self) -> bool:
        """Whether it is an activation of 16 bits."""
        return self.dtype == "int16"

    def integer(self, real: float) -> int:
        """The integer of a real number, not clipped; halves away from zero."""
        ratio = np.float32(real) / self.scale
        return self.zero_point + int(np.sign(ratio) * np.floor(np.abs(ratio) + np.float32(0.5)))

    def activation(self, name: str) -> tuple[int, int]:
        """The limits after a fused activation, one of TFLite's names in lower case.

        Raises:
            KeyError: if the name is another.
        """
        low, high = self.limits
        least, most = {
            "none": (None, None),
            "relu": (0.0, None),
            "relu_n1_to_1": (-1.0, 1.0),
            "relu6": (0.0, 6.0),
        }[name]
        return (
            low if least is None else max(low, self.integer(least)),
            high if most is None else min(high, self.integer(most)),
        )


def onto(xp: Arrays, steps: Any, grid: Grid, activation: str = "none") -> Any:
    """Adds the zero point to `steps` and clips them; int32."""
    low, high = grid.activation(activation)
    return xp.cast(xp.clip(steps + grid.zero_point, low, high), "int32")
