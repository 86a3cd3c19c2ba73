"""`LearnedTernary`: weights of three values, of which training moves two (TTQ)."""

import dataclasses
from typing import Any

from keras import ops

from kqat.base import SpecError
from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.learned_method import LearnedMethod
from kqat.grids.weight_steps.ternary import kept_by_mean
from kqat.grids.weight_steps.widths import check_bits


@dataclasses.dataclass(frozen=True)
class LearnedTernary(LearnedMethod):
    """Weights `-Wn`, 0 and `Wp`, with both magnitudes learned: trained ternary quantization (TTQ).

    With `D = 0.7 * mean|w|` over the weights that share a scale, or `D = threshold * max|w|`,

        output     = Wp where w > D, -Wn where w < -D, else 0
        d out/d Wp = 1 where w > D;   d out/d Wn = -1 where w < -D
        d out/d w  = Wp / m where w > D, Wn / m where w < -D, else 1

    where `m` is the mean magnitude of the weights that do not become zero. The paper has no `m`:
    its weights are divided by the largest one, and its magnitudes are near 1. Trained weights keep
    their size here. Without `m`, one of 0.1 that becomes zero would get ten times the gradient that
    it had, and Adam, which divides by what it was, would throw it far.

    An operator of a TFLite file has one scale for both signs. So on a grid of 2 bits there is one
    magnitude, `Wp == Wn`, and the integers are −1, 0 and 1. On a grid of 3 to 8 bits the larger
    magnitude is `qmax` steps and the other one is rounded to whole steps, at least one: at 8 bits
    to within 0.4 % of the larger. `convert(…, compress="lookup")` stores three values in two bits
    each whatever the grid.

    Args:
        threshold: the share of the largest weight up to which weights become zero. `None` is the
            rule of `Ternary`, 0.7 times the mean magnitude, and starts from the same three values
            as that method. The paper's 0.05 is a share of the largest weight of a whole layer. Of
            the largest in each channel it leaves so few zeros that the weights start as all but
            binary.

    Raises:
        SpecError: if `threshold` is neither `None` nor inside [0, 1).

    Reference: Zhu et al. 2017, the section on the method (https://arxiv.org/abs/1612.01064), where
    accuracy is best with 30 to 50 % zeros; `D` by the mean is that of Li et al. 2016, section 2
    (https://arxiv.org/abs/1605.04711), and leaves about 42 % of normal weights zero.
    The paper writes the gradient of `Wn` without its minus sign.
    """

    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0.0 <= self.threshold < 1.0:
            raise SpecError(
                "Expected a threshold inside [0, 1), or None. Received: "
                f"threshold={self.threshold!r}. Use None, or 0.2."
            )

    def check(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if this method cannot use the grid."""
        check_bits(self, spec, 2, 8)

    def variable_shape(self, scale_shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
        """The magnitudes, positive first, along a first axis; one on a grid of 2 bits."""
        return (1 if spec.bits == 2 else 2, *scale_shape)

    def initial(self, weight: Any, spec: QuantSpec) -> Any:
        """The mean magnitude of the weights that do not become zero."""
        axes = arithmetic.shared_axes(weight, spec)
        signs = self._signs(weight, spec)
        kept = [ops.abs(signs)]
        if spec.bits > 2:
            kept = [ops.cast(signs > 0.0, "float32"), ops.cast(signs < 0.0, "float32")]
        means = [_mean(weight, one, axes) for one in kept]
        largest = ops.maximum(means[0], means[-1])
        # Where there are no weights of one sign, its magnitude starts as the other's.
        return ops.stack([arithmetic.usable_scale(ops.where(m > 0.0, m, largest)) for m in means])

    def scale(self, variable: Any, spec: QuantSpec) -> Any:
        """The magnitudes as they fit the grid, in the variable's shape; gradients pass."""
        magnitudes = ops.maximum(ops.abs(variable), arithmetic.SMALLEST_RANGE)
        scale = ops.stop_gradient(self._scale_of(magnitudes, spec))
        integers = ops.clip(ops.round(magnitudes / scale), 1.0, float(spec.qmax))
        return arithmetic.straight_through(integers * scale, magnitudes)

    def grid_scale(self, step: Any, spec: QuantSpec) -> Any:
        """The scale of the grid: the larger magnitude is its largest integer."""
        return self._scale_of(step, spec)

    def _scale_of(self, magnitudes: Any, spec: QuantSpec) -> Any:
        # A divisor that a compiler sees becomes a multiplication, which rounds differently.
        largest = ops.max(magnitudes, axis=0)
        qmax = ops.where(largest >= 0.0, float(spec.qmax), 0.0)
        scale = largest / qmax
        return arithmetic.next_power_of_two(scale) if spec.power_of_two else scale

    def fake_quantize(self, weight: Any, step: Any, spec: QuantSpec) -> Any:
        """`-Wn`, 0 or `Wp` for each weight; gradients reach the weight and the magnitudes."""
        signs = self._signs(weight, spec)
        magnitude = ops.where(signs > 0.0, step[0], step[-1])
        mean = _mean(
            ops.stop_gradient(weight), ops.abs(signs), arithmetic.shared_axes(weight, spec)
        )
        relative = magnitude / arithmetic.usable_scale(mean)
        slope = ops.stop_gradient(ops.where(signs == 0.0, 1.0, relative))
        # The second term is exactly zero; it carries the gradient of the weight.
        return signs * magnitude + slope * (weight - ops.stop_gradient(weight))

    def _signs(self, weight: Any, spec: QuantSpec) -> Any:
        """−1, 0 or 1 for each weight, float32."""
        weight = ops.stop_gradient(weight)
        if self.threshold is None:
            kept = kept_by_mean(weight, spec)
        else:
            axes = arithmetic.shared_axes(weight, spec)
            largest = ops.max(ops.abs(weight), axis=axes, keepdims=True)
            kept = ops.abs(weight) > self.threshold * largest
        return ops.where(kept, ops.sign(weight), 0.0)


def _mean(weight: Any, kept: Any, axes: tuple[int, ...]) -> Any:
    """The mean magnitude of the weights where `kept` is 1, not 0; zero where there are none."""
    count = ops.maximum(ops.sum(kept, axis=axes, keepdims=True), 1.0)
    return ops.sum(ops.abs(weight) * kept, axis=axes, keepdims=True) / count
