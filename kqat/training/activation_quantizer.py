"""The layer that rounds the values of a group; saved and loaded without a custom-object scope."""

from typing import Any

import keras
from keras import ops

from kqat.base import FreezeError
from kqat.grids import (
    Clamp,
    Fixed,
    QuantSpec,
    RangeMethod,
    arithmetic,
    range_method_from_dict,
    range_method_to_dict,
)
from kqat.training.older_files import with_label


@keras.saving.register_keras_serializable("kqat")
class ActivationQuantizer(keras.layers.Layer):
    """Rounds the values of one group to its integer grid; the gradient is straight-through.

    In training it observes the batch and moves its range, unless `trainable` is `False`. Each
    call site (`site`) has a range of its own, of which the group's range is the union:

        low == min(site_low), high == max(site_high), low <= 0 <= high

    or, on a symmetric grid, the least symmetric range around it.
    Before any batch was seen, inference lets values pass unrounded.

    Args:
        spec: the grid, one scale per tensor.
        range_method: how the range is found; `Fixed` is never observed.
        clamp: `"relu"`, `"relu6"` or `None`: carried out by the rounding where the range starts
            at 0, which clips what lies below.
        sites: number of call sites.
        hides: whether the values are attention scores of which a mask hides some: the range is that
            of the others, with room below.
        label: what reports and the file call the value that is rounded, where there is one call
            site; the layer's own name if it is left out.
    """

    def __init__(
        self,
        spec: QuantSpec,
        range_method: RangeMethod,
        *,
        clamp: Clamp | str | None = None,
        sites: int = 1,
        hides: bool = False,
        label: str | None = None,
        **kwargs: Any,
    ):
        # Ranges are float32 under every policy. Only where the layer's own policy is float32 too
        # does Keras leave its variables alone.
        super().__init__(autocast=False, **{"dtype": "float32", **kwargs})
        self.spec = spec
        self.range_method = range_method
        self.clamp = None if clamp is None else Clamp(clamp)
        self.sites = sites
        self.hides = hides
        self.label = label or self.name
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """Creates the ranges, all zero: nothing seen."""
        if isinstance(self.range_method, Fixed):
            return

        def ranges(name: str) -> keras.Variable:
            return self.add_weight(
                name=name,
                shape=(self.sites,),
                initializer="zeros",
                dtype="float32",
                trainable=False,
                aggregation="mean",
            )

        self.site_low, self.site_high, self.count = map(ranges, ("low", "high", "count"))

    def call(
        self, x: Any, site: int = 0, observe: bool = True, training: bool | None = None
    ) -> Any:
        """`x` rounded; any shape. `site` and `observe` say which range `x` shapes, and whether."""
        dtype = x.dtype
        x = ops.cast(x, "float32")
        if isinstance(self.range_method, Fixed):
            rounded = arithmetic.fake_quantize(self.clamped(x), *self.fixed_range(), self.spec)
            return ops.cast(rounded, dtype)
        if training and observe and self.trainable:
            low, high = self._observed(x, site)
            return ops.cast(self._round(x, low, high), dtype)
        low, high, count = self.site_low.value, self.site_high.value, self.count.value
        # Not ops.where: it would compute both, and send gradients through both.
        rounded = ops.cond(
            ops.max(count) > 0.0, lambda: self._round(x, low, high), lambda: self.clamped(x)
        )
        return ops.cast(rounded, dtype)

    def clamped(self, x: Any) -> Any:
        """`x` after the clamp alone."""
        if self.clamp is Clamp.RELU:
            return ops.relu(x)
        return ops.relu6(x) if self.clamp is Clamp.RELU6 else x

    def observe(self, x: Any, site: int = 0) -> None:
        """Lets `x` (any shape) shape the range of `site`, as a training batch does."""
        if not isinstance(self.range_method, Fixed):
            self._observed(ops.cast(x, "float32"), site)

    def reset(self) -> None:
        """Forgets what was observed."""
        if not isinstance(self.range_method, Fixed):
            for variable in (self.site_low, self.site_high, self.count):
                variable.assign(ops.zeros_like(variable))

    def fixed_range(self) -> tuple[Any, Any]:
        """The range that a `Fixed` method gives, or the least symmetric one around it."""
        assert isinstance(self.range_method, Fixed)
        return self._symmetric(self.range_method.low, self.range_method.high)

    def range(self) -> tuple[float, float]:
        """The group's range `(low, high)` as the file will carry it.

        Raises:
            FreezeError: if no batch was ever seen.
        """
        if isinstance(self.range_method, Fixed):
            low, high = self.fixed_range()
            return float(low), float(high)
        if float(ops.max(self.count)) == 0.0:
            raise FreezeError(
                f"Expected ranges from data. Received: quantizer '{self.name}', which has seen "
                "none. Give calibration_data to kqat.quantize_model, or train."
            )
        low, high = self.union(self.site_low.value, self.site_high.value)
        return float(low), float(high)

    def is_calibrated(self) -> bool:
        """Whether the range is known."""
        return isinstance(self.range_method, Fixed) or float(ops.max(self.count)) > 0.0

    def scale(self) -> Any:
        """The scale of the grid now, a float32 scalar; zero where the range is not known yet."""
        levels = float(self.spec.qmax - self.spec.qmin)
        if isinstance(self.range_method, Fixed):
            low, high = self.fixed_range()
            return ops.stop_gradient(ops.convert_to_tensor((high - low) / levels, "float32"))
        low, high = self.union(self.site_low.value, self.site_high.value)
        known = ops.max(self.count.value) > 0.0
        return ops.stop_gradient(ops.where(known, (high - low) / levels, 0.0))

    def union(self, site_low: Any, site_high: Any) -> tuple[Any, Any]:
        """The range that holds those of all sites, as the grid allows it."""
        return self._symmetric(*arithmetic.widen(ops.min(site_low), ops.max(site_high)))

    def _symmetric(self, low: Any, high: Any) -> tuple[Any, Any]:
        return arithmetic.symmetrize(low, high, self.spec) if self.spec.symmetric else (low, high)

    def _round(self, x: Any, site_low: Any, site_high: Any) -> Any:
        low, high = self.union(site_low, site_high)
        if self.spec.symmetric:  # A range on both sides of zero clamps nothing at zero.
            x = self.clamped(x)
        return arithmetic.fake_quantize(x, low, high, self.spec)

    def _observed(self, x: Any, site: int) -> tuple[Any, Any]:
        """Updates the site's range by `x`; returns all sites' ranges."""
        low, high, count = self.site_low.value, self.site_high.value, self.count.value
        hides, spec = self.hides, self.spec
        batch = arithmetic.shown_bounds(x, spec) if hides else arithmetic.bounds(x, self.clamp)
        assert not isinstance(self.range_method, Fixed), "a fixed range is never observed"
        # Of all sites, then only this one is kept: a slice would be an operation of its own.
        new_low, new_high = self.range_method.update(low, high, count, *batch)
        # One exploding batch must not poison the range for good.
        here = ops.logical_and(*map(ops.isfinite, batch))
        if self.sites > 1:
            here = ops.logical_and(ops.arange(self.sites) == site, here)
        low, high = ops.where(here, new_low, low), ops.where(here, new_high, high)
        self.site_low.assign(low)
        self.site_high.assign(high)
        self.count.assign(ops.where(here, count + 1.0, count))
        return low, high

    def compute_output_shape(self, input_shape: Any, **kwargs: Any) -> Any:
        """The input's shape."""
        return input_shape

    def compute_output_spec(self, x: Any, **kwargs: Any) -> Any:
        """The input's shape and dtype."""
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        """Plain JSON types only, so that loading needs no custom objects."""
        config = super().get_config()
        config.pop("autocast", None)
        return {
            **config,
            "spec": self.spec.to_dict(),
            "range_method": range_method_to_dict(self.range_method),
            "clamp": self.clamp and self.clamp.value,
            "sites": self.sites,
            "hides": self.hides,
            "label": self.label,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ActivationQuantizer":
        """The inverse of `get_config`."""
        config = with_label(config, suffix="_quantizer")
        spec = QuantSpec(**config.pop("spec"))
        method = range_method_from_dict(config.pop("range_method"))
        return cls(spec, method, **config)
