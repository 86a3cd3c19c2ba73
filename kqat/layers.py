"""The layers that quantize.

`QuantizeWrapper` stands around a layer that computes on integers, `ActivationQuantizer` after a
group. Both are ordinary Keras layers, saved and loaded without a custom-object scope.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from kqat import numerics
from kqat.batchnorm import normalize
from kqat.decompositions import finalize
from kqat.errors import FreezeError
from kqat.quantizers import (
    Fixed,
    LearnedStep,
    MaxAbs,
    RangeMethod,
    StepMethod,
    range_method_from_dict,
    range_method_to_dict,
    step_method_from_dict,
    step_method_to_dict,
)
from kqat.registry import rule_for
from kqat.spec import QuantSpec


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
        hides: whether the values are scores of which a mask hides some (`kqat.masks`): the range
            is that of the others, with room below.
    """

    def __init__(
        self,
        spec: QuantSpec,
        range_method: RangeMethod,
        *,
        clamp: str | None = None,
        sites: int = 1,
        hides: bool = False,
        **kwargs: Any,
    ):
        # Ranges are float32 under every policy. Only where the layer's own policy is float32 too
        # does Keras leave its variables alone.
        super().__init__(autocast=False, **{"dtype": "float32", **kwargs})
        self.spec = spec
        self.range_method = range_method
        self.clamp = clamp
        self.sites = sites
        self.hides = hides
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
            rounded = numerics.fake_quantize(self.clamped(x), *self.fixed_range(), self.spec)
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
        if self.clamp == "relu":
            return ops.relu(x)
        return ops.relu6(x) if self.clamp == "relu6" else x

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

    def union(self, site_low: Any, site_high: Any) -> tuple[Any, Any]:
        """The range that holds those of all sites, as the grid allows it."""
        return self._symmetric(*numerics.widen(ops.min(site_low), ops.max(site_high)))

    def _symmetric(self, low: Any, high: Any) -> tuple[Any, Any]:
        return numerics.symmetrize(low, high, self.spec) if self.spec.symmetric else (low, high)

    def _round(self, x: Any, site_low: Any, site_high: Any) -> Any:
        low, high = self.union(site_low, site_high)
        if self.spec.symmetric:  # A range on both sides of zero clamps nothing at zero.
            x = self.clamped(x)
        return numerics.fake_quantize(x, low, high, self.spec)

    def _observed(self, x: Any, site: int) -> tuple[Any, Any]:
        """Updates the site's range by `x`; returns all sites' ranges."""
        low, high, count = self.site_low.value, self.site_high.value, self.count.value
        hides, spec = self.hides, self.spec
        batch = numerics.shown_bounds(x, spec) if hides else numerics.bounds(x, self.clamp)
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
            "clamp": self.clamp,
            "sites": self.sites,
            "hides": self.hides,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ActivationQuantizer":
        """The inverse of `get_config`."""
        spec = QuantSpec(**config.pop("spec"))
        method = range_method_from_dict(config.pop("range_method"))
        return cls(spec, method, **config)


