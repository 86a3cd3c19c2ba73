"""Why a value or a weight loses much when it is rounded, read off its exact values."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from kqat.analysis.replay import as_array, decibels, noise
from kqat.base import TextEnum
from kqat.graph import Graph, Node, Ref
from kqat.grids import LOWEST, least_bias_step
from kqat.training import INPUT_AXES, ActivationQuantizer, QuantizeWrapper, ValueNames

# A value whose own rounding leaves less than this has lost something, in dB.
GOOD_DB = 30.0
# Clipping is told where it costs more than so many times what rounding costs.
CLIPPING_OVER_ROUNDING = 10.0
CUT_STEPS = 1.5
# Bits that a channel, or a member of a group with one scale, may lose.
LOST_BITS = 3.0
# Outliers are few: no more than this share of the channels.
OUTLIER_SHARE = 0.25
# A grid is starved where the middle 99 % of the values lie on fewer integers than this.
FEW_INTEGERS = 16
MIDDLE = (0.005, 0.995)
FEW_BITS = 4
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


class Cause(TextEnum):
    """Why something loses much."""

    CLIPPING = "clipping"
    OUTLIER_CHANNEL = "outlier channel"
    SHARED_SCALE = "shared scale"
    STARVED_GRID = "starved grid"
    BIAS_OVERFLOW = "bias overflow"
    FEW_BITS = "few bits"
    UNLIKE_ROWS = "unlike rows"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One cause of a loss.

    Attributes:
        cause: which one.
        layer: the name of the value or layer.
        text: what was found, in numbers.
        own_db: SQNR of the value against its own rounding; of its middle channel, or of the middle
            99 % of its values, if that is less.
        of_weights: whether it is about the layer's weights, not about its values.
        advice: the code of the remedy that was tried against it and gained most; empty where none
            helped, or none was tried.
    """

    cause: Cause
    layer: str
    text: str
    own_db: float
    of_weights: bool = False
    advice: str = ""


def causes_of_values(node: Node, x: Any, names: ValueNames) -> Iterator[Finding]:
    """What makes the rounding of a value lose much.

    Args:
        node: a call of an `ActivationQuantizer` that is calibrated.
        x: its input, exact.
        names: of the model's values.
    """
    quantizer: ActivationQuantizer = node.layer
    exact = as_array(quantizer.clamped(x))
    low, high = quantizer.range()
    if quantizer.hides:
        exact = np.where(exact == np.float32(LOWEST), np.float32(low), exact)
    own_db = decibels(_own_noise(exact, as_array(quantizer(exact, observe=False))))
    site = node.kwargs.get("site", 0)
    name, spec = names.of(quantizer, site), quantizer.spec
    step = (high - low) / (spec.qmax - spec.qmin)
    if not exact.any() or own_db > GOOD_DB or (quantizer, site) in names.means_taken_off:
        return
    beyond = np.maximum(low - exact, exact - high)
    lost = float(np.sum(np.square(beyond[beyond > 0.0], dtype=np.float64)))
    if beyond.max() > CUT_STEPS * step and (
        lost > CLIPPING_OVER_ROUNDING * exact.size * step**2 / 12.0
    ):
        share = 100.0 * float(np.mean(beyond > 0.5 * step))
        text = (
            f"{share:.2g} % of its values lie outside [{low:.4g}, {high:.4g}], as far as "
            f"[{exact.min():.4g}, {exact.max():.4g}]"
        )
        yield Finding(Cause.CLIPPING, name, text, own_db)
    shared = _shared(quantizer, exact, high - low, names)
    if shared is not None:
        yield Finding(Cause.SHARED_SCALE, name, shared, own_db)
        return
    outlier = _outlier(exact)
    if outlier is not None:
        yield Finding(Cause.OUTLIER_CHANNEL, name, outlier, own_db)
        return
    ends = np.quantile(exact[exact != 0.0], MIDDLE)
    used = int(np.ceil((max(ends[1], 0.0) - min(ends[0], 0.0)) / step))
    if used < FEW_INTEGERS:
        text = f"99 % of its values lie on {max(used, 1)} of {2**spec.bits} integers"
        yield Finding(Cause.STARVED_GRID, name, text, own_db)


def _own_noise(exact: np.ndarray, rounded: np.ndarray) -> float:
    """Of all values; of the middle one of the channels; or of the middle 99 %: where it is most.

    One large channel, or a few large values, hide from the first what the others lose.
    """
    error = np.square(np.float64(exact) - rounded)
    power = np.square(np.float64(exact))
    shown = exact[exact != 0.0]
    low, high = np.quantile(shown, MIDDLE) if shown.size else (0.0, 0.0)
    middle = (exact >= low) & (exact <= high)
    found = [noise(exact, rounded)]
    if power[middle].any():
        found.append(float(error[middle].mean() / power[middle].mean()))
    if exact.ndim > 1:
        signal, lost = (x.reshape(-1, exact.shape[-1]).mean(axis=0) for x in (power, error))
        if (signal > 0.0).any():
            found.append(float(np.median(lost[signal > 0.0] / signal[signal > 0.0])))
    return max(found)


