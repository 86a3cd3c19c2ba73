"""`FrozenWeight` and `FrozenConstant`: the integers, scales and grids of weights as they ship."""

import dataclasses

import numpy as np

from kqat.grids import Site


@dataclasses.dataclass(frozen=True)
class FrozenWeight:
    """One weight as it ships.

    Invariants:
      * `values == (integers * scale).astype(float32)`, of the Keras variable's shape
      * `scale` has that shape with the axes that share a scale of size 1
      * `abs(integers) <= QuantSpec(bits=bits, symmetric=True).qmax`
    """

    name: str
    integers: np.ndarray
    scale: np.ndarray
    bits: int
    per_channel: bool

    @property
    def values(self) -> np.ndarray:
        """The float weights that the frozen model computes with."""
        return self.integers.astype(np.float32) * self.scale

    def transposed(self) -> "FrozenWeight":
        """The weight of the transposed matrix."""
        integers = np.ascontiguousarray(self.integers.T)
        return dataclasses.replace(self, integers=integers, scale=self.scale.T)


@dataclasses.dataclass(frozen=True)
class FrozenConstant:
    """A weight that is a value of its own, as a class token: its float32 values and their grid."""

    values: np.ndarray
    grid: Site
