"""`Ternary`: weights of three values, as in ternary weight networks (TWN)."""

import dataclasses
from typing import Any

from keras import ops

from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.widths import check_bits


@dataclasses.dataclass(frozen=True)
class Ternary:
    """Integers −1, 0, 1: zero where `|w| <= 0.7 * mean|w|`; the step is the mean `|w|` of the rest.

    Both means are taken over the weights that share a scale. The gradient is straight-through.
    Reference: Li et al. 2016, section 2 (https://arxiv.org/abs/1605.04711), whose later versions
    round the factor to 0.75.
    """

    def check(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if this method cannot use the grid."""
        check_bits(self, spec, 2, 2)

    def step(self, weight: Any, spec: QuantSpec) -> Any:
        """The step of `weight`, in its shape with size 1 along axes that share a step."""
        kept = ops.cast(kept_by_mean(weight, spec), "float32")
        axes = arithmetic.shared_axes(weight, spec)
        count = ops.maximum(ops.sum(kept, axis=axes, keepdims=True), 1.0)
        total = ops.sum(ops.abs(weight) * kept, axis=axes, keepdims=True)
        step = arithmetic.usable_scale(total / count)
        return arithmetic.near_power_of_two(step) if spec.power_of_two else step

    def fake_quantize(self, weight: Any, step: Any, spec: QuantSpec) -> Any:
        """`-step`, 0 or `step` for each weight; the gradient passes unchanged."""
        integers = ops.sign(weight) * ops.cast(kept_by_mean(weight, spec), "float32")
        return arithmetic.straight_through(integers * step, weight)


def kept_by_mean(weight: Any, spec: QuantSpec) -> Any:
    """Which weights do not become zero, boolean: those above 0.7 times the mean magnitude."""
    return ops.abs(weight) > 0.7 * arithmetic.mean_magnitude(weight, spec)
