"""`LearnedStep`: the step is a trainable variable, learned step size quantization (LSQ)."""

import dataclasses
import math
from typing import Any, Literal

from keras import ops

from kqat.base import SpecError
from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.learned_method import LearnedMethod
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.widths import check_bits


@dataclasses.dataclass(frozen=True)
class LearnedStep(LearnedMethod):
    """Step `s` as a trainable variable, so that the loss decides how much is clipped.

    With `v = clip(w / s, -qmax, qmax)`, where `N` weights share a step,

        output    = round(v) * s
        d out/d w = 1 where |w / s| <= qmax, else 0
        d out/d s = (round(v) - w / s if |w / s| <= qmax, else ±qmax) / sqrt(N * qmax)

    If training makes the step negative, its magnitude is used. On a grid whose scale is a power of
    two (`QuantSpec(power_of_two=True)`) the nearest power of two, in logarithms, is used; gradients
    are those of the step itself.

    Args:
        start: the initial step: `"mse"` has the least squared error (as `LeastSquares`), `"mean"`
            is the paper's `2 * mean|w| / sqrt(qmax)`, which rounds trained weights more coarsely.

    Raises:
        SpecError: if `start` is neither.

    Reference: Esser et al. 2020, section 2.1 for the gradients and the start, section 2.2 for the
    factor `1 / sqrt(N * qmax)` (https://arxiv.org/abs/1902.08153). The paper has one step for each
    layer; here `QuantSpec.axis` decides. The paper's lowest integer is `-qmax - 1`; here it is
    `-qmax`, as integer kernels want symmetric weights.
    """

    start: Literal["mse", "mean"] = "mse"

    def __post_init__(self) -> None:
        if self.start not in ("mse", "mean"):
            raise SpecError(f"Expected start 'mse' or 'mean'. Received: start={self.start!r}.")

    def check(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if this method cannot use the grid."""
        check_bits(self, spec, 2, 8)

    def initial(self, weight: Any, spec: QuantSpec) -> Any:
        """The initial step of `weight`, in its shape with size 1 along axes that share a step."""
        if self.start == "mse":
            return LeastSquares().step(weight, spec)
        mean = arithmetic.mean_magnitude(weight, spec)
        return arithmetic.usable_scale(mean * (2.0 / math.sqrt(spec.qmax)))

    def scale(self, variable: Any, spec: QuantSpec) -> Any:
        """The step that the variable stands for; always positive."""
        step = ops.maximum(ops.abs(variable), arithmetic.SMALLEST_RANGE)
        return arithmetic.near_power_of_two(step) if spec.power_of_two else step

    def fake_quantize(self, weight: Any, step: Any, spec: QuantSpec) -> Any:
        """`weight` rounded to multiples of `step`; gradients reach both."""
        sharing = math.prod(weight.shape[a] for a in arithmetic.shared_axes(weight, spec))
        gain = 1.0 / math.sqrt(sharing * spec.qmax)
        step = arithmetic.straight_through(step, step * gain)
        limit = float(spec.qmax)
        clipped = ops.clip(weight / step, -limit, limit)
        integers = arithmetic.round_weight(weight, ops.stop_gradient(step), spec)
        return arithmetic.straight_through(integers, clipped) * step
