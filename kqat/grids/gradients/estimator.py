"""`GradientEstimator`: what estimators have in common, and a user's function as one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from kqat.base import SpecError


class GradientEstimator:
    """What the gradient of a rounded value becomes for the value before rounding."""

    # Whether training adds noise in the place of rounding.
    ADDS_NOISE = False

    def gradient(self, upstream: Any, x: Any, rounded: Any, low: Any, high: Any) -> Any:
        """The gradient with respect to `x`, of its shape.

        Args:
            upstream: that with respect to the rounded value.
            x: the value before rounding, float32.
            rounded: the value on its grid.
            low, high: the least and the greatest value of the grid, of a shape that broadcasts.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FunctionGradient(GradientEstimator):
    """A function of the user's as an estimator: `function(upstream, x, rounded, low, high)`.

    Its arguments and its result are those of `GradientEstimator.gradient`, in `keras.ops`. A saved
    model holds its registered name, so it has to be decorated by
    `keras.saving.register_keras_serializable`.

    Raises:
        SpecError: if it is not registered.
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if keras.saving.get_registered_object(self.registered_name) is not self.function:
            raise SpecError(
                f"Expected a registered function as gradient estimator, so that the model can be "
                f"saved. Received: {self.function!r}. Decorate it with "
                "@keras.saving.register_keras_serializable()."
            )

    @property
    def registered_name(self) -> str:
        """The name by which a saved model knows the function."""
        return str(keras.saving.get_registered_name(self.function))

    def gradient(self, upstream: Any, x: Any, rounded: Any, low: Any, high: Any) -> Any:
        """What the function says."""
        return self.function(upstream, x, rounded, low, high)


def estimated(estimator: GradientEstimator, x: Any, rounded: Any, low: Any, high: Any) -> Any:
    """Zeros of the shape of `x` that carry the gradient of `rounded` back to `x`.

    Args:
        estimator: says how.
        x, rounded, low, high: as for `GradientEstimator.gradient`.
    """

    @ops.custom_gradient
    def zeros(x: Any, rounded: Any, low: Any, high: Any) -> Any:
        def gradient(*arguments: Any, upstream: Any = None) -> tuple[Any, ...]:
            if upstream is None:
                (upstream,) = arguments
            given = estimator.gradient(upstream, x, rounded, low, high)
            return given, *(ops.zeros_like(t) for t in (rounded, low, high))

        return ops.zeros_like(x), gradient

    constants = (ops.stop_gradient(ops.convert_to_tensor(t)) for t in (rounded, low, high))
    return zeros(x, *constants)


def inside(x: Any, low: Any, high: Any) -> Any:
    """1 where `x` lies in `[low, high]`, else 0; float32."""
    return ops.cast(ops.logical_and(x >= low, x <= high), "float32")
