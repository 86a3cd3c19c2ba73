"""Which way to find ranges suits a network, and what rounding does to means: by its own data.

Clipping helps one network and harms the next: benchmarks/calibration.md has some where percentiles
gain 3 dB over minima and maxima, and some where they lose 3. So the default tries.
Rounded weights move the mean of an output channel, and so do rounded inputs; it is moved back.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.graph import Graph, Node, Ref
from kqat.grids import MSE, CalibrationMethod, Fixed, MinMax, Percentile
from kqat.training.activation_quantizer import ActivationQuantizer, SiteRange
from kqat.training.observation import Observer, with_bias_off_its_grid
from kqat.training.quantized_recurrence import QuantizedRecurrence
from kqat.training.unrounded import call_unrounded
from kqat.training.weight_wrapper import QuantizeWrapper

# From the widest range on; a narrower one has to be better by the margin, as samples that
# calibration did not see reach further than those that it saw.
CANDIDATES: tuple[CalibrationMethod, ...] = (MinMax(), MSE(), Percentile())
MARGIN_DB = 0.5
TRIED_SAMPLES = 64


class KeptSamples:
    """Some of all samples, the same whatever the order they come in: those of least hash."""

    def __init__(self, count: int = TRIED_SAMPLES) -> None:
        self.count = count
        self._kept: list[tuple[bytes, list[np.ndarray]]] = []

    def offer(self, batch: Sequence[np.ndarray], real: int) -> None:
        """Looks at the first `real` samples of a batch."""
        for index in range(real):
            sample = [x[index] for x in batch]
            name = hashlib.blake2b(digest_size=8)
            for array in sample:
                name.update(np.ascontiguousarray(array).tobytes())
            key = name.digest()
            if len(self._kept) < self.count or key < self._kept[-1][0]:
                self._kept.append((key, [np.array(array) for array in sample]))
                self._kept.sort(key=lambda pair: pair[0])
                del self._kept[self.count :]

    def batch(self) -> list[np.ndarray]:
        """One array per input."""
        return [np.stack(arrays) for arrays in zip(*(kept for _, kept in self._kept), strict=True)]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was tried and found best.

    Attributes:
        ranges: of each call site, by quantizer.
        corrections: what moves the mean of each layer's output to where it is without rounding, by
            layer; none where weights are not those of the float model.
        noise: power of the errors of rounding over that of the values, by output of the graph; none
            where nothing was tried.
        unrounded: the values of these outputs, and those of `judged_values`, without rounding.
    """

    ranges: dict[ActivationQuantizer, dict[int, SiteRange]]
    corrections: dict[QuantizeWrapper, np.ndarray]
    noise: Mapping[Ref, float]
    unrounded: Mapping[Ref, np.ndarray] = dataclasses.field(default_factory=dict)


def best(
    graph: Graph,
    observer: Observer,
    tensors: Sequence[Any],
    methods: Sequence[CalibrationMethod],
    *,
    corrects: bool,
) -> Choice:
    """The method with which the outputs differ least from those without rounding.

    The noise is taken twice, of the outputs and of what a closing softmax (or another function of
    given range) reads: before it differences show better, and behind it are the user's numbers. A
    method is judged by the geometric mean of both. Inside recurrent layers nothing is rounded for
    this. No variable is changed.

    Args:
        graph: that of the QAT model.
        observer: has seen the calibration data.
        tensors: one batch of them, one tensor per input.
        methods: what to try. The first is taken unless another one is better by the margin.
        corrects: whether the means of the outputs are corrected, layer by layer in the order in
            which they run. If not, the outputs without rounding are those of the rounded weights.

    Reference: Nagel et al. 2019, section 4.2 and appendix D (https://arxiv.org/abs/1906.04721),
    for the correction, the variant that measures.
    """
    ends = set(judged_values(graph))
    outputs = {ref for ref in graph.outputs if not ref.holds_indexes}
    pass_ = _Pass(graph, tensors, ends | outputs)
    chosen, least = None, np.inf
    want: dict[Ref, np.ndarray] = {}
    means = None
    if corrects or len(methods) > 1:
        want, means = pass_.unrounded() if corrects else (pass_.with_weights_rounded(), None)
    met: list[Any] = []
    for method in methods:
        ranges = observer.ranges(method)
        if ranges in met:
            continue
        met.append(ranges)
        if not want:
            return Choice(ranges, {}, {})
        got, corrections = pass_.rounded(ranges, means)
        noise = math.sqrt(_noise_at(ends, want, got) * _noise_at(outputs, want, got))
        if chosen is None or noise < least * 10.0 ** (-MARGIN_DB / 10.0):
            each = {ref: _noise(want[ref], got[ref]) for ref in outputs}
            chosen, least = Choice(ranges, corrections, each, want), noise
    assert chosen is not None, "there is a method to try"
    return chosen


def noisy_roundings(
    graph: Graph, tensors: Sequence[Any], choice: Choice, least: float, *, corrects: bool
) -> list[Node]:
    """The roundings behind which the noise is more than `least` of the values, in their order.

    Args:
        graph, tensors, corrects: as of `best`.
        choice: what it found.
        least: a ratio of powers.
    """
    roundings = [n for n in graph.nodes if isinstance(n.layer, ActivationQuantizer)]
    pass_ = _Pass(graph, tensors, {node.outputs[0] for node in roundings})
    want, means = pass_.unrounded() if corrects else (pass_.with_weights_rounded(), None)
    got, _ = pass_.rounded(choice.ranges, means)
    return [n for n in roundings if _noise(want[n.outputs[0]], got[n.outputs[0]]) > least]


