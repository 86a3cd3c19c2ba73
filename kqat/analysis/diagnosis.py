"""`diagnose`: which layers of a QAT model lose how much, why, and what helps, as measured."""

import dataclasses
import os
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kqat.analysis.causes import Cause, Finding, causes_of_values, causes_of_weights, input_scales
from kqat.analysis.grid_use import (
    OUTPUT,
    VALUES,
    RoundedTensor,
    positions,
    role_of,
    rounded_tensors,
)
from kqat.analysis.remedies import HELPS_DB, Remedy, advice_against, key_of, tried
from kqat.analysis.replay import Replay, as_array, as_built, decibels, noise
from kqat.base import CalibrationError, ModelError, decimal, json_text, write_file
from kqat.graph import Graph, Node, Ref, trace
from kqat.training import (
    ActivationQuantizer,
    QuantizedRecurrence,
    QuantizeWrapper,
    ValueNames,
    as_tensors,
    batches,
    beyond_calibration,
    check_finite,
    check_quantized,
    check_unquantized,
    of_fixed_shape,
    uncorrected,
)

# No more samples than this are measured, and as many are given to the remedies.
SAMPLES = 128
# So many of the samples are compared with what calibration saw.
_SEEN = 1024
# What is rounded, in reports, if it is no value.
WEIGHTS, WHOLE = "weights", "recurrence"
# The columns of a terminal.
_WIDTH = 80
# The worst roundings that the text lists.
_LISTED = 10
# Of less noise than this, all of it taken away gains less than what counts as help.
LEAST_SHARE = 1.0 - 10.0 ** (-HELPS_DB / 10.0)
# Two numbers that lie closer are alike, in dB.
_ALIKE_DB = 1.0


