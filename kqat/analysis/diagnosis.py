"""`diagnose`: which layers of a QAT model lose how much, why, and what helps, as measured."""

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.analysis.causes import Cause, Finding, causes_of_values, causes_of_weights, input_scales
from kqat.analysis.replay import Replay, as_array, as_built, decibels, noise
from kqat.base import CalibrationError, KqatError, ModelError, write_file
from kqat.graph import Graph, Node, trace
from kqat.grids import INT8_WEIGHTS, INT16_ACTIVATION, MaxAbs, QuantSpec, arithmetic
from kqat.training import (
    ActivationQuantizer,
    QuantizedRecurrence,
    QuantizeWrapper,
    ValueNames,
    algorithms,
    as_tensors,
    calibrate,
    call_with,
    is_quantized,
    of_fixed_shape,
    rounded_as,
    some_samples,
    uncorrected,
)

# No more samples than this are measured, and as many are given to the remedies.
SAMPLES = 128
# A remedy helps where it gains at least this, in dB.
HELPS_DB = 0.5
# What is rounded, in reports.
WEIGHTS, VALUES, WHOLE = "weights", "values", "recurrence"


@dataclasses.dataclass(frozen=True)
class LayerLoss:
    """What one rounding costs.

    Attributes:
        name: of the layer, or of the value.
        what: `"weights"` (and bias), `"values"`, or `"recurrence"` for all inside of one.
        bits: of the grid; of several weights the fewest.
        isolated_db: SQNR of the model's outputs where nothing else is rounded.
        cumulative_db: SQNR here, where everything up to here is rounded.
        share: of the sum of all isolated noises, 0..1.
    """

    name: str
    what: str
    bits: int
    isolated_db: float
    cumulative_db: float
    share: float


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One thing that was tried.

    Attributes:
        name: what was tried.
        sqnr_db: of the outputs with it; `None` where it does not apply.
        gain_db: over the QAT model as it is.
        note: why it does not apply, or how it was tried.
    """

    name: str
    sqnr_db: float | None
    gain_db: float
    note: str

    @property
    def helps(self) -> bool:
        """Whether it gains `HELPS_DB` at least."""
        return self.sqnr_db is not None and self.gain_db >= HELPS_DB


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Where a QAT model loses, why, and what helps. `print` shows it.

    SQNR is that of the model's outputs, or of what a closing softmax reads, in dB: the mean over
    all outputs.

    Attributes:
        model_name: of the QAT model.
        samples: how many were measured.
        total_db: SQNR of the QAT model against itself without rounding.
        float_db: SQNR of the QAT model's outputs against those of the float model.
        agreement: share of samples for which both have the same largest output, for outputs that
            look like classes; `None` otherwise.
        layers: every rounding, in the order of the network.
        findings: the causes, those that cost the outputs most first.
        remedies: what was tried, the best first.
    """

    model_name: str
    samples: int
    total_db: float
    float_db: float
    agreement: float | None
    layers: tuple[LayerLoss, ...]
    findings: tuple[Finding, ...]
    remedies: tuple[Remedy, ...]

    def worst(self, count: int = 10) -> list[LayerLoss]:
        """The roundings that cost the outputs most."""
        return sorted(self.layers, key=lambda layer: layer.isolated_db)[:count]

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to `path`, whole or not at all."""
        write_file(path, self.to_json().encode())

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report to `path` as one HTML page."""
        from kqat.analysis.diagnosis_page import render

        write_file(path, render(self).encode())

    def __str__(self) -> str:
        agree = "" if self.agreement is None else f"; same class for {100 * self.agreement:.1f} %"
        lines = [
            f"diagnosis of {self.model_name} on {self.samples} samples",
            f"SQNR of the outputs: {self.total_db:.1f} dB against the same weights unrounded, "
            f"{self.float_db:.1f} dB against the float model{agree}",
            "",
            "costs most   isolated: nothing else is rounded; cumulative: all up to here is",
            f"{'layer':<30} {'what':<11} {'bits':>4}  isolated cumulative  share",
        ]
        lines += [
            f"{_cut(row.name, 30):<30} {row.what:<11} {row.bits:>4} {row.isolated_db:>6.1f} dB "
            f"{row.cumulative_db:>7.1f} dB {100 * row.share:>4.0f} %"
            for row in self.worst()
        ]
        lines += ["", "why" if self.findings else "why: no single cause stands out"]
        lines += [
            f"- {f.cause}: '{f.layer}': {f.text}. {_sentence(f.advice)}" for f in self.findings
        ]
        if self.remedies:
            lines += ["", "tried        measured on samples that the method did not see"]
        for remedy in self.remedies:
            if remedy.sqnr_db is None:
                lines.append(f"- {remedy.name}: does not apply. {remedy.note}")
            else:
                verdict = "helps" if remedy.helps else "does not help"
                lines.append(
                    f"- {remedy.name}: {remedy.sqnr_db:.1f} dB ({remedy.gain_db:+.1f}), {verdict}"
                    + (f"; {remedy.note}" if remedy.note else "")
                )
        return "\n".join(lines)


