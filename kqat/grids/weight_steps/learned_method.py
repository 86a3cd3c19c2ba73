"""`LearnedMethod`: what step methods have in common whose steps are trainable variables."""

from typing import Any

from kqat.grids.spec import QuantSpec


class LearnedMethod:
    """A step method that keeps numbers of its own for each weight, which training moves.

    The `QuantizeWrapper` owns a trainable variable of the value and shape of `initial`. In each
    call it takes the step from it by `scale`, through which the gradient reaches the variable.
    """

    def initial(self, weight: Any, spec: QuantSpec) -> Any:
        """The value with which the variable of `weight` starts, float32."""
        raise NotImplementedError

    def variable_shape(self, scale_shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
        """The shape of `initial`, where the weight's scale has `scale_shape`."""
        return scale_shape

    def scale(self, variable: Any, spec: QuantSpec) -> Any:
        """The step that `fake_quantize` takes, from the variable."""
        raise NotImplementedError

    def step(self, weight: Any, spec: QuantSpec) -> Any:
        """The initial step of `weight`."""
        return self.scale(self.initial(weight, spec), spec)

    def grid_scale(self, step: Any, spec: QuantSpec) -> Any:
        """The scale of the grid: the weight's shape, with size 1 along axes that share it."""
        return step
