"""What flows at each call site of a quantizer while a QAT model is calibrated."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.base import CalibrationError
from kqat.graph import Graph, Node, Ref
from kqat.grids import (
    LOWEST,
    CalibrationMethod,
    Entropy,
    Fixed,
    Histogram,
    LastValue,
    MinMax,
    Percentile,
    arithmetic,
)
from kqat.grids import MSE as LeastError
from kqat.training.activation_quantizer import ActivationQuantizer, SiteRange
from kqat.training.quantized_recurrence import QuantizedRecurrence
from kqat.training.weight_wrapper import QuantizeWrapper

# Of one sample's values at one site no more than about so many are counted, evenly spread; its
# extremes are exact.
COUNTED = 4096
# Batches that are also run as in training, to see what noise layers do to the ranges.
NOISY_BATCHES = 4
# Softmax's 255/256 is half a step and no cut.
CUT_STEPS = 1.5
NOISE = (
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.AlphaDropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
)
_ASKED = (MinMax, Percentile, LeastError, Entropy)


class SiteRecord:
    """All that was seen at one call site.

    Attributes:
        quantizer, site: which one.
        even, odd: histograms of every other sample.
        extremes: least and greatest value of each batch, zero included.
        least, greatest: value of all.
        noisy: the same where noise layers were active, of the first batches.
        has_hidden: whether an attention mask hid values.
    """

    def __init__(self, quantizer: ActivationQuantizer, site: int) -> None:
        self.quantizer = quantizer
        self.site = site
        self.even, self.odd = Histogram(), Histogram()
        self.extremes: list[tuple[float, float]] = []
        self.least, self.greatest = np.inf, -np.inf
        self.noisy: list[tuple[float, float]] = []
        self.keys = 0
        self._whole: Histogram | None = None

    def add(self, x: np.ndarray, rows: int, per_sample: int | None) -> None:
        """Takes in one batch.

        Args:
            x: float32 of any shape.
            rows: how many of its first rows belong to samples.
            per_sample: rows of one sample, or `None` where the rows are of no sample.
        """
        values = self._shown(x[:rows])
        if per_sample is None:
            halves = [values.reshape(1, -1)] * 2
        else:
            samples = values.reshape(rows // per_sample, -1)
            halves = [samples[::2], samples[1::2]]
        bounds = [(float(half.min()), float(half.max())) for half in halves if half.size]
        low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
        if not np.isfinite(bounds).all():
            raise CalibrationError(
                f"Expected finite values where '{self.quantizer.name}' rounds. Received: "
                f"{np.count_nonzero(~np.isfinite(values))} of {values.size} that are NaN or "
                "infinite, computed from finite inputs. No range was changed. Scale the inputs as "
                "in training, or leave the layer before it float."
            )
        self.extremes.append((min(low, 0.0), max(high, 0.0)))
        self.least, self.greatest = min(self.least, low), max(self.greatest, high)
        for histogram, half, ends in zip((self.even, self.odd), halves, bounds, strict=False):
            histogram.add(half[:, :: _stride(half.shape[1], x.shape[-1])], *ends)
        self._whole = None

    def add_noisy(self, x: np.ndarray, rows: int) -> None:
        """Takes in a batch of the training pass."""
        values = self._shown(x[:rows])
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        self.noisy.append((min(low, 0.0), max(high, 0.0)))

    def whole(self) -> Histogram:
        """The histogram of all samples."""
        if self._whole is None:
            self._whole = Histogram()
            self._whole.merge(self.even)
            self._whole.merge(self.odd)
        return self._whole

    def found(self, method: CalibrationMethod) -> SiteRange:
        """The range by `method`."""
        seen = self.whole()
        low, high = method.calibrated(seen, self.quantizer.spec)
        room = self._room()
        return SiteRange(
            low=float(np.float32(low - room)),
            high=float(np.float32(high)),
            seen_low=seen.low - room,
            seen_high=seen.high,
            noise=self._noise(),
            batches=len(self.extremes),
        )

    def _noise(self) -> tuple[float, float]:
        """What noise adds to `-low` and `high`, by the batches that were run both ways."""
        if not self.noisy:
            return 0.0, 0.0
        plain, noisy = (
            np.array([-min(low for low, _ in pairs), max(high for _, high in pairs)])
            for pairs in (self.extremes[: len(self.noisy)], self.noisy)
        )
        more = np.maximum(noisy - plain, 0.0)
        return tuple(more.tolist()) if np.isfinite(more).all() else (0.0, 0.0)

    def _shown(self, x: np.ndarray) -> np.ndarray:
        if not self.quantizer.hides:
            return x
        self.keys = x.shape[-1]
        return np.where(x == np.float32(LOWEST), np.float32(0.0), x)

    def _room(self) -> float:
        return arithmetic.hidden_room(self.quantizer.spec, self.keys) if self.keys else 0.0


def _stride(size: int, channels: int) -> int:
    """The step that leaves about `COUNTED` of `size` values and meets all channels alike."""
    stride = max(size // COUNTED, 1)
    while math.gcd(stride, channels) > 1:
        stride += 1
    return stride


def with_bias_off_its_grid(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call whose bias is not rounded.

    That grid is of the range found earlier, on which a new range must not depend.
    """
    if isinstance(layer, QuantizeWrapper):
        return {key: value for key, value in kwargs.items() if key != "input_quantizer"}
    return kwargs