def diagnose(
    float_model: keras.Model, qat: keras.Model, data: Any, *, remedies: bool = True
) -> Diagnosis:
    """Where a QAT model loses against its float model, why, and what of kqat's methods helps.

    Every rounding is tried alone, with nothing else rounded, and in its place, with all before it
    rounded. Neither model is changed.

    Args:
        float_model: what `qat` was made of.
        qat: a calibrated QAT model, trained or not.
        data: typical inputs, as for `kqat.calibrate`. Every other sample is measured, at most 128;
            the rest is for the methods that are tried.
        remedies: whether methods are tried: each of kqat's algorithms, calibration methods, 16 bits
            or a wider range for the values, and 8 bits for the weights, that are named as causes.
            They are tried on the model as it is, without training.

    Raises:
        ModelError: if `qat` is no QAT model, or outputs differ in shape.
        CalibrationError: if data do not fit, are fewer than two samples, or `qat` has not seen any.
    """
    graph = trace(qat)
    if not is_quantized(qat):
        raise ModelError(
            f"Expected a QAT model to diagnose. Received: '{qat.name}', which is float. Use "
            "kqat.quantize_model."
        )
    reference = trace(of_fixed_shape(float_model, None, data))
    _check_alike(graph, reference, qat.name, float_model.name)
    _check_calibrated(graph, qat.name)
    arrays = some_samples(data, graph, 2 * SAMPLES)
    if len(arrays[0]) < 2:
        raise CalibrationError(
            "Expected at least two samples to diagnose on. Received: one. Give some hundred "
            "typical inputs."
        )
    measured = as_tensors([x[::2] for x in arrays], graph)
    replay = Replay(graph, measured)
    rounded = replay.values(replay.all_rounded())
    total = replay.noise_of(rounded)
    rows, findings, costs = _layers(replay, rounded)
    outputs = replay.outputs(rounded)
    answers = reference.run(measured, lambda node, *args, **kwargs: node.layer(*args, **kwargs))
    wanted = [as_array(y) for y in keras.tree.flatten(answers)]
    gaps = [noise(y, found) for y, found in zip(wanted, outputs, strict=True)]
    tried: list[Remedy] = []
    if remedies:
        others = [x[1::2] for x in arrays]
        tuning = keras.tree.pack_sequence_as(qat.input, others)
        tried = list(_remedies(qat, tuning, replay, findings, total))
    return Diagnosis(
        model_name=qat.name,
        samples=len(arrays[0][::2]),
        total_db=decibels(total),
        float_db=decibels(sum(gaps) / len(gaps)),
        agreement=_agreement(wanted, outputs),
        layers=tuple(rows),
        findings=tuple(sorted(findings, key=lambda finding: -costs[id(finding)])),
        remedies=tuple(sorted(tried, key=lambda r: (r.sqnr_db is None, -r.gain_db))),
    )


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
    replay: Replay, rounded: dict[Any, Any]
) -> tuple[list[LayerLoss], list[Finding], dict[int, float]]:
    """Every rounding, the causes, and what each of these costs the outputs, by its identity."""
    names, scales = ValueNames(replay.graph), input_scales(replay.graph)
    found: list[tuple[str, str, int, float, float]] = []
    findings: list[Finding] = []
    costs: dict[int, float] = {}
    for node in replay.rounding_nodes():
        if isinstance(node.layer, QuantizeWrapper) and not node.layer.computes_with_grids:
            continue
        alone = _alone(replay, node)
        here = max(noise(replay.exact[ref], rounded[ref]) for ref in node.outputs)
        found.append((*_title(node, names), alone, here))
        if isinstance(node.layer, ActivationQuantizer):
            causes = causes_of_values(node, replay.exact[node.inputs[0]], names)
        elif isinstance(node.layer, QuantizeWrapper):
            causes = causes_of_weights(node, scales.get(node.inputs[0], 0.0))
        else:
            continue
        for finding in causes:
            findings.append(finding)
            costs[id(finding)] = alone
    whole = sum(alone for *_, alone, _ in found) or 1.0
    rows = [
        LayerLoss(name, what, bits, decibels(alone), decibels(here), alone / whole)
        for name, what, bits, alone, here in found
    ]
    return rows, findings, costs