@keras.saving.register_keras_serializable("kqat")
class QuantizeWrapper(keras.layers.Layer):
    """A layer that computes with fake-quantized weights; the layer itself is untouched.

    During a call the weights named in `weights` are replaced by their rounded values
    (`keras.StatelessScope`); gradients reach the float weights straight through. A
    BatchNormalization that will fold into the layer follows inside. Per channel, folding
    commutes with rounding. Per tensor it does not, so there the weights are rounded *as
    folded*, with the moving variance, and unfolded again (Krishnamoorthi 2018, section 3.2.2,
    https://arxiv.org/abs/1806.08342).

    Args:
        layer: the wrapped layer.
        weights: attribute of the layer -> grid.
        normalization: the BatchNormalization that folds into the layer, or `None`.
        weight_step: how the step of each grid is found; a learned one is a variable here.
        freeze_statistics: whether BatchNormalization uses its moving statistics in training.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        weights: Mapping[str, QuantSpec],
        normalization: keras.layers.Layer | None = None,
        *,
        weight_step: StepMethod = MaxAbs(),
        freeze_statistics: bool = False,
        **kwargs: Any,
    ):
        # The layer inside casts by its own policy; here weights are rounded, in float32.
        super().__init__(autocast=False, **{"dtype": "float32", **kwargs})
        self.layer = layer
        self.weight_specs = dict(weights)
        self.normalization = normalization
        self.weight_step = weight_step
        self.steps: dict[str, keras.Variable] = {}
        self.freeze_statistics = freeze_statistics
        self._takes_training = "training" in inspect.signature(layer.call).parameters
        self.supports_masking = layer.supports_masking

    def build(self, input_shape: Any) -> None:
        """Builds the layer and the BatchNormalization, and learned steps, which are one."""
        if not self.layer.built:
            self.layer.build(input_shape)
        if self.normalization is not None and not self.normalization.built:
            self.normalization.build(self.layer.compute_output_shape(input_shape))
        if isinstance(self.weight_step, LearnedStep):
            self.steps = {name: self._new_step(name) for name in self.weight_specs}

    def _new_step(self, name: str) -> keras.Variable:
        variable = self._variable(name)
        shared = numerics.shared_axes(variable, self.weight_specs[name])
        shape = tuple(1 if a in shared else n for a, n in enumerate(variable.shape))
        return self.add_weight(name=f"{name}_step", shape=shape, initializer="ones", autocast=False)

    def take_over(self, weights: Any, normalization: Any = ()) -> None:
        """Assigns the layer's and the BatchNormalization's weights; learned steps start there."""
        self.layer.set_weights(weights)
        finalize(self.layer)
        if self.normalization is not None:
            self.normalization.set_weights(normalization)
        self.start_steps()

    def start_steps(self) -> None:
        """Puts learned steps where they start for the weights as they are."""
        for name, step in self.steps.items():
            step.assign(self.weight_step.step(self._folded(name), self.weight_specs[name]))

    def set_weights(self, weights: Any) -> None:
        """As every layer's; a Normalization inside computes with them at once."""
        super().set_weights(weights)
        finalize(self.layer)

    def call(self, x: Any, training: bool | None = None) -> Any:
        """What the layer (and BatchNormalization) computes from `x` with rounded weights."""
        statistics = training and not self.freeze_statistics
        options = {"training": statistics} if self._takes_training else {}
        if self.weight_specs:
            y = self._call_rounded(x, options)
        else:
            y = self.layer(x, **options)
        if self.normalization is None:
            return y
        return normalize(self.normalization, y, statistics)

    def _call_rounded(self, x: Any, options: dict[str, Any]) -> Any:
        variables = self.layer.variables
        rounded = {id(self._variable(name)): self.rounded(name) for name in self.weight_specs}
        mapping = [(v, rounded.get(id(v), v.value)) for v in variables]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            y = self.layer(x, **options)
        for loss in scope.losses:
            self.add_loss(loss)
        for variable in variables:
            # A weight that is not trained was replaced too, and must not stay rounded.
            if variable.trainable or id(variable) in rounded:
                continue
            if (new := scope.get_current_value(variable)) is not None:
                variable.assign(new)
        return y

    def _variable(self, name: str) -> keras.Variable:
        return getattr(self.layer, name)

    def rounded(self, name: str) -> Any:
        """The rounded weight `name`, of the variable's shape: what the layer computes with."""
        fold = self._fold_before(name)
        on_grid = self.on_grid(name)
        return on_grid if fold is None else on_grid / fold

    def on_grid(self, name: str) -> Any:
        """The rounded weight, integers times `scale(name)`; folded where `folds_before(name)`."""
        folded, spec = self._folded(name), self.weight_specs[name]
        return self.weight_step.fake_quantize(folded, self._step(name, folded), spec)

    def scale(self, name: str) -> Any:
        """The scale of weight `name`: its shape, with the axes that share a scale of size 1."""
        return ops.stop_gradient(self._step(name, self._folded(name)))

    def _step(self, name: str, folded: Any) -> Any:
        if isinstance(self.weight_step, LearnedStep):
            return self.weight_step.scale(self.steps[name].value)
        return ops.stop_gradient(self.weight_step.step(folded, self.weight_specs[name]))

    def folds_before(self, name: str) -> bool:
        """Whether the BatchNormalization is folded in before rounding: one scale per tensor."""
        return self.normalization is not None and self.weight_specs[name].axis is None

    def _fold_before(self, name: str) -> Any:
        return ops.stop_gradient(self.fold_factor(name)) if self.folds_before(name) else None

    def _folded(self, name: str) -> Any:
        value = ops.cast(self._variable(name).value, "float32")
        fold = self._fold_before(name)
        return value if fold is None else value * fold

    def fold_factor(self, name: str = "kernel") -> Any:
        """`gamma / sqrt(moving_variance + epsilon)`, shaped to broadcast over weight `name`.

        A factor of zero, which cannot be unfolded, is replaced by one; the layer's output is
        multiplied by zero then in any case.
        """
        norm: Any = self.normalization
        factor = 1.0 / ops.sqrt(norm.moving_variance.value + norm.epsilon)
        if norm.scale:
            factor = factor * norm.gamma.value
        factor = ops.where(factor == 0.0, ops.ones_like(factor), factor)
        shape = self._variable(name).shape
        axes = {a % len(shape) for a in rule_for(self.layer).weights[name] or ()}
        return ops.reshape(factor, [s if i in axes else 1 for i, s in enumerate(shape)])

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the layer."""
        return self.layer.compute_output_shape(input_shape)

    def compute_output_spec(self, x: Any, training: bool | None = None) -> Any:
        """The layer's output shape and dtype."""
        shape = self.layer.compute_output_spec(x).shape
        return keras.KerasTensor(shape, dtype=self.layer.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Plain JSON types and the serialized layers."""
        serialize = keras.saving.serialize_keras_object
        norm = self.normalization
        config = super().get_config()
        config.pop("autocast", None)
        return {
            **config,
            "layer": serialize(self.layer),
            "weights": {name: spec.to_dict() for name, spec in self.weight_specs.items()},
            "normalization": None if norm is None else serialize(norm),
            "weight_step": step_method_to_dict(self.weight_step),
            "freeze_statistics": self.freeze_statistics,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantizeWrapper":
        """The inverse of `get_config`."""
        restore = keras.saving.deserialize_keras_object
        norm = config.pop("normalization")
        layer = restore(config.pop("layer"))
        weights = {name: QuantSpec(**spec) for name, spec in config.pop("weights").items()}
        method = step_method_from_dict(config.pop("weight_step"))
        norm = None if norm is None else restore(norm)
        return cls(layer, weights, norm, weight_step=method, **config)
