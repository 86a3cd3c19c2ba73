"""`TrainedThreshold`: thresholds learned as logarithms, scales that are powers of two (TQT)."""

import dataclasses
import math
from typing import Any, Literal

from keras import ops

from kqat.base import SpecError
from kqat.grids import arithmetic
from kqat.grids.ranges.learned_method import LearnedRangeMethod, RangeForm
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.learned_method import LearnedMethod
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.widths import check_bits


@dataclasses.dataclass(frozen=True)
class TrainedThreshold(LearnedMethod, LearnedRangeMethod):
    """Trained quantization thresholds (TQT): of weights (`weight_step`) and of activations
    (`activation_range`).

    The trained number is the logarithm `l = log2(t)` of the threshold. The scale is a power of two,

        s         = 2**ceil(l) / 2**(bits - 1), or / 2**bits where all values are >= 0
        output    = clip(round(x / s), n, p) * s
        d out/d l = s * ln(2) * (n below the grid; p above it; round(x / s) - x / s inside)
        d out/d x = 1 inside the grid, else 0

    where `[n, p]` are the integers of the grid. Weights are inside it if they round to one of its
    integers, activations if they lie between its lowest and its highest value. Activations behind a
    ReLU have a grid that starts at zero; others have the zero point 0. Weights keep `n == -p`, as
    integer kernels want them symmetric. The scales of weights in the file are these powers of two:
    where a BatchNormalization folds into a layer, its weights are rounded as folded.

    The logarithm needs a rate of its own size: the authors' code trains it with Adam at a rate that
    starts at 0.01 (https://github.com/Xilinx/graffitist).

    Args:
        start: how the threshold of weights starts: `"mse"`, where the step has the least squared
            error of all powers of two; as in the paper at `"3sd"`, three standard deviations, or at
            `"max"`, the largest magnitude, which are coarse at few bits. That of activations starts
            at the calibrated range, in the paper where the Kullback-Leibler divergence is least.

    Raises:
        SpecError: if `start` is none of these.

    Reference: Jain et al. 2020, section 3.3, equations 7 and 8, for the gradients
    (https://arxiv.org/abs/1903.08066). The paper has one threshold for each tensor; here
    `QuantSpec.axis` decides for weights.
    """

    start: Literal["mse", "3sd", "max"] = "mse"

    def __post_init__(self) -> None:
        if self.start not in ("mse", "3sd", "max"):
            raise SpecError(
                f"Expected start 'mse', '3sd' or 'max'. Received: start={self.start!r}."
            )

    def check(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if this method cannot use a weight's grid."""
        check_bits(self, spec, 2, 8)

    def initial(self, weight: Any, spec: QuantSpec) -> Any:
        """The initial logarithm of the threshold of `weight`."""
        if self.start == "mse":
            powers = dataclasses.replace(spec, power_of_two=True)
            step = LeastSquares().step(weight, powers)
            # Half a power below the threshold of that step: as far from the next one as from it.
            return arithmetic.log2(step) + (spec.bits - 1.5)
        axes = arithmetic.shared_axes(weight, spec)
        threshold = ops.max(ops.abs(weight), axis=axes, keepdims=True)
        if self.start == "3sd":
            spread = ops.std(weight, axis=axes, keepdims=True)
            # One weight, or equal ones, have no spread.
            threshold = ops.where(spread > 0.0, 3.0 * spread, threshold)
        return arithmetic.log2(arithmetic.usable_scale(threshold))

    def scale(self, variable: Any, spec: QuantSpec) -> Any:
        """The step of weights whose threshold has the logarithm `variable`."""
        return _power(variable, spec.bits - 1)

    def fake_quantize(self, weight: Any, step: Any, spec: QuantSpec) -> Any:
        """`weight` rounded to multiples of `step`; gradients reach both."""
        ratio, limit = weight / step, float(spec.qmax)
        # Of the grid is what rounds to one of its integers.
        inside = ops.abs(ops.stop_gradient(ratio)) < limit + 0.5
        passed = ops.where(inside, ratio, limit * ops.sign(ops.stop_gradient(ratio)))
        integers = arithmetic.round_weight(weight, ops.stop_gradient(step), spec)
        return arithmetic.straight_through(integers, passed) * step

    MOVES_STEP = True

    def check_grid(self, spec: QuantSpec) -> None:
        """Any grid of activations will do: its scale is a power of two here."""

    def terms(self, form: RangeForm) -> int:
        """The logarithm of the threshold."""
        return 1

    def numbers(self, low: Any, high: Any, spec: QuantSpec, form: RangeForm) -> Any:
        """The logarithm of the threshold that holds a range, shape `(1,)`."""
        threshold = high if form is RangeForm.FROM_ZERO else ops.maximum(high, -low)
        return ops.stack([arithmetic.log2(ops.maximum(threshold, arithmetic.SMALLEST_RANGE))])

    def bounds(
        self, numbers: Any, spec: QuantSpec, form: RangeForm, features: int
    ) -> tuple[Any, Any, Any]:
        """Low, high and step; see the base class."""
        if form is RangeForm.FROM_ZERO:
            step = _power(numbers[0], spec.bits)
            return ops.zeros_like(step), step * float(spec.qmax - spec.qmin), step
        step = _power(numbers[0], spec.bits - 1)
        return step * float(spec.qmin), step * float(spec.qmax), step


def _power(logarithm: Any, bits: int) -> Any:
    """`2**(ceil(logarithm) - bits)`; its gradient is as if nothing were rounded up."""
    scale = arithmetic.exp2(ops.ceil(ops.stop_gradient(logarithm)) - float(bits))
    moved = (logarithm - ops.stop_gradient(logarithm)) * (scale * math.log(2.0))
    return ops.stop_gradient(scale) + moved