@dataclasses.dataclass(frozen=True)
class LayerLoss:
    """What one rounding costs.

    Attributes:
        name: of the layer that has the weights, or of the value: as in the report of
            `tflite_export.verify` and in `kqat.plot_quantization`.
        what: `"weights"` (and bias), `"input"`, `"output"` or `"values"` inside the model, or
            `"recurrence"` for all inside of one.
        bits: of the grid; of several weights the fewest.
        isolated_db: SQNR of the model's outputs where nothing else is rounded.
        cumulative_db: SQNR here, where everything up to here is rounded.
        share: of the sum of all isolated noises, 0..1; 0 for the grid of an output that is made
            behind the place where noises are taken (see `Diagnosis`): its `isolated_db` is taken
            at the output itself.
        clipped: share of the values, before any rounding, that lie outside the grid on the data
            given, 0..1.
    """

    name: str
    what: str
    bits: int
    isolated_db: float
    cumulative_db: float
    share: float
    clipped: float


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Where a QAT model loses, why, and what helps. `print` shows it.

    SQNR is that of the model's outputs, or, except for `float_db`, of what a closing softmax (or
    another function of a given range) reads, in dB: the mean over all outputs.

    Attributes:
        model_name: of the QAT model.
        samples: how many were measured.
        float_db: SQNR of the QAT model's outputs against those of the float model.
        total_db: SQNR of the QAT model against itself without rounding.
        sum_db: SQNR if the noises of `layers`, each alone, just added up.
        trained_db: SQNR of the QAT model without rounding against the float model: what training,
            or an algorithm, changed.
        measured_at: what `total_db`, `sum_db` and `layers` are measured at, by name, where that
            is not the outputs themselves.
        agreement: share of samples for which both have the same largest output, for outputs that
            look like classes; `None` otherwise.
        layers: every rounding, in the order of the network.
        findings: the causes, those that cost the outputs most first.
        remedies: what was tried, the best first.
        notes: what to know before the numbers are believed.
    """

    model_name: str
    samples: int
    float_db: float
    total_db: float
    sum_db: float
    trained_db: float
    measured_at: tuple[str, ...]
    agreement: float | None
    layers: tuple[LayerLoss, ...]
    findings: tuple[Finding, ...]
    remedies: tuple[Remedy, ...]
    notes: tuple[str, ...]

    def worst(self, count: int = _LISTED) -> list[LayerLoss]:
        """The roundings that cost the outputs most."""
        inside = [row for row in self.layers if not _is_behind(row)]
        return sorted(inside, key=lambda layer: layer.isolated_db)[:count]

    def headline(self) -> list[tuple[str, str]]:
        """The SQNRs of the whole: each in dB, and what it is."""
        agree = "" if self.agreement is None else f"; same class for {100 * self.agreement:.1f} %"
        there = f", at {_quoted(self.measured_at)}" if self.measured_at else ""
        return [
            (f"{decimal(self.float_db)} dB", f"the outputs, against the float model{agree}"),
            (f"{decimal(self.total_db)} dB", f"against the same weights unrounded{there}"),
            (
                f"{decimal(self.sum_db)} dB",
                "if the roundings below, each measured alone, just add up",
            ),
        ]

    def explanation(self) -> str:
        """Why the numbers of the headline are not the same."""
        words = []
        if self.measured_at:
            words.append(
                f"The first is of the outputs; the others are taken at {_quoted(self.measured_at)},"
                " before the function that closes the model, where differences show better: the "
                "output's own grid is in the first alone."
            )
        if self.trained_db < self.float_db + 10.0:
            words.append(
                f"The first also holds what training changed, {decimal(self.trained_db)} dB alone."
            )
        gap = self.total_db - self.sum_db
        if abs(gap) < _ALIKE_DB:
            words.append("The last two agree: the errors of the roundings just add up.")
        elif gap > 0.0:
            words.append(
                "The second is above the sum: together errors cancel in part, also because "
                "calibration corrects the biases for all of them at once."
            )
        else:
            words.append(
                "The second is below the sum: errors of one layer make those of later ones worse, "
                "as where they push values out of a range."
            )
        return " ".join(words)

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json_text(dataclasses.asdict(self), indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to `path`, whole or not at all."""
        write_file(path, self.to_json().encode())

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report to `path` as one HTML page."""
        from kqat.analysis.diagnosis_page import render

        write_file(path, render(self).encode())

    def __str__(self) -> str:
        return self.text()

    def text(self, files: Mapping[str, str] | None = None) -> str:
        """All of it in lines of 80 characters.

        Args:
            files: what `MODEL`, `QAT` and `DATA` are called, to print what helps as commands of a
                shell; by default it is printed as Python code.
        """
        lines = [f"diagnosis of {self.model_name} on {self.samples} samples, as SQNR in dB"]
        lines += [f"{number:>10}  {words}" for number, words in self.headline()]
        lines += _filled(self.explanation(), "")
        for note in self.notes:
            lines += _filled(f"note: {note}", "")
        lines += ["", *self._table(), "", *self._why(), *self._tried(files)]
        return "\n".join(lines)

    def _table(self) -> Iterator[str]:
        yield "isolated: nothing else is rounded; cumulative: here, all up to here is rounded;"
        yield "clipped: values outside of the range, on these data"
        yield (
            f"{'layer':<27} {'what':<10} {'bits':>4} {'isolated':>9} {'cumulative':>11} "
            f"{'share':>6} {'clipped':>7}"
        )
        for row in [*self.worst(), *filter(_is_behind, self.layers)]:
            share = "-" if _is_behind(row) else f"{100 * row.share:.0f} %"
            clip = "-" if row.what in (WEIGHTS, WHOLE) else _percent(row.clipped)
            yield (
                f"{_cut(row.name, 27):<27} {row.what:<10} {row.bits:>4} "
                f"{decimal(row.isolated_db):>6} dB {decimal(row.cumulative_db):>8} dB "
                f"{share:>6} {clip:>7}"
            )

    def _why(self) -> Iterator[str]:
        yield "why" if self.findings else "why: no single cause stands out"
        for finding in self.findings:
            of = "weights of " if finding.of_weights else ""
            yield from _filled(f"- {finding.cause}: {of}'{finding.layer}': {finding.text}.", "  ")
            if self.remedies:
                yield from _filled(f"  {self.verdict_on(finding)}", "  ")

    def verdict_on(self, finding: Finding) -> str:
        """Whether something that was tried against a cause helps, and how much."""
        for remedy in self.remedies:
            if finding.advice and remedy.code == finding.advice:
                return (
                    f"Helps: {remedy.name} ({decimal(remedy.own_db, signed=True)} dB), see below."
                )
        share = share_of(finding.cause, self.layers, self.findings)
        if share is not None and share < LEAST_SHARE:
            return (
                f"That is {_percent(share)} of the noise, so that what helps against it hardly "
                "shows: mend what costs more, then diagnose again."
            )
        aimed = [r for r in self.remedies if key_of(finding) in r.against]
        if not aimed:
            return "There is nothing to try for it."
        return "Nothing that was tried for it helps, see below."

    def _tried(self, files: Mapping[str, str] | None) -> Iterator[str]:
        if not self.remedies:
            return
        yield ""
        words = "tried, without training, on samples apart from those measured"
        if files is None:
            words += "; in the code, model, qat and data are what diagnose was given"
        yield from _filled(words, "")
        for remedy in self.remedies:
            yield from _filled(f"- {remedy.name} {remedy.verdict()}", "  ")
            if remedy.helps and files is not None and remedy.command:
                for one in _commands(remedy.command):
                    yield from _command_lines([files.get(word, word) for word in one])
            elif remedy.helps:
                if files is not None:
                    yield "in Python, with the loaded files as model, qat and data:"
                yield from remedy.code.splitlines()


def diagnose(
    float_model: keras.Model, qat: keras.Model, data: Any, *, remedies: bool = True
) -> Diagnosis:
    """Where a QAT model loses against its float model, why, and what of kqat's methods helps.

    Every rounding is tried alone, with nothing else rounded, and in its place, with all before it
    rounded. Neither model is changed.

    Args:
        float_model: what `qat` was made of.
        qat: a calibrated QAT model, trained or not.
        data: inputs as the device sees them, as for `kqat.calibrate`, but held out: not those that
            `qat` was calibrated on. Ranges fit the calibration data, so on these a fault of
            calibration cannot show; a note says so where the data look like them. Every other
            sample is measured, at most 128; the rest is for the methods that are tried.
        remedies: whether remedies are tried: each of kqat's algorithms and calibration methods, and
            policies with other presets or ranges for what the causes name. Each is run as the code
            that the report prints, on the model as it is, without training.

    Raises:
        ModelError: if `qat` is no QAT model or `float_model` is one, or outputs differ in shape.
        CalibrationError: if data do not fit, are fewer than two samples, or `qat` has not seen any.
    """
    graph = trace(qat)
    check_quantized(qat, "to diagnose")
    check_finite(qat, ModelError, purpose="to diagnose")
    check_unquantized(float_model)
    float_model = of_fixed_shape(float_model, None, data)
    reference = trace(float_model)
    _check_alike(graph, reference, qat.name, float_model.name)
    _check_calibrated(graph, qat.name)
    every = _all_samples(data, graph)
    arrays = _some(every, 2 * SAMPLES)
    if len(arrays[0]) < 2:
        raise CalibrationError(
            "Expected at least two samples to diagnose on. Received: one. Give some hundred "
            "typical inputs."
        )
    measured = as_tensors([x[::2] for x in arrays], graph)
    replay = Replay(graph, measured)
    rounded = replay.values(replay.all_rounded())
    total = replay.noise_of(rounded)
    rows, findings, added = _layers(replay, rounded, rounded_tensors(qat, graph))
    outputs = replay.outputs(rounded)
    answers = reference.run(measured, lambda node, *args, **kwargs: node.layer(*args, **kwargs))
    wanted = [as_array(y) for y in keras.tree.flatten(answers)]
    gaps = [noise(y, found) for y, found in zip(wanted, outputs, strict=True)]
    notes = tuple(_notes(qat, every))
    found: list[Remedy] = []
    if remedies:
        others = [x[1::2] for x in arrays]
        tuning = keras.tree.pack_sequence_as(qat.input, others)
        found = tried(
            float_model, qat, tuning, replay, findings, total=total, fitted=bool(notes)
        )  # fmt: skip
        findings = _advised(findings, rows, found)
    unrounded = [as_array(replay.exact[ref]) for ref in graph.outputs]
    moved = [noise(y, found) for y, found in zip(wanted, unrounded, strict=True)]
    return Diagnosis(
        model_name=qat.name,
        samples=len(arrays[0][::2]),
        float_db=decibels(sum(gaps) / len(gaps)),
        total_db=decibels(total),
        sum_db=decibels(added),
        trained_db=decibels(sum(moved) / len(moved)),
        measured_at=_measured_at(graph, replay.ends),
        agreement=_agreement(wanted, outputs),
        layers=tuple(rows),
        findings=tuple(findings),
        remedies=tuple(found),
        notes=notes,
    )


def _all_samples(data: Any, graph: Graph) -> list[np.ndarray]:
    """All samples as one array per input; a generator can be read only once."""
    found = [batch for batch in batches(data, graph) if len(batch[0])]
    if not found:
        raise CalibrationError(
            f"Expected at least two samples to diagnose on, for the inputs "
            f"{list(graph.input_keys)}. Received: none."
        )
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _some(arrays: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    """At most so many samples, evenly spread."""
    count = len(arrays[0])
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    return [x[chosen] for x in arrays]


def _notes(qat: keras.Model, every: list[np.ndarray]) -> Iterator[str]:
    some = _some(every, _SEEN)
    beyond, known = beyond_calibration(qat, keras.tree.pack_sequence_as(qat.input, some))
    if known and not beyond:
        yield (
            f"no value of these {len(some[0])} samples reaches beyond what calibration saw, in "
            f"any of {known} tensors. If they are the calibration data, or a part of them, ranges "
            "and corrected biases fit them, and a fault of calibration cannot show here: give "
            "samples as the device sees them that calibration did not see."
        )


def _measured_at(graph: Graph, ends: Sequence[Ref]) -> tuple[str, ...]:
    """What reports call the ends; none where they are the outputs, but for a name."""
    names, producers = ValueNames(graph), graph.producers()
    shown = set(ends)
    for ref in graph.outputs:
        while ref not in shown:
            maker = producers.get(ref)
            if maker is None or not isinstance(maker.layer, keras.layers.Identity):
                return tuple(_name_of(end, names) for end in ends)
            ref = maker.inputs[0]
    return ()


def _check_alike(graph: Graph, reference: Graph, name: str, float_name: str) -> None:
    ours, theirs = (
        [ref.shape[1:] for ref in (*one.inputs, *one.outputs)] for one in (graph, reference)
    )
    if ours != theirs:
        raise ModelError(
            f"Expected the float model that '{name}' was made of, with inputs and outputs of "
            f"shapes {ours}. Received: '{float_name}' with {theirs}."
        )


def _check_calibrated(graph: Graph, name: str) -> None:
    for node in graph.nodes:
        if isinstance(node.layer, ActivationQuantizer) and not node.layer.is_calibrated():
            raise CalibrationError(
                f"Expected a calibrated model to diagnose. Received: '{name}', of which "
                f"'{node.layer.name}' has no range. Use kqat.calibrate, or train."
            )


def _agreement(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float | None:
    if len(wanted) != 1 or wanted[0].ndim != 2 or wanted[0].shape[-1] < 2:
        return None
    return float(np.mean(wanted[0].argmax(-1) == found[0].argmax(-1)))


def _layers(
    replay: Replay, rounded: dict[Ref, Any], tensors: Sequence[RoundedTensor]
) -> tuple[list[LayerLoss], list[Finding], float]:
    """Every rounding, the causes, what costs most first, and the sum of the noises."""
    graph = replay.graph
    names, scales = ValueNames(graph), input_scales(graph)
    of_site = {(id(t.quantizer), t.site): t for t in tensors if t.quantizer is not None}
    before = graph.computing(replay.ends)
    rows: list[tuple[LayerLoss, float]] = []
    findings: list[tuple[float, Finding]] = []
    for node in replay.rounding_nodes():
        layer = node.layer
        if isinstance(layer, QuantizeWrapper) and not layer.computes_with_grids:
            continue
        here = max(noise(replay.exact[ref], rounded[ref]) for ref in node.outputs)
        share = alone = _alone(replay, node)
        if node not in before:
            share, alone = 0.0, _alone_at_outputs(replay, node)
        name, what, bits = _title(node, names, graph)
        clipped = 0.0
        if isinstance(layer, ActivationQuantizer):
            tensor = of_site.get((id(layer), node.kwargs.get("site", 0)))
            if tensor is not None and node.kwargs.get("observe", True):
                clipped = _clipped(tensor, replay.exact[node.inputs[0]])
        rows.append(
            (LayerLoss(name, what, bits, decibels(alone), decibels(here), share, clipped), share)
        )
        if isinstance(layer, ActivationQuantizer):
            causes = causes_of_values(node, replay.exact[node.inputs[0]], names)
        elif isinstance(layer, QuantizeWrapper):
            scale = scales.get(node.inputs[0], 0.0)
            causes = causes_of_weights(node, scale, decibels(alone))
        else:
            continue
        findings += [(alone, finding) for finding in causes]
    added = sum(share for _, share in rows)
    losses = [dataclasses.replace(row, share=share / (added or 1.0)) for row, share in rows]
    return losses, [f for _, f in sorted(findings, key=lambda pair: -pair[0])], added


def _alone(replay: Replay, node: Node) -> float:
    """The noise of one rounding, without what corrects the means that the others moved."""
    with uncorrected([node.layer] if isinstance(node.layer, QuantizeWrapper) else []):
        return replay.noise(as_built([node]))


def _alone_at_outputs(replay: Replay, node: Node) -> float:
    """The noise at the model's outputs of a rounding behind the ends."""
    values = replay.values(as_built([node]))
    refs = [ref for ref in replay.graph.outputs if not ref.holds_indexes]
    return sum(noise(replay.exact[ref], values[ref]) for ref in refs) / max(len(refs), 1)


