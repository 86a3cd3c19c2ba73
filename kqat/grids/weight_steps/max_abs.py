"""`MaxAbs`: the smallest step whose grid holds the largest weight."""

import dataclasses
from typing import Any, ClassVar

from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.widths import check_bits


@dataclasses.dataclass(frozen=True)
class MaxAbs:
    """Step `max|w| / qmax`: no weight is clipped, and the largest one decides the step.

    So weights that are not all zero do not all become zero. Where they are, the step is tiny.

    Reference: Krishnamoorthi 2018, section 2.5, on the grid of section 2.2, equation 10
    (https://arxiv.org/abs/1806.08342).
    """

    # Whether weights that all round to zero have a step so small that no bias is rounded by it.
    # Without it a layer looks at all rounded weights in every step of training, to know.
    fine_for_zeros: ClassVar[bool] = True

    def check(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if this method cannot use the grid."""
        check_bits(self, spec, 2, 8)

    def step(self, weight: Any, spec: QuantSpec) -> Any:
        """The step of `weight`, in its shape with size 1 along axes that share a step."""
        return arithmetic.weight_scale(weight, spec, empty=arithmetic.EMPTY_SCALE)

    def fake_quantize(self, weight: Any, step: Any, spec: QuantSpec) -> Any:
        """`weight` rounded to multiples of `step`; the gradient passes unchanged."""
        return arithmetic.fake_quantize_weight(weight, step, spec)
