"""`Site`: a value of the model that is an integer tensor in the file, and its grid."""

import dataclasses
from typing import Any

import numpy as np
from keras import ops


@dataclasses.dataclass(frozen=True)
class Site:
    """One value of the model that is an integer tensor in the file.

    Invariant: real value == (integer - zero_point) * scale. `shape` is without the batch axis.
    """

    name: str
    scale: np.float32
    zero_point: int
    bits: int
    shape: tuple[int, ...]

    @property
    def grid(self) -> tuple[np.float32, int, int]:
        """Scale, zero point and bits: sites with equal grids store a value as the same integer."""
        return self.scale, self.zero_point, self.bits

    def integers(self, real: Any) -> Any:
        """The integers of real values, as floats: `floor(real / scale + 1/2) + zero_point`, clipped
        to the integers that the bits hold.

        Args:
            real: NumPy array or tensor of any shape, float32; the result is of its kind and shape.
        """
        library = np if isinstance(real, np.ndarray | np.generic) else ops
        steps = library.floor(real / self.scale + np.float32(0.5)) + self.zero_point
        return library.clip(steps, -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def reals(self, integers: np.ndarray) -> np.ndarray:
        """The real values of integers, float32."""
        return (integers.astype(np.float32) - np.float32(self.zero_point)) * self.scale

    def rounded(self, real: Any) -> Any:
        """The nearest values on the grid, for a float32 tensor of any shape."""
        return (self.integers(real) - np.float32(self.zero_point)) * self.scale
