"""Weights of two values."""

import dataclasses
from typing import Any

from keras import ops

from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.widths import check_bits


@dataclasses.dataclass(frozen=True)
class Binary:
    """Integers −1 and 1, no zero: the sign of `w`, 1 for zero; the step is `mean|w|`.

    The gradient is straight-through. Weights that are all zero have a step of almost zero.
    Reference: Rastegari et al. 2016, section 3.1 (https://arxiv.org/abs/1603.05279).
    """

    def check(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if the grid is none for this method."""
        check_bits(self, spec, 1, 1)

    def step(self, weight: Any, spec: QuantSpec) -> Any:
        """The step of `weight`: its shape, with the axes that share one of size 1."""
        # Not one where there is nothing but zero: the grid has no zero to stay on.
        return ops.maximum(arithmetic.mean_magnitude(weight, spec), arithmetic.SMALLEST_RANGE)

    def fake_quantize(self, weight: Any, step: Any, spec: QuantSpec) -> Any:
        """`-step` or `step` for each of `weight`, straight-through."""
        signs = ops.where(weight < 0.0, -ops.ones_like(weight), ops.ones_like(weight))
        return arithmetic.straight_through(signs * step, weight)
