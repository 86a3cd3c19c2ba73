"""`LearnedRangeMethod`: what range methods have in common whose ranges are trained."""

from typing import Any

from kqat.base import SpecError, TextEnum
from kqat.grids.spec import QuantSpec


class RangeForm(TextEnum):
    """What a learned range may be: of any signs, from zero on, or with zero in the middle."""

    ANY = "any"
    FROM_ZERO = "from zero"
    SYMMETRIC = "symmetric"

    @classmethod
    def of(cls, spec: QuantSpec, clamped: bool) -> "RangeForm":
        """The form of a range on the grid `spec`, behind a ReLU if `clamped`."""
        if spec.symmetric:
            return cls.SYMMETRIC
        return cls.FROM_ZERO if clamped else cls.ANY


class LearnedRangeMethod:
    """A range method whose numbers are trained by the loss.

    The `ActivationQuantizer` finds a range as any other does, by calibration or in its first batch.
    From there on it trains what is added to the numbers of that range, which starts at zero: so
    the steps of an optimizer are those that it would take with the numbers themselves.
    """

    # Whether values inside the range have a gradient with respect to the step.
    MOVES_STEP = False

    def check_grid(self, spec: QuantSpec) -> None:
        """Raises `SpecError` if this method cannot use an activation's grid."""
        if spec.power_of_two:
            raise SpecError(
                f"Expected a grid of any scale for {self}. Received: {spec}. Use "
                "power_of_two=False, or kqat.TrainedThreshold(), which learns powers of two."
            )

    def terms(self, form: RangeForm) -> int:
        """How many numbers a range of this form has."""
        raise NotImplementedError

    def numbers(self, low: Any, high: Any, spec: QuantSpec, form: RangeForm) -> Any:
        """The numbers that stand for a range, float32 of shape `(terms(form),)`."""
        raise NotImplementedError

    def bounds(
        self, numbers: Any, spec: QuantSpec, form: RangeForm, features: int
    ) -> tuple[Any, Any, Any]:
        """Low, high and step, float32 scalars through which gradients reach `numbers`.

        Args:
            numbers: as from `numbers`.
            spec: the grid.
            form: of the range.
            features: how many values of one sample share the range.
        """
        raise NotImplementedError

    def penalty(self, numbers: Any) -> Any:
        """What is added to the loss in training, a scalar; `None` for nothing."""
        return None
