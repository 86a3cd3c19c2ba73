"""`Binary`: weights of two values, `-step` and `step`."""

import dataclasses
from typing import Any

from keras import ops

from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.widths import check_bits


@dataclasses.dataclass(frozen=True)
class Binary:
    """Integers −1 and 1: the sign of `w`, with 1 for zero. The step is `mean|w|`.

    This is the scale of XNOR-Net and of its Binary-Weight-Networks, per output channel with
    `axis="channel"`. Activations stay at 8 or 16 bits: no TFLite kernel takes binary ones. The
    gradient is straight-through, without the paper's factor `1 / n + step * (|w| <= 1)`.
    If all weights are zero, the step is almost zero.

    Reference: Rastegari et al. 2016, section 3.1, equation 6 (https://arxiv.org/abs/1603.05279).
    """

    def check(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if this method cannot use the grid."""
        check_bits(self, spec, 1, 1)

    def step(self, weight: Any, spec: QuantSpec) -> Any:
        """The step of `weight`, in its shape with size 1 along axes that share a step."""
        # For weights that are all zero the step is tiny and not 1: the grid has no zero, so each
        # weight becomes plus or minus a step.
        mean = arithmetic.mean_magnitude(weight, spec)
        step = ops.maximum(mean, arithmetic.SMALLEST_RANGE)
        return arithmetic.near_power_of_two(step) if spec.power_of_two else step

    def fake_quantize(self, weight: Any, step: Any, spec: QuantSpec) -> Any:
        """`-step` or `step` for each weight; the gradient passes unchanged."""
        signs = ops.where(weight < 0.0, -ops.ones_like(weight), ops.ones_like(weight))
        return arithmetic.straight_through(signs * step, weight)