@dataclasses.dataclass
class Cut:
    """What a given range costs a tensor.

    Attributes:
        beyond, total: values outside, of all.
        low, high: how far they go.
        power, lost: sums of squares, of the values and of the errors of rounding them.
    """

    beyond: int = 0
    total: int = 0
    low: float = 0.0
    high: float = 0.0
    power: float = 0.0
    lost: float = 0.0

    @property
    def noise(self) -> float:
        """Power of the errors over that of the values."""
        return self.lost / self.power if self.power > 0.0 else 0.0


class Observer:
    """Runs batches through a QAT model and keeps what is to be known of each site.

    Weights are rounded and activations are not. No variable of the model is changed.

    Attributes:
        records: all that was seen, by quantizer and call site.
        cut: the same of ranges that are given.
        samples, batches: how many were seen.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.records: dict[tuple[ActivationQuantizer, int], SiteRecord] = {}
        self.cut: dict[tuple[ActivationQuantizer, int], Cut] = {}
        self.noise = [node.layer for node in graph.nodes if isinstance(node.layer, NOISE)]
        recurrences = [n.layer for n in graph.nodes if isinstance(n.layer, QuantizedRecurrence)]
        self._behind_noise = _behind_noise(graph)
        self.is_noisy = bool(self._behind_noise.nodes)
        self._covered = set(_ends(graph))
        for recurrence in recurrences:
            self._covered |= {id(quantizer) for quantizer in recurrence.state_quantizers()}
        self._size = self._real = 0
        self._noisy = False
        self.samples = self.batches = 0

    def run(self, tensors: Sequence[Any], real: int) -> None:
        """Observes one batch, of which the first `real` samples count.

        Raises:
            CalibrationError: if a value is not finite.
        """
        self._real, self._size = real, int(tensors[0].shape[0])
        again = self.is_noisy and self.batches < NOISY_BATCHES
        read = self._run_keeping(tensors, self._behind_noise.inputs if again else ())
        if again:
            kept = [(v, ops.copy(v.value)) for layer in self.noise for v in layer.variables]
            self._noisy = True
            try:
                self._behind_noise.run(read, self._call)
            finally:
                self._noisy = False
                for variable, value in kept:
                    variable.assign(value)
        self.batches += 1
        self.samples += real

    def _run_keeping(self, tensors: Sequence[Any], refs: Sequence[Ref]) -> list[Any]:
        """Observes one batch without noise; returns these values of it."""
        wanted = set(refs)
        found = dict(zip(self.graph.inputs, tensors, strict=True))

        def call(node: Node, *args: Any, **kwargs: Any) -> Any:
            value = self._call(node, *args, **kwargs)
            if not wanted.isdisjoint(node.outputs):
                found.update(zip(node.outputs, keras.tree.flatten(value), strict=True))
            return value

        self.graph.run(tensors, call)
        return [found[ref] for ref in refs]

    def ranges(self, default: CalibrationMethod) -> dict[ActivationQuantizer, dict[int, SiteRange]]:
        """The range of each call site, by quantizer; `default` as for `method_of`."""
        found: dict[ActivationQuantizer, dict[int, SiteRange]] = {}
        for (quantizer, site), record in self.records.items():
            method = self.method_of(record, default)
            found.setdefault(quantizer, {})[site] = record.found(method)
        # In the order of the graph: what was widened is an input of what comes later.
        for quantizer, site in self.records:
            width = quantizer.least_width(site, lambda source: _scale(source, found.get(source)))
            if width is not None:
                found[quantizer][site] = found[quantizer][site].no_narrower(float(width))
        return found

    def method_of(self, record: SiteRecord, default: CalibrationMethod) -> CalibrationMethod:
        """How the range of a site is found.

        What the layer's config asks for; else `default`; but what enters or leaves the model, and
        states, cover all that was seen, and so do scores that masks hide.
        """
        asked = record.quantizer.range_method
        if isinstance(asked, LastValue) or record.quantizer.hides:
            return MinMax()
        if isinstance(asked, _ASKED):
            return asked
        return MinMax() if id(record.quantizer) in self._covered else default

    def _call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.layer
        if isinstance(layer, QuantizedRecurrence):
            return layer.observe(args[0], self._note, self._noisy)
        kwargs = with_bias_off_its_grid(layer, kwargs)
        if self._noisy and isinstance(layer, NOISE):
            return layer(*args, **{**kwargs, "training": True})
        if not isinstance(layer, ActivationQuantizer):
            return layer(*args, **kwargs)
        x = layer.clamped(args[0])
        if kwargs.get("observe", True):
            led = node.outputs[0].shape[0] is None
            self._note(layer, kwargs.get("site", 0), x, led)
        return x

    def _note(self, quantizer: ActivationQuantizer, site: int, x: Any, led: bool = True) -> None:
        """Takes in a value; `led` says whether its first axis runs over the samples."""
        if isinstance(quantizer.range_method, Fixed):
            self._note_given(quantizer, site, x)
            return
        key = quantizer, site
        record = self.records.get(key)
        if record is None:
            record = self.records[key] = SiteRecord(quantizer, site)
        values = np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))
        values = values.reshape(1) if values.ndim == 0 else values
        led = led and len(values) % self._size == 0
        rows = len(values) * self._real // self._size if led else len(values)
        if self._noisy:
            record.add_noisy(values, rows)
        else:
            record.add(values, rows, len(values) // self._size if led else None)

    def _note_given(self, quantizer: ActivationQuantizer, site: int, x: Any) -> None:
        """Keeps what a given range cuts by more than a step, and what rounding costs."""
        if self._noisy:
            return
        values = np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))
        low, high = (float(bound) for bound in quantizer.fixed_range())
        step = (high - low) / (quantizer.spec.qmax - quantizer.spec.qmin)
        beyond = (values < low - CUT_STEPS * step) | (values > high + CUT_STEPS * step)
        count, cut = int(np.count_nonzero(beyond)), self.cut.setdefault((quantizer, site), Cut())
        cut.total += values.size
        exact = np.float64(values)
        nearest = np.rint(np.clip(exact, low, high) / step) * step
        cut.power += float(np.sum(exact**2))
        cut.lost += float(np.sum((nearest - exact) ** 2))
        if count:
            cut.beyond += count
            cut.low = min(cut.low, float(values.min()))
            cut.high = max(cut.high, float(values.max()))


def _behind_noise(graph: Graph) -> Graph:
    """What computes the values that noise changes, of those that it does not.

    A record compares all calls at its call site with and without noise, so they are in it together.
    """
    changed: set[Ref] = set()
    sites: set[tuple[int, int]] = set()
    for node in graph.nodes:
        layer = node.layer
        makes = isinstance(layer, NOISE)
        makes |= isinstance(layer, QuantizedRecurrence) and bool(layer.parts.dropouts)
        if makes or not changed.isdisjoint(_read_by(node)):
            changed.update(node.outputs)
            sites.add(_site_of(node))
    nodes = [node for node in graph.nodes if _site_of(node) in sites]
    made = {ref for node in nodes for ref in node.outputs}
    given = dict.fromkeys(ref for node in nodes for ref in _read_by(node) if ref not in made)
    return Graph(tuple(nodes), list(given), [], (), ())


def _site_of(node: Node) -> tuple[int, int]:
    return id(node.layer), node.kwargs.get("site", 0)


def _read_by(node: Node) -> tuple[Ref, ...]:
    """The values that a node reads, and the masks that they bear."""
    return (*node.inputs, *(ref for pair in node.masks for ref in pair))


def _scale(quantizer: ActivationQuantizer, found: Mapping[int, SiteRange] | None) -> float:
    """The scale of a quantizer whose sites have these ranges; 0 where none is known."""
    if isinstance(quantizer.range_method, Fixed):
        return float(quantizer.scale())
    if not found:
        return 0.0
    lows, highs = ([getattr(one, side) for one in found.values()] for side in ("low", "high"))
    low, high = quantizer.union_of(lows, highs)
    return float(high - low) / (quantizer.spec.qmax - quantizer.spec.qmin)


def _ends(graph: Graph) -> Iterator[int]:
    """The quantizers of what enters and what leaves the model, by identity."""
    producers = graph.producers()
    inputs = set(graph.inputs)
    for node in graph.nodes:
        if isinstance(node.layer, ActivationQuantizer) and inputs & set(node.inputs):
            yield id(node.layer)
    waiting, met = list(graph.outputs), set()
    while waiting:
        maker = producers.get(waiting.pop())
        if maker is None or maker in met:
            continue
        met.add(maker)
        if isinstance(maker.layer, ActivationQuantizer):
            yield id(maker.layer)
        elif not maker.has_weights:
            waiting += maker.inputs
