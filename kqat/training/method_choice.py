"""Which way to find ranges suits a network: tried on its own calibration data.

Clipping helps one network and harms the next: benchmarks/calibration.md has some where percentiles
gain 3 dB over minima and maxima, and some where they lose 3. So the default tries.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.graph import Graph, Node, Ref
from kqat.grids import MSE, CalibrationMethod, Fixed, MinMax, Percentile
from kqat.training.activation_quantizer import ActivationQuantizer, SiteRange
from kqat.training.observation import Observer, with_bias_off_its_grid
from kqat.training.quantized_recurrence import QuantizedRecurrence

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


def chosen_method(graph: Graph, observer: Observer, tensors: Sequence[Any]) -> CalibrationMethod:
    """The candidate with which the outputs differ least from those without rounded activations.

    The noise is taken twice, of the outputs and of what a closing softmax (or another function of
    given range) reads: before it differences show better, and behind it are the user's numbers. A
    method is judged by the geometric mean of both. Inside recurrent layers nothing is rounded for
    this. No variable is changed.

    Args:
        graph: that of the QAT model.
        observer: has seen the calibration data.
        tensors: one batch of them, one tensor per input.
    """
    ends = set(judged_values(graph))
    outputs = {ref for ref in graph.outputs if not ref.holds_indexes}
    want = _values(graph, tensors, ends | outputs, None)
    best, least = CANDIDATES[0], np.inf
    met: list[Any] = []
    for method in CANDIDATES:
        ranges = observer.ranges(method)
        if ranges in met:
            continue
        met.append(ranges)
        got = _values(graph, tensors, ends | outputs, ranges)
        noise = math.sqrt(_noise_at(ends, want, got) * _noise_at(outputs, want, got))
        if len(met) == 1 or noise < least * 10.0 ** (-MARGIN_DB / 10.0):
            best, least = method, noise
    return best


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


def _values(
    graph: Graph,
    tensors: Sequence[Any],
    ends: set[Ref],
    ranges: Mapping[ActivationQuantizer, Mapping[int, SiteRange]] | None,
) -> dict[Ref, np.ndarray]:
    """The values at `ends`, with activations rounded on `ranges`, or not."""
    found = {}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.layer
        kwargs = with_bias_off_its_grid(layer, kwargs)
        if isinstance(layer, QuantizedRecurrence):
            value = layer.observe(args[0], lambda *_: None)
        elif not isinstance(layer, ActivationQuantizer):
            value = layer(*args, **kwargs)
        elif ranges is None or (layer not in ranges and not isinstance(layer.range_method, Fixed)):
            value = layer.clamped(args[0])
        elif layer in ranges:
            sites = ranges[layer].values()
            lows = ops.convert_to_tensor([site.low for site in sites], "float32")
            highs = ops.convert_to_tensor([site.high for site in sites], "float32")
            value = layer.rounded(args[0], lows, highs)
        else:
            value = layer(*args, **kwargs)
        for ref, tensor in zip(node.outputs, keras.tree.flatten(value), strict=True):
            if ref in ends:
                found[ref] = np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))
        return value

    graph.run(tensors, call)
    return found