def _noise_at(
    refs: set[Ref], want: Mapping[Ref, np.ndarray], got: Mapping[Ref, np.ndarray]
) -> float:
    """The noise of all these values, never zero: no noise anywhere must not hide that elsewhere."""
    return max(sum(_noise(want[ref], got[ref]) for ref in refs), 1e-12)


def _noise(want: np.ndarray, got: np.ndarray) -> float:
    """Power of the difference over that of the values."""
    signal = float(np.mean(np.square(want, dtype=np.float64)))
    noise = float(np.mean(np.square(np.float64(want) - got)))
    return noise / signal if signal > 0.0 else 0.0


def judged_values(graph: Graph) -> Iterator[Ref]:
    """The last values before the outputs that a range of the network's own rounds."""
    producers = graph.producers()
    waiting, met = list(graph.outputs), set()
    while waiting:
        ref = waiting.pop()
        node = producers.get(ref)
        if node is None or node in met:
            continue
        met.add(node)
        given = isinstance(node.layer, ActivationQuantizer) and isinstance(
            node.layer.range_method, Fixed
        )
        if node.has_weights and not given:
            yield ref
        else:
            waiting += node.inputs


class _Pass:
    """Runs one batch through the graph of a QAT model, with more or less of it rounded."""

    def __init__(self, graph: Graph, tensors: Sequence[Any], ends: set[Ref]) -> None:
        self.graph, self.tensors, self.ends = graph, tensors, ends
        calls = graph.calls()
        self.corrected = {
            node.layer
            for node in graph.nodes
            if isinstance(node.layer, QuantizeWrapper)
            and node.layer.takes_correction
            and calls[id(node.layer)] == 1
        }

    def unrounded(self) -> tuple[dict[Ref, np.ndarray], dict[QuantizeWrapper, np.ndarray]]:
        """The values at the ends where nothing is rounded, and the means of layers' outputs."""
        means = {}

        def call(node: Node, *args: Any, **kwargs: Any) -> Any:
            value = call_unrounded(node, *args, **kwargs)
            if node.layer in self.corrected:
                mean = mean_of(node.layer, value)
                if mean is not None:
                    means[node.layer] = mean
            return value

        return self._values(call), means

    def with_weights_rounded(self) -> dict[Ref, np.ndarray]:
        """The values at the ends where weights are rounded and activations are not."""

        def call(node: Node, *args: Any, **kwargs: Any) -> Any:
            layer = node.layer
            if isinstance(layer, QuantizedRecurrence):
                return layer.observe(args[0], lambda *_: None)
            if isinstance(layer, ActivationQuantizer):
                return layer.clamped(args[0])
            return layer(*args, **with_bias_off_its_grid(layer, kwargs))

        return self._values(call)

    def rounded(
        self,
        ranges: Mapping[ActivationQuantizer, Mapping[int, SiteRange]],
        means: Mapping[QuantizeWrapper, np.ndarray] | None,
    ) -> tuple[dict[Ref, np.ndarray], dict[QuantizeWrapper, np.ndarray]]:
        """The values at the ends where all is rounded, and what moves the outputs to `means`."""
        found = {}

        def call(node: Node, *args: Any, **kwargs: Any) -> Any:
            layer = node.layer
            if isinstance(layer, QuantizedRecurrence):
                return layer.observe(args[0], lambda *_: None)
            if isinstance(layer, ActivationQuantizer):
                return _on_grid(layer, ranges, args[0], kwargs)
            value = layer(*args, **with_bias_off_its_grid(layer, kwargs))
            if means is not None and layer in means:
                moved: np.ndarray = means[layer] - mean_of(layer, value)
                found[layer] = correction = moved.astype(np.float32)
                value = value + ops.cast(correction, value.dtype)
            return value

        return self._values(call), found

    def _values(self, call: Callable[..., Any]) -> dict[Ref, np.ndarray]:
        found = {}

        def kept(node: Node, *args: Any, **kwargs: Any) -> Any:
            value = call(node, *args, **kwargs)
            for ref, tensor in zip(node.outputs, keras.tree.flatten(value), strict=True):
                if ref in self.ends:
                    found[ref] = np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))
            return value

        self.graph.run(self.tensors, kept)
        return found


def _on_grid(
    layer: ActivationQuantizer,
    ranges: Mapping[ActivationQuantizer, Mapping[int, SiteRange]],
    x: Any,
    kwargs: Mapping[str, Any],
) -> Any:
    """`x` as a quantizer whose call sites have these ranges rounds it."""
    if layer not in ranges:
        return layer(x, **kwargs) if isinstance(layer.range_method, Fixed) else layer.clamped(x)
    sites = ranges[layer].values()
    away = bool(kwargs.get("halves_away"))
    lows, highs = [site.low for site in sites], [site.high for site in sites]
    return layer.rounded(x, lows, highs, halves_away=away)


def mean_of(wrapper: QuantizeWrapper, value: Any) -> np.ndarray | None:
    """The mean of a layer's output for each number of its bias, float64.

    `None` if the bias does not run along the last axes.
    """
    assert wrapper.correction is not None
    shape = tuple(wrapper.correction.shape)
    if tuple(value.shape[len(value.shape) - len(shape) :]) != shape:
        return None
    values = np.asarray(ops.convert_to_numpy(ops.cast(value, "float32")))
    return values.reshape(-1, *shape).mean(axis=0, dtype=np.float64)
