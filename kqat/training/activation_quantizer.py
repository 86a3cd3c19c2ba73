"""The layer that rounds the values of a group; saved and loaded without a custom-object scope."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.base import FreezeError, array_of
from kqat.graph import layer_behind
from kqat.grids import (
    FOLLOWING,
    Anchor,
    Bounds,
    Clamp,
    Fixed,
    GradientEstimator,
    LastValue,
    LearnedRangeMethod,
    MinMax,
    MovingAverage,
    QuantSpec,
    RangeForm,
    RangeMethod,
    arithmetic,
    clamp_from_json,
    clamp_to_json,
    estimated,
    gradient_from_dict,
    gradient_to_dict,
    range_method_from_dict,
    range_method_to_dict,
    traced_once,
)
from kqat.registry import Resolution
from kqat.training.controls import Controls
from kqat.training.older_files import with_label

# Calibration weighs as many batches as the moving average of training remembers, at least.
_LEAST_WEIGHT = 100.0
# Of a step: a mean of fewer values than 2,000 is nowhere nearer to a half without being one.
_TIP = 2.0**-12
# What was moved when the range was frozen, where it was not. Weights of such an epoch may come back
# into a frozen range: as those of the best epoch do, which a callback restores. Replicas may add
# such numbers up, and older files have 3e38: all of `_KEPT_BELOW` and more say the same.
_NOT_KEPT, _KEPT_BELOW = 1e30, 1e29


@dataclasses.dataclass(frozen=True)
class SiteRange:
    """What calibration found for one call site.

    Attributes:
        low, high: the range.
        seen_low, seen_high: the least and the greatest value of all.
        noise: what Dropout and noise add to `-seen_low` and `seen_high` in training mode.
        batches: how many batches of 32 were seen.
    """

    low: float
    high: float
    seen_low: float
    seen_high: float
    noise: tuple[float, float]
    batches: int

    def no_narrower(self, width: float) -> "SiteRange":
        """The same with a range at least that wide, which then counts as seen."""
        low, high = arithmetic.no_narrower_number(self.low, self.high, width)
        if (low, high) == (self.low, self.high):
            return self
        return dataclasses.replace(
            self,
            low=low,
            high=high,
            seen_low=min(low, self.seen_low),
            seen_high=max(high, self.seen_high),
        )


class _Sources:
    """The quantizers of the inputs of what a call site rounds; a share of a power of each scale.

    They are found where the model's graph is made. Keras, which would take their variables for the
    layer's too, does not look in here.
    """

    def __init__(self) -> None:
        self.by_site: dict[int, list[tuple[ActivationQuantizer, float, int]]] = {}

    def get(self, site: int) -> list[tuple["ActivationQuantizer", float, int]]:
        return self.by_site.get(site, [])


def _power(scale: Any, power: int) -> Any:
    """By products, of which the first power has none: `fit` computes this at every step."""
    return functools.reduce(operator.mul, [scale] * power)


class _LastRange:
    """A range that was computed, and the bytes of the call sites' ranges that it is of."""

    key = b""
    value = (0.0, 0.0)


def _largest(sites: Any) -> Any:
    """The largest of one number per call site; of one site without a reduction."""
    return ops.reshape(sites, ()) if sites.shape[0] == 1 else ops.max(sites)


@functools.cache
def _union(spec: QuantSpec, clamp: Clamp | Bounds | None) -> Callable[[Any, Any], Any]:
    """What finds the range that holds those of all sites, as the grid allows it."""

    def union(site_low: Any, site_high: Any) -> tuple[Any, Any]:
        low = ops.reshape(site_low, ()) if site_low.shape[0] == 1 else ops.min(site_low)
        if isinstance(clamp, Clamp):
            # From zero on, or the rounding does not carry out a ReLU: see `_round`.
            low = ops.maximum(low, clamp.low)
        usable = arithmetic.widen(low, _largest(site_high))
        return _symmetric(*_inside(*usable, clamp), spec)

    return traced_once(union)