def _shared(
    quantizer: ActivationQuantizer, exact: np.ndarray, whole: float, names: ValueNames
) -> str | None:
    if quantizer.sites < 2:
        return None
    bits = quantizer.spec.bits
    span = max(float(exact.max()), 0.0) - min(float(exact.min()), 0.0)
    if span <= 0.0 or np.log2(whole / span) < LOST_BITS:
        return None
    return (
        f"it spans {span:.4g} and has the scale of '{names.meeting_of(quantizer)}', which spans "
        f"{whole:.4g}: {min(np.log2(whole / span), bits):.1f} of {bits} bits are lost"
    )


def _outlier(exact: np.ndarray) -> str | None:
    """What to say of channels, along the last axis, that are far larger than the others."""
    if exact.ndim < 2 or exact.shape[-1] < 4:
        return None
    sizes = np.abs(exact).reshape(-1, exact.shape[-1]).max(axis=0)
    middle = float(np.median(sizes[sizes > 0.0]))
    outliers = np.flatnonzero(sizes > middle * 2.0**LOST_BITS)
    if not outliers.size or outliers.size > OUTLIER_SHARE * sizes.size:
        return None
    named = ", ".join(map(str, outliers[:4])) + (", …" if outliers.size > 4 else "")
    words = ("channels", "reach") if outliers.size > 1 else ("channel", "reaches")
    return (
        f"{words[0]} {named} of {sizes.size} {words[1]} {sizes.max():.4g}, half of the others stay "
        f"below {middle:.4g} and lose {np.log2(sizes.max() / middle):.1f} bits to that"
    )


def causes_of_weights(node: Node, input_scale: float, alone_db: float) -> Iterator[Finding]:
    """What makes the rounding of a layer's weights and bias lose much.

    Args:
        node: a call of a `QuantizeWrapper`.
        input_scale: of the grid of its input; 0 where that is not known.
        alone_db: SQNR of the model's outputs where only this layer's weights are rounded.
    """
    wrapper: QuantizeWrapper = node.layer
    branch = node.kwargs.get("branch", 0)
    name = str(wrapper.layer.name)
    for weight, spec in wrapper.weight_specs.items():
        value = as_array(getattr(wrapper.layer, weight).value)
        own_db = decibels(noise(value, wrapper.rounded(weight, branch)))
        scale = np.asarray(wrapper.scale(weight, branch), np.float64)
        yield from _bias_overflow(wrapper, weight, scale, branch, input_scale, own_db)
        if own_db > GOOD_DB:
            rows = _unlike_rows(wrapper, weight, value) if alone_db < GOOD_DB else None
            if rows is not None:
                yield Finding(Cause.UNLIKE_ROWS, name, rows, own_db, of_weights=True)
            continue
        if spec.bits <= FEW_BITS:
            text = f"its {weight} has {spec.bits} bits"
            yield Finding(Cause.FEW_BITS, name, text, own_db, of_weights=True)
        elif spec.axis is None and (outlier := _outlier(value)) is not None:
            text = f"{weight}: {outlier}"
            yield Finding(Cause.OUTLIER_CHANNEL, name, text, own_db, of_weights=True)


def _unlike_rows(wrapper: QuantizeWrapper, weight: str, value: np.ndarray) -> str | None:
    """What to say of input channels whose weights are far smaller than those beside them."""
    axis = INPUT_AXES.get(type(wrapper.layer))
    if weight != "kernel" or axis is None or isinstance(wrapper.layer, _DEPTHWISE):
        return None
    sizes = np.abs(np.moveaxis(value, axis, 0)).reshape(value.shape[axis], -1).max(axis=1)
    largest = float(sizes.max())
    small = np.flatnonzero((sizes > 0.0) & (sizes * 2.0**LOST_BITS < largest))
    if not small.size:
        return None
    return (
        f"the {weight} of {small.size} of {sizes.size} input channels stays below "
        f"{sizes[small].max():.3g}, that of others reaches {largest:.3g}, with one step for both: "
        f"{np.log2(largest / np.median(sizes[small])):.1f} bits are lost, and large inputs "
        "multiply that error"
    )


def _bias_overflow(
    wrapper: QuantizeWrapper,
    weight: str,
    scale: np.ndarray,
    branch: int,
    input_scale: float,
    own_db: float,
) -> Iterator[Finding]:
    if input_scale <= 0.0 or weight != "kernel":
        return
    bias = wrapper.bias_on_grid(branch)
    if bias is None:
        return
    if wrapper.normalization is not None and not wrapper.folds_before(weight):
        scale = scale * np.abs(np.asarray(wrapper.fold_factor(weight, branch), np.float64))
    step = input_scale * (scale.reshape(-1) if scale.size == bias.size else scale.max())
    coarser = np.flatnonzero(least_bias_step(bias, 8) > step)
    if coarser.size:
        worst = float(np.max(np.abs(bias) / np.maximum(step, np.finfo(np.float64).tiny)))
        text = (
            f"the bias of {coarser.size} of {bias.size} channels is up to {worst:.3g} of its steps "
            "(input scale times weight scale), which int32 does not hold: their weights are "
            "rounded coarser, as those of a dead channel are, which can be pruned"
        )
        yield Finding(Cause.BIAS_OVERFLOW, wrapper.layer.name, text, own_db)


def input_scales(graph: Graph) -> Mapping[Ref, float]:
    """The scale of each value that a calibrated quantizer has just rounded."""
    return {
        node.outputs[0]: float(node.layer.scale())
        for node in graph.nodes
        if isinstance(node.layer, ActivationQuantizer)
    }
