"""What calibration tells: data that are too few or uneven, values that are cut or drowned.

Everything is measured on the data that were given. What is found becomes one warning, the worst
first, each with the name of its tensor and the way out.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from keras import layers

from kqat.base import decimal
from kqat.devices import input_scales
from kqat.graph import Graph, Node, Ref
from kqat.grids import Fixed, Histogram
from kqat.parts import (
    ConstantKind,
    Elementwise,
    Learned,
    Reduce,
    ReduceKind,
    WithConstant,
    inverts,
)
from kqat.registry import Output, stock_facts
from kqat.training.activation_quantizer import ActivationQuantizer, SiteRange
from kqat.training.observation import CUT_STEPS, Cut, Observer, SiteRecord
from kqat.training.weight_wrapper import QuantizeWrapper

FEW_SAMPLES = 32
# Ranges of two halves of the data that lie further apart than this.
UNLIKE_HALVES = 2.0
# Clipping is told where it costs more than so many times what rounding costs.
CLIPPING_OVER_ROUNDING = 10.0
# Power of the errors of rounding over that of an output, of which they then leave 10 dB.
LARGEST_NOISE = 0.1
# The same of an output, of 25 dB, where the grid that a kernel demands may be why.
COARSE_NOISE = 10.0**-2.5
# Bits of eight that a member of a group with one scale may lose; of wider grids more, as the same
# number is left of them.
LOST_BITS = 3.0
# Bits that must be left to a channel of an output.
LEFT_BITS = 3.0
# Outputs of more channels are classes or features, of which some may well be nearly unused.
MOST_KINDS = 32
# Half of all inverses lie below so many steps: they are some 10 % off.
SMALL_STEPS, SMALL_SHARE = 4.0, 0.5
# How many tensors are named for one reason.
NAMED = 3

Found = Mapping[ActivationQuantizer, Mapping[int, SiteRange]]
# A call site of a quantizer.
Site = tuple[ActivationQuantizer, int]


@dataclasses.dataclass(frozen=True)
class Concern:
    """One thing that looks wrong with one tensor; the largest `weight` of a `kind` is the worst.

    `is_wide` says that the tensor has 16 bits already, so that these are no way out.
    """

    kind: str
    tensor: str
    weight: float
    text: str
    is_wide: bool = False


def concerns(graph: Graph, observer: Observer, found: Found) -> list[Concern]:
    """All that looks wrong, the worst of each kind first."""
    names = ValueNames(graph)
    every: list[Concern] = []
    if observer.samples < FEW_SAMPLES:
        count = "1 sample is" if observer.samples == 1 else f"{observer.samples} samples are"
        text = f"{count} few: ranges may miss what others hold"
        every.append(Concern("samples", "", 1.0, text))
    for (quantizer, site), record in observer.records.items():
        reached = any(one.high > one.low for one in found[quantizer].values())
        if (quantizer, site) not in names.calls and reached:
            # Within a recurrence: what a mask puts in place of an output is zero, and no guess.
            if record.whole().is_zero():
                continue
        if record.whole().is_zero() and names.is_zero_by_itself(quantizer, site):
            continue
        if names.is_input(quantizer, site) and record.least == record.greatest:
            name = names.of(quantizer, site)
            value = f"{record.least:.3g}" if record.least else "zero"
            text = f"'{name}' was {value} in all samples"
            every.append(Concern("zero", name, 1.0, text))
            continue
        of_site = _of_site(record, found[quantizer][site], names.of(quantizer, site))
        every += [
            c
            for c in of_site
            if c.kind == "clipped" or (quantizer, site) not in names.means_taken_off
        ]
        if names.holds_inverses(quantizer, site):
            every += _small_inverses(record, found[quantizer][site], names.of(quantizer, site))
    for quantizer, ranges in found.items():
        every += _unlike_members(graph, quantizer, ranges, names)
    every += _drowned(graph, found, names)
    every += [
        _cut_by_given(names.of(quantizer, site), quantizer, cut)
        for (quantizer, site), cut in observer.cut.items()
        if cut.beyond
    ]
    return sorted(every, key=lambda concern: -concern.weight)


def as_text(model_name: str, found: Sequence[Concern]) -> str:
    """One message of all concerns."""
    lines = []
    for kind, advice in _ADVICE.items():
        for is_wide in (False, True):
            some = [c for c in found if c.kind == kind and c.is_wide is is_wide]
            if not some:
                continue
            more = f" (and {len(some) - NAMED} more)" if len(some) > NAMED else ""
            ways = f"{advice}." if is_wide or kind not in _WIDER else f"{advice}{_WIDER[kind]}."
            lines.append("; ".join(concern.text for concern in some[:NAMED]) + f"{more}. {ways}")
    return f"Calibration of '{model_name}': " + " ".join(lines)


_ADVICE = {
    "samples": "Give some hundred, mixed",
    "halves": "Give more samples, of all kinds that the device will meet",
    "zero": "Its range is a guess; give data that reach it",
    "clipped": "Choose another range for it: "
    "kqat.QuantizeConfig(activation_range=kqat.MinMax()) covers all",
    "unlike": "kqat.adapt(model, calibration_data=…) makes separate outputs, or scales the members "
    "alike before they meet",
    "chosen": "Scale them alike before they meet",
    "drowned": "Scale them alike before they are added",
    "channels": "If it matters, train on targets of like size, or let a layer and an output of its "
    "own make each kind of value",
    "inverse": "Divide both by the number of steps first, so that divisors are of like size",
    "coarse": "Give the layer that makes it 'int16x8', with a grid of 1/32768; or let the model "
    "end before it, with the logits, where it is an output",
    "refused": "Scale it before, or train what is dead there",
    "lost": "kqat.diagnose(model, qat, data) shows which roundings cost it and tries what helps; "
    "training may win it back",
}
# What helps besides where a tensor has 8 bits.
_WIDER = {
    "unlike": "; or give that layer 'int16x8'",
    "chosen": ", or give that layer 'int16x8'",
    "drowned": ", or give that layer 'int16x8'",
    "channels": "; or give that layer 'int16x8'",
    "inverse": ", or give that layer 'int16x8'",
}


def lost_output(name: str, noise: float, first: str) -> Concern:
    """An output of which rounding left little.

    Args:
        name: of the output.
        noise: power of the errors over that of the values, on samples of calibration.
        first: the first value that lost so much.
    """
    left, least = (-10.0 * math.log10(power) for power in (noise, LARGEST_NOISE))
    place = f"; '{first}' is the first value below {least:.0f} dB" if first else ""
    text = f"output '{name}' has an SQNR of {decimal(left)} dB{place}"
    return Concern("lost", name, noise, text)


def coarse_kernels(
    graph: Graph, observer: Observer, noise: Mapping[Ref, float]
) -> Iterator[Concern]:
    """Values too small for the grid that a kernel demands, as of rare classes behind sigmoid.

    Args:
        graph: of the QAT model.
        observer: has seen the calibration data.
        noise: of the outputs, power of the errors of rounding over that of the values.
    """
    names = ValueNames(graph)
    sites = {
        node: cut
        for (quantizer, site), cut in observer.cut.items()
        if quantizer.spec.bits == 8 and (node := names.calls.get((quantizer, site))) is not None
        if _demands_grid(names.producers.get(node.inputs[0]))
    }
    for ref, lost in noise.items():
        before = graph.computing([ref]) if lost > COARSE_NOISE else ()
        for node in [node for node in sites if node in before]:
            cut = sites.pop(node)
            if cut.noise < 0.5 * lost:
                continue
            name = names.of(node.layer, node.kwargs.get("site", 0))
            step = 1.0 / float(node.layer.scale())
            size = math.sqrt(cut.power / cut.total)
            text = (
                f"'{name}' is {size:.2g} (root mean square), on which the grid of 1/{step:.0f} "
                "that its kernel demands leaves an SQNR of "
                f"{decimal(-10.0 * math.log10(cut.noise))} dB"
            )
            yield Concern("coarse", name, cut.noise, text)


def unlike_channels(
    graph: Graph, values: Mapping[Ref, np.ndarray], ranges: Found
) -> Iterator[Concern]:
    """Outputs of one kernel whose channels are of unlike size, as of boxes in pixels and scores.

    Channels that never change are left out, as are those of a ReLU, of which some are always
    nearly dead, and outputs of many channels.

    Args:
        graph: of the QAT model.
        values: of the last roundings before the outputs, where nothing is rounded.
        ranges: that were found.
    """
    names = ValueNames(graph)
    for ref in graph.outputs:
        source = names.source_of(ref)
        node = None if source is None else names.calls.get(source)
        if source is None or node is None or source[0].clamp is not None:
            continue
        maker, made = names.producers.get(node.inputs[0]), values.get(node.outputs[0])
        if maker is None or not isinstance(maker.layer, QuantizeWrapper):
            continue
        if source[0] not in ranges or made is None or made.shape[-1] > MOST_KINDS:
            continue
        channels = made.reshape(-1, made.shape[-1])
        if len(channels) < FEW_SAMPLES:
            continue
        widths = channels.max(axis=0) - channels.min(axis=0)
        widest, bits = float(widths.max()), source[0].spec.bits
        small = np.flatnonzero((widths > 0.0) & (widths * 2.0 ** (bits - LEFT_BITS) < widest))
        if not len(small):
            continue
        name, worst = names.of(*source), small[np.argmin(widths[small])]
        lost = math.log2(widest / widths[worst])
        text = (
            f"'{name}' has one scale for channels of unlike size: channel {worst} spans "
            f"{widths[worst]:.4g} of {widest:.4g} and loses {_lost_of(lost, bits)}"
        )
        yield Concern("channels", name, lost, text, bits == 16)


def refused_scales(graph: Graph) -> Iterator[Concern]:
    """Values of scales that a kernel which reads them does not take; no file would be right.

    Args:
        graph: of a calibrated QAT model.
    """
    names = ValueNames(graph)
    told: set[Site] = set()
    for node in graph.nodes:
        facts = getattr(node.layer, "facts", None) or stock_facts(node.layer)
        for source in map(names.source_of, node.inputs):
            if source is None or source in told or facts is None:
                continue
            scale, name = float(source[0].scale_now()), names.of(*source)
            for kernel in facts.ops:
                least, below = input_scales(kernel, source[0].spec.bits)
                if least < scale < below:
                    continue
                told.add(source)
                which = f"above {least:.3g}" if scale <= least else f"below {below:.3g}"
                text = (
                    f"'{name}' has a scale of {scale:.3g}, and {kernel}, which reads it, takes "
                    f"those {which}: no such file is made"
                )
                yield Concern("refused", name, max(least / scale, scale / below), text)
                break


def _demands_grid(maker: Node | None) -> bool:
    """Whether the kernel that makes a value has one grid for whatever it makes."""
    facts = None if maker is None else stock_facts(maker.layer)
    return facts is not None and facts.output is Output.FIXED


def _of_site(record: SiteRecord, found: SiteRange, name: str) -> Iterator[Concern]:
    seen = record.whole()
    if seen.is_zero():
        yield Concern("zero", name, 1.0, f"'{name}' was zero in all samples")
        return
    apart, halves = _halves_apart(record)
    if apart > UNLIKE_HALVES:
        where = f"in one half of the samples ({halves})"
        text = f"'{name}' spreads {apart:.1f} times as far {where} as in the other"
        if math.isinf(apart):
            text = f"'{name}' is constant {where}"
        yield Concern("halves", name, apart, text)
    yield from _clipped(record, seen, found, name)


def _halves_apart(record: SiteRecord) -> tuple[float, str]:
    """How many times as wide one half of the data is, and which halves those are."""
    ratios = []
    if record.odd.total:
        widths = [half.high - half.low for half in (record.even, record.odd)]
        ratios.append((_ratio(*widths), "every other one"))
    extremes = record.extremes
    if len(extremes) > 1:
        middle = len(extremes) // 2
        first, second = (
            max(h for _, h in part) - min(low for low, _ in part)
            for part in (extremes[:middle], extremes[middle:])
        )
        ratios.append((_ratio(first, second), "the first or the last"))
    return max(ratios, default=(1.0, ""))


def _ratio(a: float, b: float) -> float:
    least, most = min(a, b), max(a, b)
    return most / least if least > 0.0 else (1.0 if most == 0.0 else math.inf)


def _clipped(record: SiteRecord, seen: Histogram, found: SiteRange, name: str) -> Iterator[Concern]:
    spec = record.quantizer.spec
    low, high = found.low, found.high
    step = (high - low) / (spec.qmax - spec.qmin)
    lower, upper = seen.tail(upper=False), seen.tail(upper=True)
    lost = float(lower.squares_beyond(np.array(-low)) + upper.squares_beyond(np.array(high)))
    rounding = float(lower.count[0] + upper.count[0]) * step**2 / 12.0
    # Room for masked scores is no value that was cut.
    cut = max(seen.high - high, min(low, 0.0) - seen.low)
    if cut > CUT_STEPS * step and lost > CLIPPING_OVER_ROUNDING * rounding:
        count = float(lower.count_beyond(np.array(-low)) + upper.count_beyond(np.array(high)))
        share = 100.0 * count / max(seen.total, 1)
        text = (
            f"'{name}' is clipped to [{low:.4g}, {high:.4g}]: {share:.2g} % of its values lie "
            f"outside, as far as [{seen.low:.4g}, {seen.high:.4g}]"
        )
        yield Concern("clipped", name, lost / max(rounding, 1e-300), text)


def _small_inverses(record: SiteRecord, found: SiteRange, name: str) -> Iterator[Concern]:
    """Inverses of divisors of unlike size, most of which are few steps of their grid."""
    seen, spec = record.whole(), record.quantizer.spec
    few = SMALL_STEPS * (found.high - found.low) / (spec.qmax - spec.qmin)
    large = sum(float(seen.tail(upper=side).count_beyond(np.array(few))) for side in (True, False))
    some = seen.total - seen.zeros
    share = 1.0 - large / max(some, 1)
    if some and share > SMALL_SHARE:
        most = max(found.high, -found.low)
        text = (
            f"'{name}' holds inverses up to {most:.4g} on one grid, of which "
            f"{100.0 * share:.0f} % are below {SMALL_STEPS:.0f} of its steps: quotients of large "
            "divisors are lost"
        )
        yield Concern("inverse", name, share, text, spec.bits == 16)


def _cut_by_given(name: str, quantizer: ActivationQuantizer, cut: Cut) -> Concern:
    method = quantizer.range_method
    assert isinstance(method, Fixed)
    text = (
        f"'{name}' is clipped to [{method.low:.4g}, {method.high:.4g}], which is given: "
        f"{100.0 * cut.beyond / cut.total:.2g} % of its values lie outside, as far as "
        f"[{cut.low:.4g}, {cut.high:.4g}]"
    )
    return Concern("clipped", name, 1.0 + cut.beyond / cut.total, text)


def _unlike_members(
    graph: Graph,
    quantizer: ActivationQuantizer,
    ranges: Mapping[int, SiteRange],
    names: "ValueNames",
) -> Iterator[Concern]:
    """Members of a group with one scale that are far narrower than it."""
    if len(ranges) < 2:
        return
    whole = max(r.high for r in ranges.values()) - min(r.low for r in ranges.values())
    losses = {
        site: math.log2(whole / (r.high - r.low))
        for site, r in ranges.items()
        if r.high - r.low > 0.0
    }
    most = LOST_BITS + max(quantizer.spec.bits - 8, 0)
    if not losses or max(losses.values()) < most:
        return
    site = max(losses, key=lambda one: losses[one])
    lost = losses[site]
    meetings, meeting = names.meetings_of(quantizer), names.meeting_of(quantizer)
    # What is chosen from, as by a maximum, cannot be parted into outputs.
    is_parted = any(isinstance(node.layer, layers.Concatenate) for node in meetings)
    kind = "unlike" if is_parted or not meetings else "chosen"
    text = (
        f"'{meeting}' has one scale for values of unlike size: '{names.of(quantizer, site)}' spans "
        f"{ranges[site].high - ranges[site].low:.4g} of {whole:.4g} and loses "
        f"{_lost_of(lost, quantizer.spec.bits)}"
    )
    yield Concern(kind, meeting, lost, text, quantizer.spec.bits == 16)


def _lost_of(lost: float, bits: int) -> str:
    return f"{lost:.1f} of its {bits} bits" if lost < bits else f"all of its {bits} bits"


def _drowned(graph: Graph, found: Found, names: "ValueNames") -> Iterator[Concern]:
    """Sums of which one addend is less than two steps of the result."""
    readers = graph.consumers()
    for node in graph.nodes:
        if not _adds(node.layer):
            continue
        result = next(
            (r for r in readers[node.outputs[0]] if isinstance(r.layer, ActivationQuantizer)), None
        )
        if result is None or result.layer not in found:
            continue
        whole = _width(found[result.layer], None)
        for ref in node.inputs:
            source = names.source_of(ref)
            if source is None or source in names.means_taken_off:
                continue
            width = _width_of(*source, found)
            bits = result.layer.spec.bits
            if 0.0 < width and whole > width * 2.0 ** (bits - 1):
                name, addend = names.output_name(node), names.of(*source)
                lost = math.log2(whole / width)
                text = (
                    f"'{name}' adds values of unlike size: '{addend}' spans {width:.4g} of "
                    f"{whole:.4g} and loses {_lost_of(lost, bits)}"
                )
                yield Concern("drowned", name, lost, text, bits == 16)


def _adds(layer: Any) -> bool:
    """Whether a layer adds: values, or a constant to them."""
    layer = layer.layer if isinstance(layer, QuantizeWrapper) else layer
    if isinstance(layer, WithConstant):
        return layer.kind is ConstantKind.ADD
    return isinstance(layer, layers.Add | layers.Subtract)


def _width_of(quantizer: ActivationQuantizer, site: int, found: Found) -> float:
    if isinstance(quantizer.range_method, Fixed):
        low, high = quantizer.fixed_range()
        return float(high) - float(low)
    return _width(found[quantizer], site) if quantizer in found else 0.0


def _width(ranges: Mapping[int, SiteRange], site: int | None) -> float:
    some = list(ranges.values()) if site is None else [ranges[site]] if site in ranges else []
    return max((r.high for r in some), default=0.0) - min((r.low for r in some), default=0.0)


class ValueNames:
    """What the user calls the values of a QAT model's graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.readers = graph.consumers()
        self.calls: dict[tuple[ActivationQuantizer, int], Node] = {}
        for node in graph.nodes:
            if isinstance(node.layer, ActivationQuantizer) and node.kwargs.get("observe", True):
                self.calls.setdefault((node.layer, node.kwargs.get("site", 0)), node)

    @functools.cached_property
    def means_taken_off(self) -> frozenset[Site]:
        """Means that are subtracted from the very values that they are of, as normalization does.

        They may be as small as the errors of rounding, and nothing is lost with one that is.
        """
        found = set()
        for node in self.graph.nodes:
            if not isinstance(node.layer, layers.Subtract) or len(node.inputs) != 2:
                continue
            whole, mean = (self.source_of(ref) for ref in node.inputs)
            call = None if whole is None or mean is None else self.calls.get(mean)
            maker = None if call is None else self.producers.get(call.inputs[0])
            if maker is None or mean is None or not isinstance(maker.layer, Reduce):
                continue
            is_mean = maker.layer.kind is ReduceKind.MEAN
            if is_mean and self.source_of(maker.inputs[0]) == whole:
                found.add(mean)
        return frozenset(found)

    def of(self, quantizer: ActivationQuantizer, site: int) -> str:
        """The name of the value that a call site rounds."""
        node = self.calls.get((quantizer, site))
        if quantizer.sites == 1 or node is None:
            return quantizer.label
        maker = self.producers.get(node.inputs[0])
        while maker is not None and isinstance(maker.layer, ActivationQuantizer):
            maker = self.producers.get(maker.inputs[0])
        if maker is None:
            return quantizer.label
        return self.output_name(maker)

    def is_input(self, quantizer: ActivationQuantizer, site: int) -> bool:
        """Whether a call site rounds an input of the model."""
        node = self.calls.get((quantizer, site))
        return node is not None and node.inputs[0] in self.graph.inputs

    def holds_inverses(self, quantizer: ActivationQuantizer, site: int) -> bool:
        """Whether a value is the inverse of another."""
        node = self.calls.get((quantizer, site))
        maker = None if node is None else self.producers.get(node.inputs[0])
        layer: Any = None if maker is None else maker.layer
        return isinstance(layer, Elementwise) and inverts([layer])

    def is_zero_by_itself(self, quantizer: ActivationQuantizer, site: int) -> bool:
        """Whether no data make a value anything else: a constant, or a value less itself."""
        node = self.calls.get((quantizer, site))
        maker = None if node is None else self.producers.get(node.inputs[0])
        while maker is not None and not maker.has_weights and len(maker.inputs) == 1:
            maker = self.producers.get(maker.inputs[0])
        if maker is None:
            return False
        layer = maker.layer.layer if isinstance(maker.layer, QuantizeWrapper) else maker.layer
        less_itself = isinstance(layer, layers.Subtract) and len(set(maker.inputs)) == 1
        return less_itself or isinstance(layer, Learned)

    def output_name(self, node: Node) -> str:
        """The name of what a node makes: the model's own where it is an output."""
        if isinstance(node.layer, QuantizeWrapper):
            return str(node.layer.layer.name)
        ref = node.outputs[0]
        for _ in range(4):  # a rounding, an Identity that bears the name
            if ref in self.graph.outputs:
                return self.graph.output_names[self.graph.outputs.index(ref)]
            some = self.readers[ref]
            if len(some) != 1 or not isinstance(
                some[0].layer, ActivationQuantizer | layers.Identity
            ):
                break
            ref = some[0].outputs[0]
        return node.name

    def source_of(self, ref: Ref) -> tuple[ActivationQuantizer, int] | None:
        """The call site that rounded a value, through what moves values only."""
        while (node := self.producers.get(ref)) is not None:
            if isinstance(node.layer, ActivationQuantizer):
                if node.kwargs.get("observe", True):
                    return node.layer, node.kwargs.get("site", 0)
            elif node.has_weights or len(node.inputs) != 1:
                return None
            ref = node.inputs[0]
        return None

    def meetings_of(self, quantizer: ActivationQuantizer) -> list[Node]:
        """The nodes in which members of a group meet, and make no truth values."""
        return [
            node
            for node in self.graph.nodes
            if not node.outputs[0].holds_indexes
            and len({s for s in map(self.source_of, node.inputs) if s and s[0] is quantizer}) > 1
        ]

    def meeting_of(self, quantizer: ActivationQuantizer) -> str:
        """The name of the value in which the members of a group first meet."""
        meetings = self.meetings_of(quantizer)
        return self.output_name(meetings[0]) if meetings else quantizer.label
