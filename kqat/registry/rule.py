"""`LayerRule`, a row of the registry, and the checks that refuse single layers of a class."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kqat.base import TextEnum
from kqat.devices import INT16_FIXED
from kqat.grids import Bounds, Clamp, QuantSpec

# Products of four values were at most one step off, products of six up to three steps (measured on
# LiteRT by `benchmarks/op_probe.py`).
MOST_FACTORS = 4
# Of a step of an addend. What its own rounding leaves has 20 times the power of a rounding to that.
_SHARE_OF_A_STEP = 1.0 / 16.0
Resolution = float | tuple[float, int]
Shape = tuple[int, ...]


class Output(TextEnum):
    """Where the scale of a layer's output comes from."""

    OWN = "own range"
    SAME = "same scale as input"
    FIXED = "fixed range"
    INSIDE = "rounded inside"
    INDEX = "index or truth value"
    VANISHES = "training only"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRule:
    """One row of the table.

    Args:
        output: where the scale of the output comes from.
        ops: the TFLite operators that the layer may become.
        weights: name of each quantizable variable -> its channel axes (`None`: one scale only).
        fixed_range: `(low, high)` that the int8 kernel demands, for `Output.FIXED`.
        rounds: whether a same-scale layer computes new values, which are rounded again.
        clamp: the clamp that the layer computes. It may become the fused activation of the layer
            before.
        bounds: the least and the greatest value that pass, of a function that clips and does
            nothing else: the ends of a grid may carry it out.
        takes_clamp: whether a clamp after this layer can be its kernel's fused activation.
        takes_normalization: whether a following BatchNormalization folds into this layer.
        input_axis: the axis of its one weight that belongs to the channels of its input, of a layer
            that is linear in both: a factor of each channel may as well be one of the weights.
        table: whether the layer is an elementwise function that may ship as a lookup table of 256
            entries; `ops` then names its own operator, if there is one.
        wide_table: whether the layer ships as a lookup table if activations have 16 bits, because
            its operator has no int16 kernel.
        largest_input_scale: above this input scale the operator's int8 kernel gives wrong results,
            and a lookup table ships instead.
        table_of_rows: whether the layer outputs rows of its one weight (an embedding). The weight
            then ships on the output's grid, because GATHER cannot requantize; 8-bit weights need
            no quantizer of their own.
        operand: whether the weight is the operand of an elementwise kernel. No such kernel reads
            less than 8 bits and there are few of these numbers, so a policy for all weights
            (`"*"`) gives them no fewer.
        hides: whether the layer adds a mask's bias to attention scores, see
            `kqat.rewrites.layers.attention_masks`.
        masks: whether the layer's decomposition uses the masks of its call.
        affine: whether the layer is `x * scale + offset`, with one pair per channel.
        resolution: for a layer whose output may be all but zero beside its inputs, as values cancel
            in a sum: the finest useful scale of its output in scales of an input (or a share, and
            to what power the scale is taken), from the layer and how many values of that input make
            how many of the output; `None` where values do not cancel.
        decompose: layer and name -> a callable of the same inputs, made of simpler layers, or
            `None` if the layer is simple already.
        decompose_masked: the same for a call that is given a mask.
        decompose_fused: the same for a config with `recurrence="fused"`; `None` if the layer has
            no fused form.
        grid: the grid of the output, if the kernel demands another than the config's.
        hands_on: layer, and the shapes of its input and its output without the batch -> whether it
            returns the numbers that it is given, as a pooling of one value does: it is an
            `Identity` then, or a `Reshape`. One layer may be called with several shapes.
        opens: whether the layer is replaced by the layers and operations that its `call` uses.
        refuse: layer -> why a layer with these options cannot ship and what to do instead, or
            `None` if it can.
    """

    output: Output
    ops: tuple[str, ...] = ()
    weights: Mapping[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)
    fixed_range: tuple[float, float] | None = None
    rounds: bool = False
    clamp: Clamp | None = None
    bounds: Bounds | None = None
    takes_clamp: bool = False
    takes_normalization: bool = False
    input_axis: int | None = None
    table: bool = False
    wide_table: bool = False
    largest_input_scale: float = math.inf
    table_of_rows: bool = False
    operand: bool = False
    hides: bool = False
    masks: bool = False
    affine: bool = False
    resolution: Callable[[Any, int, int], Resolution] | None = None
    decompose: Callable[[Any, str], Callable[..., Any] | None] | None = None
    decompose_masked: Callable[[Any, str], Callable[..., Any] | None] | None = None
    decompose_fused: Callable[[Any, str], Callable[..., Any] | None] | None = None
    grid: QuantSpec | None = None
    hands_on: Callable[[Any, Shape, Shape], bool] | None = None
    opens: bool = False
    refuse: Callable[[Any], str | None] | None = None

    def is_table(self, bits: int) -> bool:
        """Whether the layer may ship as a lookup table for activations of `bits` bits."""
        return self.table or (self.wide_table and bits > 8)

    def range_at(self, bits: int) -> tuple[float, float] | None:
        """The range that the kernel for activations of `bits` bits demands."""
        return self.fixed_range if bits == 8 or not self.fixed_range else INT16_FIXED.range


