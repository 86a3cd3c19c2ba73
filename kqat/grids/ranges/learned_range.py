"""`LearnedRange`: step and offset of activations are trained (LSQ+, and LSQ behind a ReLU)."""

import dataclasses
import math
from typing import Any

from keras import ops

from kqat.grids import arithmetic
from kqat.grids.ranges.learned_method import LearnedRangeMethod, RangeForm
from kqat.grids.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class LearnedRange(LearnedRangeMethod):
    """Step `s` and offset `b` of a range are trained, learned step size quantization plus (LSQ+).

    With `v = (x - b) / s` and the integers 0 to `p` of the grid,

        output    = round(clip(v, 0, p)) * s + b
        d out/d x = 1 inside, else 0
        d out/d s = round(v) - v inside; 0 below; p above
        d out/d b = 0 inside, else 1

    and both gradients are divided by `sqrt(N * p)`, where `N` values of a sample share the range.
    Behind a ReLU `b` is zero and is not trained; on a symmetric grid too, and the integers there
    are those of the grid: both are LSQ for activations. In the file `-b / s` is a whole number, the
    zero point, which training rounds likewise.

    Both start at the calibrated range; the paper starts where the squared error is least.
    Scores that an attention mask hides keep the moving average, as the mask needs room below them.

    Reference: Bhalgat et al. 2020, equation 3, configuration 4: unsigned integers with an offset
    (https://arxiv.org/abs/2004.09576). The factor of the gradients is that of Esser et al. 2020,
    section 2.2 (https://arxiv.org/abs/1902.08153).
    """

    MOVES_STEP = True

    def terms(self, form: RangeForm) -> int:
        """Step and offset, or the step alone."""
        return 2 if form is RangeForm.ANY else 1

    def numbers(self, low: Any, high: Any, spec: QuantSpec, form: RangeForm) -> Any:
        """`(step, offset)`, or `(step,)`, of a range."""
        # Not a division: compilers replace one by a constant, which rounds differently.
        step = (high - low) * (1.0 / (spec.qmax - spec.qmin))
        return ops.stack([step, low] if form is RangeForm.ANY else [step])

    def bounds(
        self, numbers: Any, spec: QuantSpec, form: RangeForm, features: int
    ) -> tuple[Any, Any, Any]:
        """Low, high and step; see the base class."""
        levels = float(spec.qmax - spec.qmin)
        most = float(spec.qmax) if form is RangeForm.SYMMETRIC else levels
        gain = 1.0 / math.sqrt(features * most)
        numbers = arithmetic.straight_through(numbers, numbers * gain)
        step = ops.maximum(ops.abs(numbers[0]), arithmetic.SMALLEST_RANGE)
        if form is RangeForm.SYMMETRIC:
            return step * float(spec.qmin), step * float(spec.qmax), step
        if form is RangeForm.FROM_ZERO:
            return ops.zeros_like(step), step * levels, step
        return numbers[1], numbers[1] + step * levels, step
