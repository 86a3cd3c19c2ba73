"""Scales channels between layers: one layer divides by a factor, the next ones multiply by it.

The float function stays the same, up to float rounding, but the tensors lose less when they are
quantized. SmoothQuant, AWQ and cross-layer equalization are three ways to choose the factors.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import ModelError
from kqat.graph import Graph, Node, Ref, trace
from kqat.grids import Clamp, Fixed
from kqat.parts import ChannelAffine
from kqat.training import calibration
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import all_layers, is_quantized
from kqat.training.weight_wrapper import QuantizeWrapper

# Layer class -> the axis of its kernel that belongs to the channels of the input.
INPUT_AXES: dict[type, int] = {
    layers.Dense: 0,
    layers.Conv1D: -2,
    layers.Conv2D: -2,
    layers.DepthwiseConv1D: -2,
    layers.DepthwiseConv2D: -2,
}
# Factors are clipped to this: larger ones would make outliers in the other tensor.
LARGEST_FACTOR = 2.0**10


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
    """

    producer: QuantizeWrapper
    consumers: tuple[QuantizeWrapper, ...]
    value: Ref

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
        for wrapper in (self.producer, *self.consumers):
            wrapper.start_steps()


def pairs(graph: Graph) -> list[Pair]:
    """All pairs in the graph of a QAT model."""
    calls = graph.calls()
    readers = graph.consumers()
    found = []
    for node in graph.nodes:
        if calls[id(node.layer)] > 1 or not _divides(node.layer):
            continue
        value, consumers = _follow(node.outputs[0], readers, set(graph.outputs))
        absorbed = [n.layer for n in consumers if calls[id(n.layer)] == 1 and _multiplies(n.layer)]
        if absorbed and len(absorbed) == len(consumers):
            found.append(Pair(node.layer, tuple(absorbed), value))
    return found


def rescaled(
    qat: keras.Model,
    data: Any,
    factors: Callable[[Pair, Statistics], np.ndarray],
    eligible: Callable[[Pair], bool] = lambda pair: True,
    then: Callable[[Pair], None] = lambda pair: None,
) -> keras.Model:
    """A copy of a QAT model with its pairs scaled and all ranges calibrated again.

    Args:
        qat: a QAT model; it is not changed.
        data: as for `kqat.calibrate`.
        factors: (pair, statistics of the value between) -> one factor per channel.
        eligible: which pairs to scale.
        then: called with each of them after all were scaled, before calibration.

    Raises:
        ModelError: if `qat` is not a QAT model, or has no eligible pair.
        CalibrationError: if the data do not fit the model.
    """
    trace(qat)  # raises if `qat` is not a model
    if not is_quantized(qat):
        raise ModelError(
            f"Expected a QAT model to scale. Received: '{qat.name}', which is float. Use "
            "kqat.quantize_model first."
        )
    copy = keras.models.clone_model(qat)
    copy.set_weights(qat.get_weights())
    graph = trace(copy)
    batches = list(calibration.batches(data, graph))  # A generator can be read only once.
    chosen = [pair for pair in pairs(graph) if eligible(pair)]
    if not chosen:
        raise ModelError(
            f"Expected a normalization or linear layer right before layers with weights. "
            f"Received: '{qat.name}', which has none whose channels can be scaled. Train it as it "
            "is."
        )
    statistics = _statistics(graph, batches, [pair.value for pair in chosen])
    for pair in chosen:
        factor = factors(pair, statistics[pair.value])
        pair.scale(np.clip(factor, 1.0 / LARGEST_FACTOR, LARGEST_FACTOR).astype(np.float32))
    for pair in chosen:
        then(pair)
    for layer in all_layers(copy):
        if isinstance(layer, ActivationQuantizer):
            layer.reset()
    calibration.calibrate(copy, iter(batches))
    return copy


def _statistics(
    graph: Graph, batches: Sequence[list[np.ndarray]], wanted: list[Ref]
) -> dict[Ref, Statistics]:
    """The statistics of each of the wanted values, computed without rounding."""
    kept = {ref: Statistics(ref.shape[-1] or 0) for ref in wanted}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        quantizer = isinstance(node.layer, ActivationQuantizer)
        value = node.layer.clamped(args[0]) if quantizer else node.layer(*args, **kwargs)
        if node.outputs[0] in kept:
            kept[node.outputs[0]].add(np.asarray(value))
        return value

    calibration.run_batches(graph, batches, call)
    return kept


def _follow(ref: Ref, readers: dict[Ref, list[Node]], outputs: set[Ref]) -> tuple[Ref, list[Node]]:
    """The value after the quantizers of `ref`, and its readers; none if it is a model output."""
    while ref not in outputs and len(readers[ref]) == 1:
        (node,) = readers[ref]
        passes = isinstance(node.layer, layers.Dropout) or (
            isinstance(node.layer, ActivationQuantizer)
            and node.layer.clamp in (None, Clamp.RELU)
            # A fixed range cannot follow channels that are scaled.
            and not isinstance(node.layer.range_method, Fixed)
        )
        if not passes:
            break
        ref = node.outputs[0]
    return ref, [] if ref in outputs else readers[ref]


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
