"""`LearnedClip`: the bound at which activations are clipped is trained (PACT)."""

import dataclasses
from typing import Any

from keras import ops

from kqat.base import SpecError
from kqat.grids.ranges.learned_method import LearnedRangeMethod, RangeForm
from kqat.grids.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class LearnedClip(LearnedRangeMethod):
    """The range `[0, a]` behind a ReLU, with `a` trained: parameterized clipping activation (PACT).

        output    = round(clip(x, 0, a) / s) * s    with s = a / (2**bits - 1)
        d out/d x = 1 for 0 <= x <= a, else 0
        d out/d a = 1 for x > a, else 0
        loss     += decay * a**2

    The paper clips values behind a ReLU only. Elsewhere both bounds are trained in this way; on a
    symmetric grid one bound, that of both sides. The paper starts `a` above typical values; here it
    starts at the calibrated range.
    Scores that an attention mask hides keep the moving average, as the mask needs room below them.

    Args:
        decay: weight of the penalty, which narrows ranges. The paper gives the bounds the decay of
            the weights (section 4.2), which for its ResNet-20 is 0.0002 (appendix B).

    Raises:
        SpecError: if `decay` is negative.

    Reference: Choi et al. 2018, section 4, equations 1 to 3 (https://arxiv.org/abs/1805.06085).
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < float("inf"):
            raise SpecError(
                f"Expected a decay of 0 or more. Received: decay={self.decay!r}. Use 0.0002."
            )

    def terms(self, form: RangeForm) -> int:
        """Both bounds, or the upper one alone."""
        return 2 if form is RangeForm.ANY else 1

    def numbers(self, low: Any, high: Any, spec: QuantSpec, form: RangeForm) -> Any:
        """`(high, low)`, or `(high,)`, of a range."""
        return ops.stack([high, low] if form is RangeForm.ANY else [high])

    def bounds(
        self, numbers: Any, spec: QuantSpec, form: RangeForm, features: int
    ) -> tuple[Any, Any, Any]:
        """Low, high and step; see the base class."""
        high = ops.abs(numbers[0])
        if form is RangeForm.SYMMETRIC:
            low = high * (spec.qmin / spec.qmax)
        else:
            low = numbers[1] if form is RangeForm.ANY else ops.zeros_like(high)
        return low, high, (high - low) * (1.0 / (spec.qmax - spec.qmin))

    def penalty(self, numbers: Any) -> Any:
        """`decay` times the sum of the squared bounds."""
        return self.decay * ops.sum(ops.square(numbers)) if self.decay else None