def _clipped(tensor: RoundedTensor, value: Any) -> float:
    """The share of values more than half a step beyond the grid."""
    position, _ = positions(tensor, value)
    spec = tensor.spec
    outside = (position < spec.qmin - 0.5) | (position > spec.qmax + 0.5)
    return float(np.mean(outside)) if position.size else 0.0


def _title(node: Node, names: ValueNames, graph: Graph) -> tuple[str, str, int]:
    layer = node.layer
    if isinstance(layer, ActivationQuantizer):
        name = names.of(layer, node.kwargs.get("site", 0))
        return name, role_of(node, graph), layer.spec.bits
    if isinstance(layer, QuantizedRecurrence):
        return str(layer.label), WHOLE, 8
    bits = min((spec.bits for spec in layer.weight_specs.values()), default=8)
    return str(layer.layer.name), WEIGHTS, bits


def _name_of(ref: Ref, names: ValueNames) -> str:
    """What reports call a value, rounded or not."""
    for reader in names.readers[ref]:
        if isinstance(reader.layer, ActivationQuantizer):
            return names.of(reader.layer, reader.kwargs.get("site", 0))
    maker = names.producers.get(ref)
    if maker is None:
        return "input"
    if isinstance(maker.layer, ActivationQuantizer):
        return names.of(maker.layer, maker.kwargs.get("site", 0))
    return names.output_name(maker)