def _alone(replay: Replay, node: Node) -> float:
    """The noise of one rounding, without what corrects the means that the others moved."""
    with uncorrected([node.layer] if isinstance(node.layer, QuantizeWrapper) else []):
        return replay.noise(as_built([node]))


def _title(node: Node, names: ValueNames) -> tuple[str, str, int]:
    layer = node.layer
    if isinstance(layer, ActivationQuantizer):
        return names.of(layer, node.kwargs.get("site", 0)), VALUES, layer.spec.bits
    if isinstance(layer, QuantizedRecurrence):
        return str(layer.name), WHOLE, 8
    bits = min((spec.bits for spec in layer.weight_specs.values()), default=8)
    return str(layer.layer.name), WEIGHTS, bits


def _remedies(
    qat: keras.Model, tuning: Any, replay: Replay, findings: Sequence[Finding], total: float
) -> Iterator[Remedy]:
    """Everything that is tried; `tuning` are samples that `replay` does not measure."""
    before = decibels(total)
    tensors = [replay.exact[ref] for ref in replay.graph.inputs]

    def outcome(name: str, after: float, note: str = "") -> Remedy:
        return Remedy(name, decibels(after), decibels(after) - before, note)

    for name, method in _methods().items():
        try:
            with _quiet():
                found = method(qat, tuning)
        except KqatError as error:
            yield Remedy(name, None, 0.0, str(error))
            continue
        yield outcome(name, _noise_against(replay, found, tensors))
    names = ValueNames(replay.graph)
    nodes = replay.rounding_nodes()
    roundings = [n for n in nodes if isinstance(n.layer, ActivationQuantizer)]

    def named(*causes: Cause) -> list[ActivationQuantizer]:
        """The quantizers of the values with such a finding."""
        labels = {finding.layer for finding in findings if finding.cause in causes}
        found = (n.layer for n in roundings if names.of(n.layer, n.kwargs.get("site", 0)) in labels)
        return list(dict.fromkeys(found))

    for title, spec, quantizers in (
        ("a range over all that was seen", None, named(Cause.CLIPPING)),
        (
            "'int16x8'",
            INT16_ACTIVATION,
            named(Cause.OUTLIER_CHANNEL, Cause.SHARED_SCALE, Cause.STARVED_GRID),
        ),
    ):
        if quantizers:
            labels = ", ".join(f"'{_meeting(quantizer, names)}'" for quantizer in quantizers)
            wide = {n: _over_all_seen(n.layer, spec) for n in roundings if n.layer in quantizers}
            # Calibration corrected means for the grid as it was; on another one that may do harm.
            rounded = replay.all_rounded() | wide
            after = replay.noise(rounded)
            with uncorrected(n.layer for n in nodes if isinstance(n.layer, QuantizeWrapper)):
                after = min(after, replay.noise(rounded))
            yield outcome(f"{title} for {labels}", after, "its grid was changed, and nothing else")
    few = {finding.layer for finding in findings if finding.cause is Cause.FEW_BITS}
    more = {
        node: _at_8_bits(node.layer)
        for node in replay.rounding_nodes()
        if isinstance(node.layer, QuantizeWrapper) and node.layer.layer.name in few
    }
    if more:
        name = "'int8' for the weights of " + ", ".join(f"'{layer}'" for layer in sorted(few))
        yield outcome(name, replay.noise(replay.all_rounded() | more))