def resolution_of_mean(layer: Any, values: int, results: int) -> float:
    """The mean of n integers is a multiple of the n-th part of a step."""
    return results / values


def resolution_of_sum(layer: Any, values: int, results: int) -> float:
    """A part of a step that adds next to nothing to the noise from the rounding of the addends."""
    return _SHARE_OF_A_STEP


def resolution_of_remainder(layer: Any, values: int, results: int) -> float:
    """Room for 16 steps of the values in the 8 bits of a mean of errors."""
    return 1.0 / 8.0


def resolution_of_square(layer: Any, values: int, results: int) -> tuple[float, int]:
    """The square of what a sum resolves; SQUARED_DIFFERENCE computes at no sixteenth of it.

    Its kernel multiplies by `4 * scale**2 / (2**14 * result's scale)`, which must be less than one.
    """
    return _SHARE_OF_A_STEP**2, 2


def resolution_of_hard_swish(layer: Any, values: int, results: int) -> float:
    """Twice the least: HARD_SWISH lifts its input by 7 bits, and multiplies by less than one then.

    Inputs that are far below -3, but for a few, have results that are all but zero.
    """
    return 1.0 / 64.0


def resolution_of_multiple(layer: Any, values: int, results: int) -> float:
    """As of a sum, for a Rescaling, which hands on what its input resolves."""
    return float(np.max(np.abs(layer.scale))) * _SHARE_OF_A_STEP


def channels_last(layer: Any) -> str | None:
    """Refuses `data_format="channels_first"`."""
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return (
            "data_format='channels_first' has no integer form for layers of this type; build it "
            "channels_last between two keras.layers.Permute"
        )
    return None


def one_axis(layer: Any) -> str | None:
    """Refuses a layer that works along several axes, or along the batch."""
    axes = list(layer.axis) if isinstance(layer.axis, list | tuple) else [layer.axis]
    if len(axes) > 1 or 0 in axes:
        return f"axis={layer.axis} is not one axis behind the batch; reshape so that it is one"
    return None


def not_dilated(layer: Any) -> str | None:
    """Refuses dilation."""
    if any(rate != 1 for rate in layer.dilation_rate):
        return f"dilation_rate={layer.dilation_rate} has no TFLite kernel; use 1"
    return None


def nearest_or_bilinear(layer: Any) -> str | None:
    """Refuses other interpolations than these two."""
    if layer.interpolation not in ("nearest", "bilinear"):
        return (
            f"interpolation={layer.interpolation!r} has no TFLite kernel; "
            "use 'nearest' or 'bilinear'"
        )
    return None


def keeps_shape(layer: Any, given: Shape, made: Shape) -> bool:
    """Whether a resize, a crop or a padding leaves the shape as it is."""
    return given == made


def is_of_one_value(pool: Any, given: Shape, made: Shape) -> bool:
    """Whether a pooling is of one value, in steps of one."""
    return {*pool.pool_size, *pool.strides} == {1}


def keeps_count(layer: Any, given: Shape, made: Shape) -> bool:
    """Whether a reduction makes as many values as it is given, each of one."""
    return math.prod(given) == math.prod(made)


def plain_resize(layer: Any) -> str | None:
    """Refuses a resize that also crops, pads or smooths."""
    if layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio or layer.antialias:
        return "only plain resizing has a TFLite kernel; remove aspect ratio and antialias options"
    return nearest_or_bilinear(layer)


def few_factors(layer: Any) -> str | None:
    """Refuses a product of so many values that the kernel's roundings add up."""
    count = math.prod(layer.input.shape[axis] for axis in layer.axes)
    if count > MOST_FACTORS:
        return (
            f"a product of {count} values: TFLite's REDUCE_PROD rounds after each value, and with "
            f"more than {MOST_FACTORS} its result is some steps off; use keras.layers.Multiply"
        )
    return None


def channel_axes(axis: Any) -> tuple[int, ...] | None:
    """The channel axes of a custom layer's weight, from its spec's `axis`."""
    if axis is None or isinstance(axis, tuple):
        return axis
    return (-1,) if axis == "channel" else (axis,)
