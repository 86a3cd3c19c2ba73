"""`Site`: a value that is an integer in the file, and its grid."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Site:
    """One value that is an integer in the file.

    Invariant: real value == (integer - zero_point) * scale. `shape` leaves the batch out.
    """

    name: str
    scale: np.float32
    zero_point: int
    bits: int
    shape: tuple[int, ...]

    def integers(self, real: np.ndarray) -> np.ndarray:
        """The integers of real values, of their shape, as floats: floor(real / scale + 1/2)."""
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return np.clip(np.floor(real / self.scale + np.float32(0.5)) + self.zero_point, low, high)

    def reals(self, integers: np.ndarray) -> np.ndarray:
        """The real values of integers, float32."""
        return (integers.astype(np.float32) - np.float32(self.zero_point)) * self.scale
