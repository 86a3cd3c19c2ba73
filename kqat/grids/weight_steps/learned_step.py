"""The step that training finds: learned step size quantization (LSQ)."""

import dataclasses
import math
from typing import Any, Literal

from keras import ops

from kqat.base import SpecError
from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.widths import check_bits


@dataclasses.dataclass(frozen=True)
class LearnedStep:
    """Step `s` as a trainable variable; the loss decides what is clipped.

    With `v = clip(w / s, -qmax, qmax)`, where `N` weights share a step,

        output    = round(v) * s
        d out/d w = 1 where |w / s| <= qmax, else 0
        d out/d s = (round(v) - w / s if |w / s| <= qmax, else ±qmax) / sqrt(N * qmax)

    A step that training takes below zero is used by its magnitude.

    Args:
        start: where the step starts: at the least squared error (`"mse"`, as `LeastSquares`), or
            at the paper's `2 * mean|w| / sqrt(qmax)` (`"mean"`), which loses more of weights that
            are trained already.

    Raises:
        SpecError: if `start` is neither.

    Reference: Esser et al. 2020, section 2 (https://arxiv.org/abs/1902.08153); there the lowest
    integer is `-qmax - 1`, which integer kernels' symmetric weights do not have.
    """

    start: Literal["mse", "mean"] = "mse"

    def __post_init__(self) -> None:
        if self.start not in ("mse", "mean"):
            raise SpecError(f"Expected start 'mse' or 'mean'. Received: start={self.start!r}.")

    def check(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if the grid is none for this method."""
        check_bits(self, spec, 2, 8)

    def step(self, weight: Any, spec: QuantSpec) -> Any:
        """Where the step of `weight` starts: its shape, axes that share one of size 1."""
        if self.start == "mse":
            return LeastSquares().step(weight, spec)
        mean = arithmetic.mean_magnitude(weight, spec)
        return arithmetic.usable_scale(mean * (2.0 / math.sqrt(spec.qmax)))

    def scale(self, step: Any) -> Any:
        """The scale that the variable `step` stands for: above zero."""
        return ops.maximum(ops.abs(step), arithmetic.SMALLEST_RANGE)

    def fake_quantize(self, weight: Any, step: Any, spec: QuantSpec) -> Any:
        """`weight` rounded to multiples of `step`; gradients reach both."""
        sharing = math.prod(weight.shape[a] for a in arithmetic.shared_axes(weight, spec))
        gain = 1.0 / math.sqrt(sharing * spec.qmax)
        step = arithmetic.straight_through(step, step * gain)
        limit = float(spec.qmax)
        clipped = ops.clip(weight / step, -limit, limit)
        integers = arithmetic.round_weight(weight, ops.stop_gradient(step), spec)
        return arithmetic.straight_through(integers, clipped) * step