def _advised(
    findings: Sequence[Finding], rows: Sequence[LayerLoss], remedies: Sequence[Remedy]
) -> list[Finding]:
    """The findings, each with what helps most against it."""
    shares = {f.cause: share_of(f.cause, rows, findings) for f in findings}
    small = {
        key_of(f)
        for f in findings
        if (share := shares[f.cause]) is not None and share < LEAST_SHARE
    }
    # What is for larger causes too gains what it gains by these.
    apart = [remedy for remedy in remedies if small.issuperset(remedy.against)]
    return [
        dataclasses.replace(f, advice=advice_against(f, apart if key_of(f) in small else remedies))
        for f in findings
    ]


def share_of(
    cause: Cause, layers: Sequence[LayerLoss], findings: Sequence[Finding]
) -> float | None:
    """The share of the noise that all roundings with a cause have, 0..1.

    `None` where it is not known, as of an output behind the place where noises are taken.
    """
    named = {(f.layer, f.of_weights) for f in findings if f.cause is cause}
    rows = [row for row in layers if (row.name, row.what == WEIGHTS) in named]
    if not rows or any(map(_is_behind, rows)):
        return None
    return sum(row.share for row in rows)


def _is_behind(row: LayerLoss) -> bool:
    """Whether a row is of the grid of an output behind the place where noises are taken."""
    return row.share == 0.0 and row.what in (OUTPUT, VALUES)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _percent(share: float) -> str:
    return "<0.01 %" if 0.0 < share < 1e-4 else f"{100 * share:.2g} %"


def _commands(words: Sequence[str]) -> list[list[str]]:
    """The commands that `&&` joins."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return found


def _command_lines(words: Sequence[str]) -> list[str]:
    """A command for a shell, in lines that can be pasted; options stand beside their values."""
    lines, parts = [""], list[str]()
    for word in map(shlex.quote, words):
        if parts and parts[-1].startswith("-") and " " not in parts[-1]:
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    for word in parts:
        if lines[-1] and len(lines[-1]) + len(word) + 3 > _WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _filled(words: str, indent: str) -> list[str]:
    """Lines of at most 80 characters; names stay in one piece."""
    return textwrap.wrap(
        words,
        _WIDTH,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _cut(name: str, width: int) -> str:
    tail = (width - 1) // 2
    return name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}"
