"""`QuantSpec`: bits, symmetry and axis of an integer grid, as plain data.

A grid of `bits` bits holds the integers `[qmin, qmax]`; a real value is
`(q - zero_point) * scale`. Source: TFLite 8-bit quantization specification
(https://ai.google.dev/edge/litert/models/quantization_spec) and Jacob et al. 2018,
section 2.1 (https://arxiv.org/abs/1712.05877).
"""

import dataclasses
from typing import Any, Literal

from kqat.base import SpecError

MIN_BITS, MAX_BITS = 2, 16

Axis = int | tuple[int, ...] | Literal["channel"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The integer grid of one tensor.

    Invariants:
      * `qmax - qmin == 2**bits - 1`, or one less with `narrow_range`
      * `symmetric` implies `zero_point == 0`
      * the grid of one bit is −1 and 1: it has no zero, and `narrow_range` does not apply

    Args:
        bits: width of an integer, 2 to 16; 1 on a symmetric grid.
        symmetric: whether real zero is integer zero.
        narrow_range: whether the lowest integer is left out (−127 … 127 for 8 bits).
        power_of_two: whether a symmetric grid's scale is a power of two, of weights or activations.
            With 16 bits it is one from `2**-15` to `2**-9`, the scales that the tanh of a fused
            LSTM can read. The scales of weights are those of the file, a BatchNormalization folded
            in.
        axis: `None` for one scale per tensor; an axis or a tuple of axes for one scale per index
            along them; `"channel"` for the output-channel axis that the registry names.

    Raises:
        SpecError: if the fields do not describe a grid.
    """

    bits: int = 8
    symmetric: bool = False
    narrow_range: bool = False
    axis: Axis = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise SpecError(
                f"Expected an integer number of bits. Received: bits={self.bits!r}. Use bits=8."
            )
        if not MIN_BITS <= self.bits <= MAX_BITS and (self.bits != 1 or self.symmetric is not True):
            raise SpecError(
                f"Expected {MIN_BITS} to {MAX_BITS} bits. Received: bits={self.bits}. "
                "Use 8 for full-integer export, or bits=1 with symmetric=True for −1 and 1."
            )
        for name in ("symmetric", "narrow_range", "power_of_two"):
            if not isinstance(value := getattr(self, name), bool):
                raise SpecError(f"Expected True or False. Received: {name}={value!r}.")
        if self.bits == 1 and self.narrow_range:
            raise SpecError(
                "Expected narrow_range=False for a grid of one bit: it has −1 and 1 only. "
                "Received: narrow_range=True. Use narrow_range=False, or bits=2 for −1, 0 and 1."
            )
        if self.power_of_two and not self.symmetric:
            raise SpecError(
                "Expected a symmetric grid for power_of_two=True. Received: "
                "power_of_two=True, symmetric=False. Use symmetric=True."
            )
        axis: object = self.axis
        if isinstance(axis, list):  # JSON has lists instead of tuples
            axis = tuple(axis)
            object.__setattr__(self, "axis", axis)
        if not _is_axis(axis):
            raise SpecError(
                "Expected axis to be an int, a tuple of distinct ints, 'channel' or None. "
                f"Received: axis={axis!r}. Use 'channel', or None for one scale."
            )
        if self.axis is not None and not self.symmetric:
            raise SpecError(
                f"Expected a symmetric grid for scales per axis: integer kernels take no per-axis "
                f"zero point. Received: symmetric=False, axis={self.axis!r}. "
                "Use symmetric=True."
            )

    @property
    def qmin(self) -> int:
        """Lowest integer of the grid."""
        return -(2 ** (self.bits - 1)) + int(self.narrow_range)

    @property
    def qmax(self) -> int:
        """Highest integer of the grid."""
        return 1 if self.bits == 1 else 2 ** (self.bits - 1) - 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; `QuantSpec(**spec.to_dict()) == spec`."""
        return dataclasses.asdict(self)


def _is_axis(axis: object) -> bool:
    if axis is None or axis == "channel":
        return True
    axes = axis if isinstance(axis, tuple) else (axis,)
    whole = all(isinstance(a, int) and not isinstance(a, bool) for a in axes)
    return whole and 0 < len(set(axes)) == len(axes)


INT8_WEIGHTS = QuantSpec(bits=8, symmetric=True, narrow_range=True, axis="channel")
INT8_ACTIVATION = QuantSpec(bits=8)
INT16_ACTIVATION = QuantSpec(bits=16, symmetric=True)
