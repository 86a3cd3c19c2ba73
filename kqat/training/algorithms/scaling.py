"""Scales channels between layers: one layer divides by a factor, the next ones multiply by it.

The float function stays the same, up to float rounding, but the tensors lose less when they are
quantized. SmoothQuant, AWQ and cross-layer equalization are three ways to choose the factors.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import ModelError
from kqat.graph import Graph, Node, Ref, trace
from kqat.grids import Clamp, Fixed
from kqat.parts import ChannelAffine, Requantize
from kqat.training import calibration
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import all_layers, check_quantized
from kqat.training.finite_numbers import check_finite
from kqat.training.unrounded import call_unrounded
from kqat.training.weight_wrapper import QuantizeWrapper

# Layer class -> the axis of its kernel that belongs to the channels of the input.
INPUT_AXES: dict[type, int] = {
    layers.Dense: 0,
    layers.Conv1D: -2,
    layers.Conv2D: -2,
    layers.DepthwiseConv1D: -2,
    layers.DepthwiseConv2D: -2,
}
# Layers that give `s * f(x)` for `f(s * x)`, for a positive `s` of each channel, the last axis.
_COMMUTING: tuple[type, ...] = (
    *(getattr(layers, f"{kind}{n}D") for n in (1, 2, 3) for kind in (
        "MaxPooling", "AveragePooling", "GlobalMaxPooling", "GlobalAveragePooling",
        "ZeroPadding", "Cropping", "UpSampling", "SpatialDropout",
    )),
    layers.LeakyReLU, layers.PReLU, layers.ReLU, layers.Dropout, layers.GaussianDropout,
    layers.Identity, layers.Resizing, Requantize,
)  # fmt: skip
# Those of them that put zeros beside what was there: a constant that is added comes out as none.
_PADDING = (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D)
# Layers that move values; they commute where channels stay the last axis.
_MOVING = (layers.Reshape, layers.Flatten, layers.Permute, layers.RepeatVector)
# A message names at most so many blockers.
_NAMED = 4
_IS_OUTPUT = "it is an output of the model"
# Factors are clipped to this: larger ones would make outliers in the other tensor.
LARGEST_FACTOR = 2.0**10
# Pairs that are scaled in rounds are done when no factor of a round is further from 1 than this.
SETTLED = 1e-3


# Statistics use at most this many positions of a batch, evenly spread.
ROWS = 4096


class Statistics:
    """Statistics of the values of one tensor, per channel.

    Attributes, after `add`:
        largest: largest magnitude, shape `(channels,)`.
        mean_magnitude: shape `(channels,)`.
        products: mean product of every two channels, shape `(channels, channels)`.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.largest = np.zeros(channels)
        self.mean_magnitude = np.zeros(channels)
        self.products = np.zeros((channels, channels))

    def add(self, value: np.ndarray) -> None:
        """Adds one batch, shape `(…, channels)`, to the statistics."""
        rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
        rows = rows[:: -(-len(rows) // ROWS)]
        self.count += len(rows)
        share = len(rows) / self.count
        magnitude = np.abs(rows)
        self.largest = np.maximum(self.largest, magnitude.max(axis=0))
        self.mean_magnitude += share * (magnitude.mean(axis=0) - self.mean_magnitude)
        self.products += share * (rows.T @ rows / len(rows) - self.products)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A layer and the layers that read its output; nothing else reads it.

    Attributes:
        producer: the layer whose output channels can be scaled; it is called once.
        consumers: the layers that read them.
        value: the value as the consumers read it, rounded.
        pads: whether zeros are put beside the value on the way to them.
    """

    producer: QuantizeWrapper
    consumers: tuple[QuantizeWrapper, ...]
    value: Ref
    pads: bool = False

    @property
    def name(self) -> str:
        """The names of the producer and the consumers, for messages."""
        readers = ", ".join(consumer.layer.name for consumer in self.consumers)
        return f"{self.producer.layer.name} -> {readers}"

    def kernels(self) -> list[np.ndarray]:
        """The consumers' float kernels as `(input channels, rest)`."""
        return [
            np.moveaxis(np.asarray(c.layer.kernel), input_axis(c), 0).reshape(
                c.layer.kernel.shape[input_axis(c)], -1
            )
            for c in self.consumers
        ]

    def scale(self, factor: np.ndarray) -> None:
        """Divides the value's channels by `factor`, shape `(channels,)`, all positive."""
        _divide(self.producer, factor)
        for consumer in self.consumers:
            kernel = consumer.layer.kernel
            shape = [1] * len(kernel.shape)
            shape[input_axis(consumer)] = -1
            kernel.assign(np.asarray(kernel) * factor.reshape(shape))


@dataclasses.dataclass(frozen=True)
class Block:
    """Why the channels of a layer cannot be scaled.

    Attributes:
        producer: the name of the layer whose channels it would be.
        reason: what is in the way, and where.
    """

    producer: str
    reason: str


def pairs(graph: Graph) -> list[Pair]:
    """All pairs in the graph of a QAT model."""
    return [found for found in pairs_and_blocks(graph) if isinstance(found, Pair)]


def pairs_and_blocks(
    graph: Graph, eligible: Callable[[QuantizeWrapper], bool] = lambda wrapper: True
) -> Iterator[Pair | Block]:
    """For each layer whose own channels can be scaled: its pair, or what prevents one.

    Args:
        graph: of a QAT model.
        eligible: which layers are asked about.
    """
    calls = graph.calls()
    readers = graph.consumers()
    for node in graph.nodes:
        if not _divides(node.layer) or not eligible(node.layer):
            continue
        name = str(node.layer.layer.name)
        if calls[id(node.layer)] > 1:
            yield Block(name, "it is called more than once")
            continue
        way = _follow(node.outputs[0], readers, set(graph.outputs))
        reason = way.stopped or next(filter(None, (_refusal(n, calls) for n in way.readers)), None)
        if reason is not None:
            yield Block(name, reason)
        else:
            yield Pair(node.layer, tuple(n.layer for n in way.readers), way.value, way.pads)


def _refusal(node: Node, calls: dict[int, int]) -> str | None:
    """Why a layer cannot absorb factors of its input's channels; `None` where it can."""
    name, kind = _called(node)
    if not _multiplies(node.layer):
        return f"'{name}' ({kind}) reads it, which can neither pass factors on nor absorb them"
    return f"'{name}' reads it and is called more than once" if calls[id(node.layer)] > 1 else None


def _called(node: Node) -> tuple[str, str]:
    """The name and the kind of a node's layer, as the user knows them."""
    layer = node.layer
    if isinstance(layer, ActivationQuantizer):
        return layer.label, "a rounding"
    inner = layer.layer if isinstance(layer, QuantizeWrapper) else layer
    return str(inner.name), type(inner).__name__


def rescaled(
    qat: keras.Model,
    data: Any,
    factors: Callable[[Pair, Statistics], np.ndarray],
    eligible: Callable[[QuantizeWrapper], bool] = lambda wrapper: True,
    then: Callable[[Pair], None] = lambda pair: None,
    wanted: str = "a normalization or linear layer",
    rounds: int = 1,
) -> keras.Model:
    """A copy of a QAT model with its pairs scaled and all ranges calibrated again.

    Args:
        qat: a QAT model; it is not changed.
        data: as for `kqat.calibrate`.
        factors: (pair, statistics of the value between) -> one factor per channel.
        eligible: which layers' channels to scale.
        then: called with each pair after all were scaled, before calibration.
        wanted: what these layers are, for messages.
        rounds: how often each pair is scaled at the most, where factors depend on weights that
            other pairs scale too. The statistics are those before the first round.

    Raises:
        ModelError: if `qat` is not a QAT model, or has no eligible pair.
        CalibrationError: if the data do not fit the model.
    """
    trace(qat)  # raises if `qat` is not a model
    check_quantized(qat, "to scale")
    check_finite(qat, ModelError, ranges=False, purpose="to scale")
    copy = keras.models.clone_model(qat)
    copy.set_weights(qat.get_weights())
    graph = trace(copy)
    batches = list(calibration.batches(data, graph))  # A generator can be read only once.
    found = list(pairs_and_blocks(graph, eligible))
    chosen = [one for one in found if isinstance(one, Pair)]
    if not chosen:
        raise ModelError(
            f"Expected {wanted} right before layers with weights. Received: '{qat.name}', "
            f"{_none_of(found, wanted)}. Go on without it."
        )
    statistics = _statistics(graph, batches, [pair.value for pair in chosen])
    _scale(chosen, lambda pair: factors(pair, statistics[pair.value]), rounds)
    for pair in chosen:
        then(pair)
    for layer in all_layers(copy):
        if isinstance(layer, ActivationQuantizer):
            layer.reset()
    calibration.calibrate(copy, iter(batches))
    return copy


def _scale(chosen: Sequence[Pair], factors: Callable[[Pair], np.ndarray], rounds: int) -> None:
    """Scales the pairs one after the other, in at most `rounds` rounds."""
    # What each pair's channels were divided by so far.
    totals: list[Any] = [1.0] * len(chosen)
    for _ in range(rounds):
        settled = True
        for index, pair in enumerate(chosen):
            total = totals[index] * factors(pair)
            total = np.clip(total, 1.0 / LARGEST_FACTOR, LARGEST_FACTOR)
            factor = total / totals[index]
            totals[index] = total
            settled = settled and bool(np.all(np.abs(factor - 1.0) <= SETTLED))
            pair.scale(factor.astype(np.float32))
        if settled:
            break
    for wrapper in {id(w): w for pair in chosen for w in (pair.producer, *pair.consumers)}.values():
        wrapper.start_steps()


def _none_of(found: Sequence[Any], wanted: str) -> str:
    """Why there is nothing to scale."""
    if not found:
        return f"which has no {wanted.removeprefix('a ')} whose channels can be scaled"
    return f"which has none whose channels can be scaled: {blocks_text(found)}"


def blocks_text(blocks: Sequence[Block]) -> str:
    """What stands in the way of which layers, in words; that a layer is the last one comes last."""
    by_reason: dict[str, list[str]] = {}
    for block in sorted(blocks, key=lambda block: block.reason == _IS_OUTPUT):
        by_reason.setdefault(block.reason, []).append(f"'{block.producer}'")
    reasons = [f"{_some(names)}: {reason}" for reason, names in by_reason.items()]
    return _some(reasons, "; ")


def _some(words: Sequence[str], between: str = ", ") -> str:
    more = f"{between}and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return between.join(words[:_NAMED]) + more


def blocks_of(qat: keras.Model) -> list[Block]:
    """What prevents the channels of the layers of a QAT model from being scaled."""
    return [found for found in pairs_and_blocks(trace(qat)) if isinstance(found, Block)]


def _statistics(
    graph: Graph, batches: Sequence[list[np.ndarray]], wanted: list[Ref]
) -> dict[Ref, Statistics]:
    """The statistics of each of the wanted values, computed without rounding."""
    kept = {ref: Statistics(ref.shape[-1] or 0) for ref in wanted}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        value = call_unrounded(node, *args, **kwargs)
        if node.outputs[0] in kept:
            kept[node.outputs[0]].add(np.asarray(value))
        return value

    calibration.run_batches(graph, batches, call)
    return kept


@dataclasses.dataclass(frozen=True)
class _Way:
    """What a value becomes on its way to the layers that compute with it.

    `stopped` says what stands in the way, where something does.
    """

    value: Ref
    readers: tuple[Node, ...] = ()
    pads: bool = False
    stopped: str | None = None


def _follow(ref: Ref, readers: dict[Ref, list[Node]], outputs: set[Ref]) -> _Way:
    """The value behind all that commutes with factors of its channels, and who reads it."""
    pads = False
    while ref not in outputs and len(readers[ref]) == 1:
        (node,) = readers[ref]
        stopped = _stops(node)
        if stopped is not None:
            return _Way(ref, pads=pads, stopped=stopped)
        if not _commutes(node):
            break
        pads = pads or isinstance(node.layer, _PADDING)
        ref = node.outputs[0]
    if ref in outputs:
        return _Way(ref, stopped=_IS_OUTPUT)
    return _Way(ref, tuple(readers[ref]), pads)


def _stops(node: Node) -> str | None:
    """Why a rounding does not let factors pass; `None` where it does, and for other layers."""
    quantizer = node.layer
    if not isinstance(quantizer, ActivationQuantizer):
        return None
    if quantizer.clamp not in (None, Clamp.RELU):
        return f"'{quantizer.label}' clamps at a fixed value ({quantizer.clamp})"
    # A fixed range cannot follow channels that are scaled.
    fixed = isinstance(quantizer.range_method, Fixed)
    return f"'{quantizer.label}' has a range that is given" if fixed else None


def _commutes(node: Node) -> bool:
    """Whether a layer hands positive factors of its input's channels on as they are."""
    layer: Any = node.layer
    if isinstance(layer, ActivationQuantizer):
        return True
    inner = layer.layer if isinstance(layer, QuantizeWrapper) else layer
    if len(node.inputs) != 1 or len(node.outputs) != 1:
        return False
    if isinstance(layer, QuantizeWrapper) and layer.normalizations:
        return False
    if getattr(inner, "data_format", None) == "channels_first":
        return False
    if isinstance(inner, layers.ReLU):
        return inner.max_value is None and not inner.threshold
    if isinstance(inner, layers.Activation):
        return inner.activation in (keras.activations.relu, keras.activations.linear)
    if isinstance(inner, layers.Permute):
        return bool(inner.dims[-1] == len(inner.dims))
    if isinstance(inner, _MOVING):
        before, behind = node.inputs[0].shape, node.outputs[0].shape
        return before[-1] is not None and before[-1] == behind[-1] and len(before) > 1
    return isinstance(inner, _COMMUTING)


def _divides(layer: Any) -> bool:
    """Whether the output channels of `layer` can be scaled by its own variables."""
    if not isinstance(layer, QuantizeWrapper) or _is_clustered(layer):
        return False
    norm = layer.normalization
    if norm is not None:
        return bool(norm.scale)
    if isinstance(layer.layer, ChannelAffine | layers.BatchNormalization):
        return bool(layer.layer.scale)
    return type(layer.layer) in INPUT_AXES


def _is_clustered(wrapper: QuantizeWrapper) -> bool:
    """Whether channels may not be scaled, as their values are few."""
    return any(kept.clusters for kept in wrapper.preserve.values())


def _multiplies(layer: Any) -> bool:
    if not isinstance(layer, QuantizeWrapper) or type(layer.layer) not in INPUT_AXES:
        return False
    if _is_clustered(layer):
        return False
    return getattr(layer.layer, "groups", 1) == 1


def _divide(wrapper: QuantizeWrapper, factor: np.ndarray) -> None:
    layer: Any = wrapper.layer if wrapper.normalization is None else wrapper.normalization
    if isinstance(layer, ChannelAffine | layers.BatchNormalization):
        variables = [layer.gamma, layer.beta if layer.center else None]
    else:
        variables = [layer.kernel, layer.bias if layer.use_bias else None]
    for variable in variables:
        if variable is not None:
            value = np.asarray(variable)
            # A depthwise kernel ends in (channels, multiplier).
            shape = value.shape[-2:] if value.shape[-1] != factor.size else (factor.size,)
            variable.assign(value / factor.reshape(shape))


def input_axis(wrapper: QuantizeWrapper) -> int:
    """The axis of the wrapped kernel that belongs to the channels of the input."""
    return INPUT_AXES[type(wrapper.layer)]