def _inside(low: Any, high: Any, clamp: Clamp | Bounds | None) -> tuple[Any, Any]:
    """The range where it lies inside the bounds, whatever made it wider than the values."""
    if not isinstance(clamp, Bounds):
        return low, high
    return ops.maximum(low, clamp.low), ops.minimum(high, clamp.high)


def _symmetric(low: Any, high: Any, spec: QuantSpec) -> tuple[Any, Any]:
    return arithmetic.symmetrize(low, high, spec) if spec.symmetric else (low, high)


@functools.cache
def _moved_range(
    method: MinMax | LastValue | MovingAverage, sites: int, site: int, given: tuple[str, ...]
) -> Callable[..., tuple[Any, Any, Any, Any]]:
    """What moves the range of a call site by a batch.

    Args:
        method: how.
        sites: number of call sites.
        site: the one that shows the batch.
        given: what the result takes, in that order: `least` and `most` of the batch; `anchor`,
            `low`, `high`, `count` and `extremes` of the layer; `thaws`, a truth value, where a
            callback may freeze the range; `width`, where it has a least one.

    Returns:
        A function of these tensors that gives low, high, count and extremes of all sites; `None`
        for extremes that a method leaves alone.
    """

    def moved(*tensors: Any) -> tuple[Any, Any, Any, Any]:
        by_name = dict(zip(given, tensors, strict=True))
        low, high, count, old = (by_name[name] for name in ("low", "high", "count", "extremes"))
        batch = ops.stack([-by_name["least"], by_name["most"]])
        # One exploding batch must not poison the range for good.
        here = ops.all(ops.isfinite(batch))
        if "thaws" in by_name:
            here = ops.logical_and(by_name["thaws"], here)
        # Of all sites, then only this one is kept: a slice would be an operation of its own.
        if sites > 1:
            here = ops.logical_and(ops.arange(sites) == site, here)
        extremes = None
        batch = ops.expand_dims(batch, -1)
        if isinstance(method, MinMax | LastValue):
            shown = Anchor.without_noise(by_name["anchor"], batch)
            new_low, new_high = method.update(low, high, count, 0.0 - shown[0], shown[1])
        else:
            extremes, bounds = Anchor.moved(method, by_name["anchor"], old, count, batch)
            extremes = ops.where(here, extremes, old)
            new_low, new_high = ops.unstack(bounds, axis=0)
            new_low = 0.0 - new_low
        if "width" in by_name:
            new_low, new_high = arithmetic.no_narrower(new_low, new_high, by_name["width"])
        low, high = ops.where(here, new_low, low), ops.where(here, new_high, high)
        return low, high, ops.where(here, count + 1.0, count), extremes

    return traced_once(moved)


