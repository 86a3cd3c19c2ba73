"""`LeastSquares`: the step with the least squared rounding error of the weights."""

import dataclasses
from typing import Any

from keras import ops

from kqat.base import SpecError
from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.widths import check_bits


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """Step with the least `sum((w - round(w / s) * s)**2)`, found anew in every training step.

    The method tries `candidates` fractions of the max-abs step and takes the best. Then it moves
    the step to the least error for the integers `q` found: `s = <w, q> / <q, q>`. The search rounds
    the weights `candidates` times in every training step; `LearnedStep` rounds them once. On a grid
    whose scale is a power of two, it takes the best of the five powers from max-abs downwards.

    Reference: Sung et al. 2015, the L2 error minimization of their section 2
    (https://arxiv.org/abs/1511.06488), by enumeration.

    Raises:
        SpecError: if `candidates` is not an integer above zero.
    """

    candidates: int = 40

    def __post_init__(self) -> None:
        whole = isinstance(self.candidates, int) and not isinstance(self.candidates, bool)
        if not whole or self.candidates < 1:
            raise SpecError(
                f"Expected a number of candidates of at least 1. Received: {self.candidates!r}. "
                "Use 40."
            )

    def check(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if this method cannot use the grid."""
        check_bits(self, spec, 2, 8)

    def step(self, weight: Any, spec: QuantSpec) -> Any:
        """The step of `weight`, in its shape with size 1 along axes that share a step."""
        weight = ops.stop_gradient(weight)
        largest = arithmetic.weight_scale(weight, spec)
        axes = arithmetic.shared_axes(weight, spec)

        def total(x: Any) -> Any:
            return ops.sum(x, axis=axes, keepdims=True)

        def error(step: Any) -> Any:
            # In units of the largest step, so that the square of a tiny weight does not underflow.
            lost = weight - arithmetic.round_weight(weight, step, spec) * step
            return total(ops.square(lost / largest))

        def better(index: Any, best: tuple[Any, Any]) -> tuple[Any, Any]:
            step = largest * (ops.cast(index, "float32") * (1.0 / self.candidates))
            found = error(step)
            return ops.where(found < best[1], step, best[0]), ops.minimum(found, best[1])

        if spec.power_of_two:
            best, least = largest, error(largest)
            for halvings in range(1, 5):
                step = largest * 0.5**halvings
                lost = error(step)
                best, least = ops.where(lost < least, step, best), ops.minimum(lost, least)
            return best

        # Not a Python loop over range(): that would put forty copies of the search in the graph.
        start = largest, error(largest)
        best, least = ops.fori_loop(1, self.candidates, better, start)
        integers = arithmetic.round_weight(weight, best, spec)
        counted = ops.maximum(total(ops.square(integers)), 1.0)
        moved = arithmetic.usable_scale(total(weight * integers) / counted)
        return ops.where(error(moved) < least, moved, best)

    def fake_quantize(self, weight: Any, step: Any, spec: QuantSpec) -> Any:
        """`weight` rounded to multiples of `step`; the gradient passes unchanged."""
        return arithmetic.fake_quantize_weight(weight, step, spec)