def _methods() -> dict[str, Callable[[keras.Model, Any], keras.Model]]:
    """What can be tried on any QAT model, by the name that a user knows."""
    found = {f"kqat.algorithms.{name}": getattr(algorithms, name) for name in algorithms.__all__}
    for method in ("minmax", "percentile", "mse"):
        found[f"kqat.calibrate(method={method!r})"] = _calibrated(method)
    return found


def _calibrated(method: str) -> Callable[[keras.Model, Any], keras.Model]:
    def calibrated(qat: keras.Model, data: Any) -> keras.Model:
        copy = keras.models.clone_model(qat)
        copy.set_weights(qat.get_weights())
        calibrate(copy, data, method=method)
        return copy

    return calibrated


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Calibration of a copy tells nothing new about the data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _noise_against(replay: Replay, found: keras.Model, tensors: Sequence[Any]) -> float:
    """The noise of another QAT model against the exact values of `replay`.

    Scaled channels and moved biases leave the ends as they are.
    """
    other = Replay(trace(found), tensors)
    values = other.values(other.all_rounded())
    pairs = zip(replay.ends, other.ends, strict=True)
    noises = [noise(replay.exact[ours], values[theirs]) for ours, theirs in pairs]
    return sum(noises) / len(noises)


def _meeting(quantizer: ActivationQuantizer, names: ValueNames) -> str:
    return names.of(quantizer, 0) if quantizer.sites == 1 else names.meeting_of(quantizer)


def _over_all_seen(quantizer: ActivationQuantizer, spec: QuantSpec | None) -> Callable[..., Any]:
    """What the quantizer would compute on another grid, or its own, over all that it is given.

    Members of a group keep the range of all of them.
    """
    spec = spec or quantizer.spec

    def call(x: Any, **_: Any) -> Any:
        x = quantizer.clamped(x)
        low, high = arithmetic.bounds(x, quantizer.clamp)
        if quantizer.sites > 1:
            all_low, all_high = quantizer.range()
            low, high = ops.minimum(low, all_low), ops.maximum(high, all_high)
        low, high = arithmetic.widen(low, high)
        if spec.symmetric:
            low, high = arithmetic.symmetrize(low, high, spec)
        return arithmetic.fake_quantize(x, low, high, spec)

    return call


def _at_8_bits(wrapper: QuantizeWrapper) -> Callable[..., Any]:
    """What the layer would compute with weights of 8 bits and the same axes of scales."""

    def call(*args: Any, branch: int = 0, **kwargs: Any) -> Any:
        values = {
            name: rounded_as(
                wrapper, name, dataclasses.replace(INT8_WEIGHTS, axis=spec.axis), MaxAbs(), branch
            )
            for name, spec in wrapper.weight_specs.items()
        }
        return call_with(wrapper, values, *args, branch=branch, **kwargs)

    return call


def _cut(name: str, width: int) -> str:
    tail = (width - 1) // 2
    return name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."