@keras.saving.register_keras_serializable("kqat")
class ActivationQuantizer(keras.layers.Layer):
    """Rounds the values of one group to its integer grid; the gradient is straight-through.

    Calibration gives it a range (`start`). In training it observes the batch and moves its range,
    unless it is `frozen` or not `trainable`: how is written at `kqat.grids.Anchor`; a `MinMax`
    range grows with whatever a batch shows. A learned range starts there (or with its first batch),
    and is moved by the loss: `moved` is what training adds to its numbers. Each call site (`site`)
    has a range of its own, of which the group's range is the union:

        low == min(site_low), high == max(site_high), low <= 0 <= high

    or, on a symmetric grid, the least symmetric range around it.
    Before any batch was seen, inference lets values pass unrounded.

    Args:
        spec: the grid, one scale per tensor.
        range_method: how the range is found; `Fixed` is never observed.
        clamp: `"relu"`, `"relu6"` or `None`: carried out by the rounding where the range starts
            at 0, which clips what lies below. `Bounds`, or a list of its two numbers: carried out
            by the rounding, as the range never goes beyond them.
        sites: number of call sites.
        hides: whether the values are attention scores of which a mask hides some: the range is that
            of the others, with room below.
        label: what reports and the file call the value that is rounded, where there is one call
            site; the layer's own name if it is left out.
        gradient: what stands for the derivative of rounding; `None` is the clipped straight-through
            estimator, by TensorFlow's fused kernel.
        frozen: whether the range stays as it is in training.
    """

    def __init__(
        self,
        spec: QuantSpec,
        range_method: RangeMethod,
        *,
        clamp: Clamp | Bounds | str | list[float | None] | None = None,
        sites: int = 1,
        hides: bool = False,
        label: str | None = None,
        gradient: GradientEstimator | None = None,
        frozen: bool = False,
        **kwargs: Any,
    ):
        # Ranges are float32 under every policy. Only where the layer's own policy is float32 too
        # does Keras leave its variables alone.
        super().__init__(autocast=False, **{"dtype": "float32", **kwargs})
        self.spec = spec
        self.range_method = range_method
        self.clamp = clamp_from_json(clamp)
        self.sites = sites
        self.hides = hides
        self.label = label or self.name
        self._last_range = _LastRange()
        self.gradient = gradient
        self.frozen = frozen
        self.controls = Controls()
        self.seeds = None
        if gradient is not None and gradient.ADDS_NOISE:
            self.seeds = keras.random.SeedGenerator()
        self._sources = _Sources()

    def build(self, input_shape: Any) -> None:
        """Creates the ranges, all zero: nothing seen."""
        if isinstance(self.range_method, Fixed):
            return

        zeros = np.zeros(self.sites, np.float32)
        names = ("low", "high", "count")
        self.site_low, self.site_high, self.count = (self._state(name, zeros) for name in names)
        self.extremes = self._state("extremes", np.zeros((2, self.sites)))
        self.anchor = self._state("anchor", self._no_anchor())
        if isinstance(self.range_method, LearnedRangeMethod):
            self.features = math.prod(n for n in input_shape[1:] if n)
            terms = (self.range_method.terms(self._form),)
            self.moved = self.add_weight(name="moved", shape=terms, initializer="zeros")
            # What was moved when the range was frozen: an optimizer with momentum moves on.
            self.kept = self._state("kept", np.full(terms, _NOT_KEPT))

    @property
    def _form(self) -> RangeForm:
        return RangeForm.of(self.spec, isinstance(self.clamp, Clamp))

    @property
    def is_frozen(self) -> bool:
        """Whether the range stays as it is in training."""
        return self.frozen or not self.trainable

    def freeze(self) -> None:
        """Keeps the range as it is from now on; one that was frozen in a backup, as it was."""
        if isinstance(self.range_method, LearnedRangeMethod) and not self.frozen:
            self.kept.assign(self._kept())
        self.frozen = True

    def _state(self, name: str, initial: np.ndarray) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=initial.shape,
            initializer=lambda shape, dtype=None: np.asarray(initial, dtype),
            dtype="float32",
            trainable=False,
            aggregation="mean",
        )

    def _no_anchor(self) -> np.ndarray:
        unset = np.asarray(Anchor.UNSET, np.float32)
        return np.broadcast_to(unset[:, None, None], (Anchor.ROWS, 2, self.sites))

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """As Keras's; files of before calibration left an anchor hold the first three alone."""
        if len(store) != 3:
            super().load_own_variables(store)
            if not isinstance(self.range_method, Fixed):
                self.anchor.assign(Anchor.of_older(array_of(self.anchor)))
            return
        for index, variable in enumerate((self.site_low, self.site_high, self.count)):
            variable.assign(store[str(index)])
        self.extremes.assign(np.stack([-np.asarray(store["0"]), np.asarray(store["1"])]))
        self.anchor.assign(self._no_anchor())

    def call(
        self,
        x: Any,
        site: int = 0,
        observe: bool = True,
        training: bool | None = None,
        resolution: Mapping[str, Resolution] | None = None,
        halves_away: bool = False,
    ) -> Any:
        """`x` rounded; any shape. `site` and `observe` say which range `x` shapes, and whether.

        `resolution` says what the integer kernel that makes `x` resolves, where `x` may be all but
        zero beside the kernel's inputs: name of the `ActivationQuantizer` of an input -> share of
        its scale, or a share and a power of that scale. A finer grid would hold only the float
        errors of a sum, and no range is so narrow that its scale falls below. With `halves_away`
        halves of a step are rounded away from the integer zero, as the kernel that makes `x` does.
        """
        dtype = x.dtype
        x = ops.cast(x, "float32")
        self.controls.are_read |= bool(training)
        if halves_away:
            x = self._tipped(x, *self._range_now())
        if isinstance(self.range_method, Fixed):
            rounded = self.rounded_on(x, *self.fixed_range(), training=bool(training))
            return ops.cast(rounded, dtype)
        if training and observe and not self.is_frozen:
            low, high = self._observed(x, site)
            return ops.cast(self._round(x, self._grid(low, high), True), dtype)
        low, high, count = self.site_low.value, self.site_high.value, self.count.value
        # Not ops.where: it would compute both, and send gradients through both.
        rounded = ops.cond(
            _largest(count) > 0.0,
            lambda: self._round(x, self._grid(low, high), bool(training)),
            lambda: self.clamped(x),
        )
        return ops.cast(rounded, dtype)

    def clamped(self, x: Any) -> Any:
        """`x` after the clamp alone."""
        if isinstance(self.clamp, Bounds):
            return ops.clip(x, self.clamp.low, self.clamp.high)
        if self.clamp is Clamp.RELU:
            return ops.relu(x)
        return ops.relu6(x) if self.clamp is Clamp.RELU6 else x

    def observe(self, x: Any, site: int = 0) -> None:
        """Lets `x` (any shape) move the range of `site`, as a training batch does."""
        if not isinstance(self.range_method, Fixed):
            self._observed(ops.cast(x, "float32"), site)

    def start(self, found: Mapping[int, SiteRange]) -> None:
        """Takes over what calibration found, by call site, in place of all that was observed."""
        if isinstance(self.range_method, Fixed):
            return
        low, high, count = (np.zeros(self.sites, np.float32) for _ in range(3))
        extremes, anchor = np.zeros((2, self.sites), np.float32), np.array(self._no_anchor())
        for site, one in found.items():
            calibrated, seen = (-one.low, one.high), (-one.seen_low, one.seen_high)
            low[site], high[site] = one.low, one.high
            count[site] = max(float(one.batches), _LEAST_WEIGHT)
            extremes[:, site] = seen
            anchor[:, :, site] = Anchor.rows(calibrated, seen, one.noise)
        values = low, high, count, extremes, anchor
        for variable, value in zip(self._ranges(), values, strict=True):
            variable.assign(value)
        if isinstance(self.range_method, LearnedRangeMethod):
            self.moved.assign(ops.zeros_like(self.moved))
            self.kept.assign(np.full(self.kept.shape, _NOT_KEPT, np.float32))

    def reset(self) -> None:
        """Forgets what was observed."""
        self.start({})

    def _ranges(self) -> tuple[keras.Variable, ...]:
        return self.site_low, self.site_high, self.count, self.extremes, self.anchor

    def fixed_range(self) -> tuple[Any, Any]:
        """The range that a `Fixed` method gives, or the least symmetric one around it."""
        assert isinstance(self.range_method, Fixed)
        return _symmetric(self.range_method.low, self.range_method.high, self.spec)

    def range(self) -> tuple[float, float]:
        """The group's range `(low, high)` as the file will carry it.

        Raises:
            FreezeError: if no batch was ever seen.
        """
        if isinstance(self.range_method, Fixed):
            low, high = self.fixed_range()
            return float(low), float(high)
        site_low, site_high, count = (array_of(v) for v in self._ranges()[:3])
        if np.max(count) == 0.0:
            raise FreezeError(
                f"Expected ranges from data. Received: quantizer '{self.name}', which has seen "
                "none. Give calibration_data to kqat.quantize_model, or train."
            )
        # Asked several times for each value when a model is frozen.
        key = site_low.tobytes() + site_high.tobytes()
        if isinstance(self.range_method, LearnedRangeMethod) or self._last_range.key != key:
            if isinstance(self.range_method, LearnedRangeMethod):
                low, high, _ = self._grid(self.site_low.value, self.site_high.value)
            else:
                low, high = self.union_of(list(site_low), list(site_high))
            self._last_range.key, self._last_range.value = key, (float(low), float(high))
        return self._last_range.value

    def seen(self, site: int) -> tuple[float, float] | None:
        """The least and the greatest value that calibration saw at a call site.

        `None` where the range is given, or nothing was seen.
        """
        if isinstance(self.range_method, Fixed) or float(array_of(self.count)[site]) == 0.0:
            return None
        negated, most = array_of(self.extremes)[:, site]
        return -float(negated), float(most)

    def widths(self) -> tuple[float, float] | None:
        """How wide the range of all call sites is, and how wide calibration found it.

        `None` where the range is given, or was never calibrated.
        """
        if isinstance(self.range_method, Fixed):
            return None
        anchor = array_of(self.anchor)
        known = anchor[Anchor.WIDEST, 0] != np.float32(Anchor.UNSET[Anchor.WIDEST])
        if not known.any():
            return None
        low, high = (array_of(v)[known] for v in (self.site_low, self.site_high))
        calibrated = anchor[0][:, known].max(axis=-1)
        return float(np.max(high) - np.min(low)), float(calibrated.sum())

    def stretched(self) -> float:
        """How many times as wide noise makes the values that move the range in training, or 1.

        Noise, such as that of Dropout, is there in training and not in inference. How much it
        widens the values was measured in calibration. It is 1 where no batch of training came after
        calibration.
        """
        if isinstance(self.range_method, Fixed | LearnedRangeMethod):
            return 1.0
        anchor = array_of(self.anchor)
        now = np.stack([-array_of(self.site_low), array_of(self.site_high)])
        known = anchor[Anchor.WIDEST, 0] != np.float32(Anchor.UNSET[Anchor.WIDEST])
        seen = Anchor.seen(anchor)
        changed = seen - array_of(self.extremes), anchor[0] - now
        trained = np.abs(changed).max(axis=(0, 1)) > 1e-4 * now.sum(axis=0)
        usable = known & trained & (seen.sum(axis=0) > 0.0)
        more = -anchor[Anchor.ADDED].sum(axis=0)[usable] / seen.sum(axis=0)[usable]
        return float(1.0 + more.max(initial=0.0))

    def is_calibrated(self) -> bool:
        """Whether the range is known."""
        return isinstance(self.range_method, Fixed) or bool(np.max(array_of(self.count)) > 0.0)

    def scale(self) -> Any:
        """The scale of the grid now, a float32 scalar; zero where the range is not known yet."""
        levels = float(self.spec.qmax - self.spec.qmin)
        if isinstance(self.range_method, Fixed):
            low, high = self.fixed_range()
            return ops.stop_gradient(ops.convert_to_tensor((high - low) / levels, "float32"))
        low, high, _ = self._grid(self.site_low.value, self.site_high.value)
        known = _largest(self.count.value) > 0.0
        return ops.stop_gradient(ops.where(known, (high - low) / levels, 0.0))

    def scale_now(self) -> np.float32:
        """`scale()` as a number, by `range()`: without a dozen operators each time."""
        if not self.is_calibrated():
            return np.float32(0.0)
        levels = float(self.spec.qmax - self.spec.qmin)
        if isinstance(self.range_method, Fixed):
            low, high = self.fixed_range()
            return np.float32((high - low) / levels)
        ends = np.asarray(self.range(), np.float32)
        return np.float32((ends[1] - ends[0]) / np.float32(levels))

    def bounds(self) -> tuple[Any, Any]:
        """Low and high of the grid now, two float32 scalars; see `known`."""
        if isinstance(self.range_method, Fixed):
            low, high = (ops.convert_to_tensor(x, "float32") for x in self.fixed_range())
        else:
            low, high, _ = self._grid(self.site_low.value, self.site_high.value)
        return ops.stop_gradient(low), ops.stop_gradient(high)

    def known(self) -> Any:
        """1 where the range is known, 0 where no batch was seen yet, a float32 scalar."""
        if isinstance(self.range_method, Fixed):
            return ops.ones((), "float32")
        return ops.cast(_largest(self.count.value) > 0.0, "float32")

    def least_width(
        self, site: int, scale_of: Callable[["ActivationQuantizer"], float] | None = None
    ) -> Any:
        """The least width of the range of a call site, a float32 scalar; `None` without one.

        `scale_of` gives the scale of the quantizer of an input, a number, where that is not the one
        of now; the width then is a number too.
        """
        sources = self._sources.get(site)
        if not sources or isinstance(self.range_method, Fixed):
            return None
        levels = float(self.spec.qmax - self.spec.qmin)
        if scale_of is not None:
            finest = [_power(scale_of(source), power) * share for source, share, power in sources]
            # As tensors would have it: a product of Python's where there is nothing to compare.
            one = finest[0] if len(finest) == 1 else max(map(np.float32, finest))
            return np.float32(one * levels)
        finest = [_power(source.scale(), power) * share for source, share, power in sources]
        return functools.reduce(ops.maximum, finest) * levels

    def union_of(self, lows: Sequence[float], highs: Sequence[float]) -> tuple[Any, Any]:
        """As `union`, of numbers: the same float32, without a dozen operators each time."""
        low, high = np.float32(min(lows)), np.float32(max(highs))
        if isinstance(self.clamp, Clamp):
            low = max(low, np.float32(self.clamp.low))
        if self.spec.symmetric or not (math.isfinite(low) and math.isfinite(high)):
            usable = arithmetic.widen(*map(ops.convert_to_tensor, (low, high)))
            return _symmetric(*_inside(*usable, self.clamp), self.spec)
        low = max(min(low, np.float32(0.0)), np.float32(-arithmetic.LARGEST_BOUND))
        high = min(max(high, np.float32(0.0)), np.float32(arithmetic.LARGEST_BOUND))
        if high - low < arithmetic.SMALLEST_RANGE:
            high = np.float32(arithmetic.UNSEEN_WIDTH)
        if isinstance(self.clamp, Bounds):
            low = max(low, np.float32(self.clamp.low))
            high = min(high, np.float32(self.clamp.high))
        return low, high

    def union(self, site_low: Any, site_high: Any) -> tuple[Any, Any]:
        """The range that holds those of all sites, as the grid allows it."""
        low, high = _union(self.spec, self.clamp)(site_low, site_high)
        return low, high

    def _grid(self, site_low: Any, site_high: Any) -> tuple[Any, Any, Any]:
        """Low and high of the group's range, and the step where the loss moves it."""
        low, high = self.union(site_low, site_high)
        method = self.range_method
        if not isinstance(method, LearnedRangeMethod):
            return low, high, None
        numbers = ops.stop_gradient(method.numbers(low, high, self.spec, self._form))
        numbers = numbers + self._moved()
        low, high, step = method.bounds(numbers, self.spec, self._form, self.features)
        # A range that moved out of what a grid can be still has its gradients.
        usable = arithmetic.widen(low, high)
        low, high = map(arithmetic.straight_through, usable, (low, high))
        return low, high, step if method.MOVES_STEP else None

    def _moved(self) -> Any:
        """What training adds to the numbers of a learned range."""
        moved, frozen = self.moved.value, self.controls.frozen
        if self.frozen:
            # Keras warns of a trainable variable without a gradient, not of a gradient of zero.
            return self._kept() + moved * 0.0
        if frozen is None:
            return moved
        return moved * (1.0 - frozen.value) + self._kept() * frozen.value

    def _kept(self) -> Any:
        """What was moved when the range was frozen."""
        kept, moved = self.kept.value, ops.stop_gradient(self.moved.value)
        return ops.where(kept < _KEPT_BELOW, kept, moved)

    def rounded(
        self, x: Any, lows: Sequence[float], highs: Sequence[float], *, halves_away: bool = False
    ) -> Any:
        """`x` as it would be rounded had its call sites these ranges."""
        grid = *(ops.convert_to_tensor(v, "float32") for v in self.union_of(lows, highs)), None
        dtype, x = x.dtype, ops.cast(x, "float32")
        if halves_away:
            x = self._tipped(x, *grid[:2])
        return ops.cast(self._round(x, grid, False), dtype)

    def rounded_on(
        self, x: Any, low: Any, high: Any, *, training: bool = False, halves_away: bool = False
    ) -> Any:
        """`x` (float32) rounded on the range `[low, high]`, as in training or in inference."""
        x = self._tipped(x, low, high) if halves_away else x
        return self._round(x, (low, high, None), training)

    def _range_now(self) -> tuple[Any, Any]:
        if isinstance(self.range_method, Fixed):
            low, high = (ops.convert_to_tensor(v, "float32") for v in self.fixed_range())
            return low, high
        return self._grid(self.site_low.value, self.site_high.value)[:2]

    def _tipped(self, x: Any, low: Any, high: Any) -> Any:
        """`x` (float32) off its halves of a step, so that these are rounded away from zero."""
        scale = (high - low) / float(self.spec.qmax - self.spec.qmin)
        usable = ops.where(scale > 0.0, scale, 1.0)
        integers = x / usable + (float(self.spec.qmin) - ops.round(low / usable))
        return x + ops.stop_gradient(ops.sign(integers) * (scale * _TIP))

    def _round(self, x: Any, grid: tuple[Any, Any, Any], training: bool) -> Any:
        # A range on both sides of zero clamps nothing at zero, nor does an estimator know of the
        # gradient of a clamp.
        given = isinstance(self.range_method, Fixed)
        if self.spec.symmetric or given or self.gradient is not None:
            x = self.clamped(x)
        return self._on_grid(x, grid, training)

    def _on_grid(self, x: Any, grid: tuple[Any, Any, Any], training: bool) -> Any:
        """`x` rounded on a grid `(low, high, step)`; the step where the loss moves it."""
        low, high, step = grid
        if not training or self.controls.rounds is None:
            return self._rounded_by(x, low, high, step, training)
        rounds = self.controls.rounds.value > 0.5
        return ops.cond(
            rounds,
            lambda: self._rounded_by(x, low, high, step, training),
            lambda: self.clamped(x),
        )

    def _rounded_by(self, x: Any, low: Any, high: Any, step: Any, training: bool) -> Any:
        spec, gradient = self.spec, self.gradient
        levels = float(spec.qmax - spec.qmin)
        if training and self.seeds is not None:
            noise = keras.random.uniform(ops.shape(x), -0.5, 0.5, seed=self.seeds)
            width = (high - low) * (1.0 / levels)
            return ops.minimum(ops.maximum(x, low), high) + noise * width
        moves = step is not None and training
        if gradient is None and moves:
            return arithmetic.fake_quantize_moving(x, low, high, step, spec)
        if gradient is None:
            return arithmetic.fake_quantize(x, low, high, spec)
        # The estimator says what reaches the values; range and step have theirs without them.
        still = ops.stop_gradient(x)
        rounded = (
            arithmetic.fake_quantize_moving(still, low, high, step, spec)
            if moves
            else arithmetic.fake_quantize(still, low, high, spec)
        )
        return rounded + estimated(gradient, x, ops.stop_gradient(rounded), low, high)

    def _observed(self, x: Any, site: int) -> tuple[Any, Any]:
        """Updates the site's range by `x`; returns all sites' ranges."""
        low, high, count = self.site_low.value, self.site_high.value, self.count.value
        hides, spec, method = self.hides, self.spec, self.range_method
        if isinstance(method, LearnedRangeMethod):
            return self._first(x, site)
        least, most = (
            arithmetic.shown_bounds(x, spec) if hides else arithmetic.bounds(x, self.clamp)
        )
        assert not isinstance(method, Fixed), "a fixed range is never observed"
        given = {"least": least, "most": most, "anchor": self.anchor.value}
        given |= {"low": low, "high": high, "count": count, "extremes": self.extremes.value}
        if (thaws := self.controls.thaws()) is not None:
            given["thaws"] = thaws
        if (width := self.least_width(site)) is not None:
            given["width"] = width
        follows = method if isinstance(method, MinMax | LastValue | MovingAverage) else FOLLOWING
        moved = _moved_range(follows, self.sites, site, tuple(given))
        low, high, count, extremes = moved(*given.values())
        if extremes is not None:
            self.extremes.assign(extremes)
        self.site_low.assign(low)
        self.site_high.assign(high)
        self.count.assign(count)
        return low, high

    def _first(self, x: Any, site: int) -> tuple[Any, Any]:
        """The range at which a learned one starts: that of the first batch, if nothing was seen."""
        method = self.range_method
        assert isinstance(method, LearnedRangeMethod)
        low, high, count = self.site_low.value, self.site_high.value, self.count.value
        # A range that moves is not the one that was frozen before.
        none, frozen = ops.full(self.kept.shape, _NOT_KEPT, "float32"), self.controls.frozen
        self.kept.assign(
            none if frozen is None else ops.where(frozen.value > 0.5, self.kept.value, none)
        )
        new = ops.logical_and(ops.arange(self.sites) == site, count == 0.0)
        least, most = ops.cond(
            ops.any(new),
            lambda: arithmetic.bounds(x, self.clamp),
            lambda: (ops.zeros((), "float32"), ops.zeros((), "float32")),
        )
        new = ops.logical_and(new, ops.isfinite(most - least))
        low, high = ops.where(new, least, low), ops.where(new, most, high)
        self.site_low.assign(low)
        self.site_high.assign(high)
        self.count.assign(ops.where(new, 1.0, count))
        union = self.union(low, high)
        start = ops.stop_gradient(method.numbers(*union, self.spec, self._form))
        penalty = method.penalty(start + self._moved())
        if penalty is not None:
            self.add_loss(penalty)
        return low, high

    def compute_output_shape(self, input_shape: Any, **kwargs: Any) -> Any:
        """The input's shape."""
        return input_shape

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """None: who reads a mask in a QAT model reads it as a tensor of the graph."""

    def compute_output_spec(
        self,
        x: Any,
        site: int = 0,
        observe: bool = True,
        training: bool | None = None,
        resolution: Mapping[str, Resolution] | None = None,
        halves_away: bool = False,
    ) -> Any:
        """The input's shape and dtype."""
        if observe and resolution:
            found = [(layer_behind(x, name), share) for name, share in resolution.items()]
            # Rows of a tied weight have no quantizer; those of the other inputs say enough.
            self._sources.by_site[site] = [
                (source, *(share if isinstance(share, list | tuple) else (share, 1)))
                for source, share in found
                if isinstance(source, ActivationQuantizer)
            ]
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        """Plain JSON types only, so that loading needs no custom objects."""
        config = super().get_config()
        config.pop("autocast", None)
        return {
            **config,
            "spec": self.spec.to_dict(),
            "range_method": range_method_to_dict(self.range_method),
            "clamp": clamp_to_json(self.clamp),
            "sites": self.sites,
            "hides": self.hides,
            "label": self.label,
            "gradient": gradient_to_dict(self.gradient),
            "frozen": self.frozen,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ActivationQuantizer":
        """The inverse of `get_config`."""
        config = with_label(config, suffix="_quantizer")
        spec = QuantSpec(**config.pop("spec"))
        method = range_method_from_dict(config.pop("range_method"))
        gradient = gradient_from_dict(config.pop("gradient", None))
        return cls(spec, method, gradient=gradient, **config)
