"""What a diagnosis tries: each remedy is the code that a user would write, run, and measured."""

import contextlib
import dataclasses
import functools
import glob
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kqat.analysis.causes import LOST_BITS, Cause, Finding
from kqat.analysis.policies import (
    Users,
    call_text,
    config_of,
    config_text,
    policy_lines,
    policy_of,
    with_rules,
)
from kqat.analysis.replay import Replay, decibels, noise
from kqat.base import KqatError, decimal
from kqat.config import PRESETS, QuantizeConfig, QuantizePolicy
from kqat.freezing import strip
from kqat.graph import Graph, Node, Ref, check_as_many, trace
from kqat.grids import INT8_WEIGHTS, INT16_ACTIVATION, MaxAbs, MinMax, MovingAverage, QuantSpec
from kqat.planning import make_plan
from kqat.training import (
    DEFAULT_METHOD,
    ActivationQuantizer,
    OutputPart,
    QuantizedRecurrence,
    QuantizeWrapper,
    ValueNames,
    algorithms,
    all_layers,
    blocks_of,
    blocks_text,
    calibrate,
    calibrate_for,
    output_parts,
    preserved_kinds,
    with_unlike_members_apart,
    wrap,
)

# A remedy helps where it gains at least this, in dB.
HELPS_DB = 0.5
# Of the findings that ask for 16 bits so many are tried alone: those that cost most.
_ALONE = 2
# Two gains that lie closer are alike.
ALIKE_DB = 1.0
# Calibration on the data given, by the default method: the measure of what calibrates.
AGAIN = "kqat.calibrate(qat, data)"
# What each of kqat's algorithms is for.
_AGAINST = {
    "equalize": (Cause.OUTLIER_CHANNEL, Cause.UNLIKE_ROWS),
    "smooth_quant": (Cause.OUTLIER_CHANNEL, Cause.UNLIKE_ROWS),
    "awq": (Cause.OUTLIER_CHANNEL, Cause.FEW_BITS, Cause.UNLIKE_ROWS),
    "adaround": (Cause.FEW_BITS, Cause.UNLIKE_ROWS),
    "gptq": (Cause.FEW_BITS, Cause.UNLIKE_ROWS),
    "correct_biases": (),
}
# These calibrate again, so that a part of what they gain may come of the data.
_RECALIBRATE = ("equalize", "smooth_quant", "awq")
_METHODS = ("minmax", "percentile", "mse")
_OF_VALUES = (Cause.OUTLIER_CHANNEL, Cause.SHARED_SCALE, Cause.STARVED_GRID)


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One thing that was tried.

    Attributes:
        name: what was tried, in words.
        code: the same in Python, as it was run: `model`, `qat` and `data` are what `diagnose` was
            given; what comes out is `mended`, or `qat` itself where `kqat.calibrate` changes it.
        command: the same as words of a shell, where a command of kqat does it, with `MODEL`, `QAT`
            and `DATA` for their files, and `&&` between two commands; empty otherwise.
        sqnr_db: of the outputs with it; `None` where it does not apply. Of a remedy that makes
            several outputs of one, the mean over all outputs, and so are the gains.
        gain_db: over the QAT model as it is.
        data_db: what calibrating again on the same data, by the default method, gains alone;
            `None` for what does not calibrate.
        own_db: what the remedy itself gains: over calibrating alone, or, if that is less, over the
            model as it is, unless it was calibrated on these very data.
        helps: whether that is half a dB at least.
        note: why it does not apply, or what is to be known of it.
        against: the findings that it is for, each as `"cause: layer"`.
    """

    name: str
    code: str
    command: tuple[str, ...]
    sqnr_db: float | None
    gain_db: float
    data_db: float | None
    own_db: float
    helps: bool
    note: str
    against: tuple[str, ...]

    def verdict(self) -> str:
        """What came of it, in a sentence."""
        if self.sqnr_db is None:
            return f"does not apply. {self.note}"
        words = "helps" if self.helps else "does not help"
        gain = decimal(self.gain_db, signed=True)
        text = f"{words}: {decimal(self.sqnr_db)} dB, {gain} over the model as it is"
        if self.data_db is not None and self.code != AGAIN:
            text += f", {decimal(self.gain_db - self.data_db, signed=True)} over calibrating again"
        return text + (f"; {self.note}" if self.note else "")


def advice_against(finding: Finding, remedies: Sequence[Remedy]) -> str:
    """The code of the remedy that helps most against a finding, of alike ones the shortest.

    Empty where nothing that was tried helps.
    """
    aimed = [r for r in remedies if r.helps and key_of(finding) in r.against]
    if not aimed:
        return ""
    most = max(remedy.gain_db for remedy in aimed) - ALIKE_DB
    alike = [remedy for remedy in aimed if remedy.gain_db >= most]
    return min(alike, key=lambda remedy: (remedy.code.count("\n"), -remedy.gain_db)).code


def key_of(finding: Finding) -> str:
    """What stands for a finding among those that a remedy is for."""
    return f"{finding.cause}: {finding.layer}"


def _keys(findings: Iterable[Finding]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(key_of, findings)))


@dataclasses.dataclass(frozen=True)
class _Trial:
    """What is to be tried: its code, and what that does to data.

    `parts` has, where it may make other outputs, what each of them was of those before.
    """

    name: str
    code: str
    command: tuple[str, ...]
    run: Callable[[Any], keras.Model]
    recalibrates: bool
    against: tuple[str, ...] = ()
    note: str = ""
    parts: Callable[[Any], tuple[OutputPart, ...]] | None = None


def tried(
    model: keras.Model,
    qat: keras.Model,
    tuning: Any,
    replay: Replay,
    findings: Sequence[Finding],
    *,
    total: float,
    fitted: bool,
) -> list[Remedy]:
    """Everything that is tried, what helps most first.

    Args:
        model: the float model that `qat` was made of, of fixed shape.
        qat: the QAT model.
        tuning: samples that `replay` does not measure, as for `kqat.calibrate`.
        replay: of the QAT model.
        findings: of it, those that cost most first.
        total: its noise.
        fitted: whether the QAT model seems to be calibrated on what `replay` measures.
    """
    with _quiet():
        again = _calibrated(qat, tuning, DEFAULT_METHOD)
    measure = _Measure(replay, again, decibels(total))
    found = [_by_data(measure, findings)]
    for trial in _trials(model, qat, replay.graph, findings):
        what, against = (trial.name, trial.code, trial.command), trial.against
        try:
            with _quiet():
                made = trial.run(tuning)
                at = measure if trial.parts is None else measure.at(trial.parts(tuning))
        except KqatError as error:
            found.append(Remedy(*what, None, 0.0, None, 0.0, False, str(error), against))
            continue
        after = at.of(made)
        gain = after - at.before
        data_db = at.again - at.before if trial.recalibrates else None
        counts = gain if data_db is None else gain - data_db
        if not fitted:
            counts = min(counts, gain)
        helps = counts >= HELPS_DB
        note = "; ".join(filter(None, (trial.note, at.note())))
        found.append(Remedy(*what, after, gain, data_db, counts, helps, note, against))
    return sorted(found, key=lambda r: (r.sqnr_db is None, not r.helps, -r.gain_db))


def _by_data(measure: "_Measure", findings: Sequence[Finding]) -> Remedy:
    gain = measure.again - measure.before
    helps = gain >= HELPS_DB
    note = ""
    if helps:
        note = (
            "the ranges of the model were found from other data or by another method; calibrate on "
            "data such as these"
        )
    elif gain <= -HELPS_DB:
        note = (
            "half of the data given calibrates worse than what the model was calibrated on, which "
            "was more, or the very samples that are measured"
        )
    keys = _keys(f for f in findings if f.cause in (Cause.CLIPPING, Cause.STARVED_GRID))
    what = ("calibrate again", AGAIN, _on_qat())
    return Remedy(*what, measure.again, gain, gain, gain, helps, note, keys)


def _on_qat(*options: str) -> tuple[str, ...]:
    """The command that calibrates a QAT model again, or applies an algorithm to it."""
    return ("kqat", "calibrate", "QAT", "--data", "DATA", *options, "-o", "mended.keras")


def _from_model(policy: QuantizePolicy) -> tuple[str, ...]:
    """The command that quantizes the float model under a policy; empty if it takes more."""
    words = []
    for key, config in (("", policy.default), *policy.rules):
        name = "float" if config is None else config_text(config).strip("'")
        if not isinstance(key, str) or (config is not None and name not in PRESETS):
            return ()
        words += ["--layer", f"{key}={name}"] if key else ["--policy", name]
    if words[:2] == ["--policy", "int8"]:
        del words[:2]
    return ("kqat", "quantize", "MODEL", "--data", "DATA", *words, "-o", "mended.keras")


def _trials(
    model: keras.Model, qat: keras.Model, graph: Graph, findings: Sequence[Finding]
) -> Iterator[_Trial]:
    for name in algorithms.__all__:
        against = _keys(f for f in findings if f.cause in _AGAINST[name])
        yield _Trial(
            name,
            call_text("mended", f"kqat.algorithms.{name}", [["qat"], ["data"]]),
            _on_qat("--algorithm", name),
            functools.partial(getattr(algorithms, name), qat),
            name in _RECALIBRATE,
            against,
            _not_scaled(qat, graph, findings) if name in _RECALIBRATE else "",
        )
    ranges = _keys(f for f in findings if f.cause in (Cause.CLIPPING, Cause.STARVED_GRID))
    for method in _METHODS:
        yield _Trial(
            f"calibrate by {method}",
            call_text("", "kqat.calibrate", [["qat"], ["data"], [f"method={method!r}"]]),
            _on_qat("--calibration", method),
            functools.partial(_calibrated, qat, method=method),
            True,
            ranges,
        )
    without = (Cause.BIAS_OVERFLOW, Cause.UNLIKE_ROWS)
    if any(finding.cause not in without for finding in findings):
        yield from _Policies(model, qat, graph).trials(findings)


def _not_scaled(qat: keras.Model, graph: Graph, findings: Sequence[Finding]) -> str:
    """What keeps outlier channels of values from being scaled, layer by layer."""
    names, producers = ValueNames(graph), graph.producers()
    outlying = {f.layer for f in findings if f.cause is Cause.OUTLIER_CHANNEL and not f.of_weights}
    makers: set[str] = set()
    for node in graph.nodes:
        if isinstance(node.layer, ActivationQuantizer):
            if names.of(node.layer, node.kwargs.get("site", 0)) in outlying:
                maker = producers.get(node.inputs[0])
                makers |= set() if maker is None else set(_parts(maker))
    blocks = [block for block in blocks_of(qat) if block.producer in makers]
    return f"not scaled: {blocks_text(blocks)}" if blocks else ""


def _calibrated(qat: keras.Model, data: Any, method: str) -> keras.Model:
    copy = keras.models.clone_model(qat)
    copy.set_weights(qat.get_weights())
    calibrate(copy, data, method=method)
    return copy


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Calibration of a copy tells nothing new about the data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class _Measure:
    """How good another QAT model is, in dB, against the exact values of a `Replay`.

    Every remedy leaves the float function as it is. What is compared are the ends, or, where a
    remedy parts outputs, these parts: beside the large part of an output nobody would see that a
    small one is better.

    Attributes:
        before: of the model as it is.
        again: of the model calibrated again.
    """

    def __init__(
        self,
        replay: Replay,
        calibrated: keras.Model,
        before: float | None = None,
        parts: Sequence[OutputPart] = (),
    ) -> None:
        self.replay, self.calibrated = replay, calibrated
        self.parts = [part for part in parts if not replay.graph.outputs[part.output].holds_indexes]
        self.exact = replay.outputs(replay.exact) if parts else []
        if before is None:
            rounded = replay.outputs(replay.values(replay.all_rounded()))
            before = self._of_parts([part.of(rounded) for part in self.parts])
        self.before, self.again = before, self.of(calibrated)

    def at(self, parts: Sequence[OutputPart]) -> "_Measure":
        """The same, at outputs that are parts of those of the model, if there are such."""
        if all(part.stop is None for part in parts):
            return self
        return _Measure(self.replay, self.calibrated, None, parts)

    def of(self, found: keras.Model) -> float:
        """That of a model."""
        other = Replay(trace(found), [self.replay.exact[ref] for ref in self.replay.graph.inputs])
        values = other.values(other.all_rounded())
        if self.parts:
            outputs = other.outputs(values)
            if len(outputs) == len(self.replay.graph.outputs):
                return self._of_parts([part.of(outputs) for part in self.parts])
            floats = zip(other.graph.outputs, outputs, strict=True)
            return self._of_parts([y for ref, y in floats if not ref.holds_indexes])
        if [ref.shape for ref in self.replay.ends] != [ref.shape for ref in other.ends]:
            return decibels(other.noise_of(values))
        pairs = zip(self.replay.ends, other.ends, strict=True)
        noises = [noise(self.replay.exact[ours], values[theirs]) for ours, theirs in pairs]
        return decibels(sum(noises) / len(noises))

    def note(self) -> str:
        """What is to be known of the numbers."""
        if not self.parts:
            return ""
        return (
            f"it makes {len(self.parts)} outputs, and its numbers are the mean of these: the model "
            f"as it is has {decimal(self.before)} dB there"
        )

    def _of_parts(self, found: Sequence[np.ndarray]) -> float:
        pairs = zip(self.parts, found, strict=True)
        noises = [noise(part.of(self.exact), y) for part, y in pairs]
        return decibels(sum(noises) / len(noises))


class _Policies:
    """Rules for the layers that findings name, each a policy that `quantize_model` is given."""

    def __init__(self, model: keras.Model, qat: keras.Model, graph: Graph) -> None:
        self.qat, self.graph = qat, graph
        self.model, self.word = model, "model"
        self.model_is_given = _has_same_weights(trace(model), graph)
        if not self.model_is_given:
            self.model, self.word = strip(qat), "kqat.strip(qat)"
        self.float_graph = trace(self.model)
        self.policy = policy_of(self.float_graph, qat)
        self.users = Users(self.float_graph, self.policy or QuantizePolicy())
        self.names = ValueNames(graph)
        self.weighted = set(
            self._users(
                layer.layer.name
                for layer in all_layers(qat)
                if isinstance(layer, QuantizeWrapper) and layer.weight_specs
            )
        )
        self.kept = sorted(
            {
                str(kind)
                for layer in all_layers(qat)
                if isinstance(layer, QuantizeWrapper)
                for one in layer.preserve.values()
                for kind, holds in (("sparsity", one.sparsity), ("clusters", one.clusters))
                if holds
            }
        )

    def trials(self, findings: Sequence[Finding]) -> Iterator[_Trial]:
        """What is to be tried of other policies."""
        if self.policy is None:
            yield _Trial(
                "another preset for the layers named above",
                "",
                (),
                _cannot_tell,
                True,
                _keys(findings),
            )
            return
        clipped = [f for f in findings if f.cause is Cause.CLIPPING]
        if clipped:
            yield from self._trial("a range over all values", clipped, self._over_all)
        joined = [f for f in findings if f.cause is Cause.SHARED_SCALE and self._joins(f)]
        if joined:
            yield self._apart(joined, findings)
        coarse = [f for f in findings if f.cause in _OF_VALUES and not f.of_weights]
        seen: list[Mapping[str, QuantizeConfig]] = []
        for some in (coarse, *([one] for one in coarse[:_ALONE])):
            for rules_of in (self._only_16, self._around_16):
                rules = self._rules(some, rules_of)
                if rules and rules not in seen:
                    seen.append(rules)
                    yield from self._trial("16 bits", some, rules_of)
        few = [f for f in findings if f.cause is Cause.FEW_BITS]
        if few:
            yield from self._trial("weights of 8 bits", few, self._at_8)
        one_scale = [f for f in findings if f.cause is Cause.OUTLIER_CHANNEL and f.of_weights]
        if one_scale:
            yield from self._trial("a scale for each channel", one_scale, self._per_channel)

    def _rules(
        self, findings: Sequence[Finding], rules_of: Callable[[Finding], Mapping[str, Any]]
    ) -> dict[str, QuantizeConfig]:
        found: dict[str, QuantizeConfig] = {}
        for finding in findings:
            found |= rules_of(finding)
        given = {user: c for user, c in found.items() if c is not None and self._ships(user, c)}
        return self.users.for_all_tied(given)

    def _trial(
        self,
        what: str,
        findings: Sequence[Finding],
        rules_of: Callable[[Finding], Mapping[str, Any]],
    ) -> Iterator[_Trial]:
        assert self.policy is not None
        rules = self._rules(findings, rules_of)
        if not rules:
            return
        policy = with_rules(self.policy, rules)
        arguments = [[self.word], policy_lines(policy), ["calibration_data=data"]]
        if self.kept:
            arguments.append([f"preserve={self.kept}"])
        as_command = self.model_is_given and not self.kept
        yield _Trial(
            f"{what} for {_listed(rules)}",
            call_text("mended", "kqat.quantize_model", arguments),
            _from_model(policy) if as_command else (),
            functools.partial(self._quantized, policy),
            True,
            _keys(findings),
        )

    def _apart(self, joined: Sequence[Finding], findings: Sequence[Finding]) -> _Trial:
        """What joins values of unlike size, taken apart or scaled alike by `kqat.adapt`."""
        assert self.policy is not None
        # Where members are scaled alike, the kernels that read them have no small rows any more.
        readers = self.graph.consumers()
        joins = [join for f in joined for join in self._joins(f)]
        behind = {
            part for j in joins for node in self._readers_of(j, readers) for part in _parts(node)
        }
        rows = [f for f in findings if f.cause is Cause.UNLIKE_ROWS and f.layer in behind]
        # The joins that become outputs are no layers any more, and rules for them decide nothing.
        gone = {user for f in joined for user in self._users(self._meetings(f))}
        escaped = {glob.escape(user) for user in gone}
        rules = tuple((key, config) for key, config in self.policy.rules if key not in escaped)
        policy = QuantizePolicy(self.policy.default, rules)
        arguments = [["adapted"], policy_lines(policy), ["calibration_data=data"]]
        if self.kept:
            arguments.append([f"preserve={self.kept}"])
        command = _from_model(policy) if self.model_is_given and not self.kept else ()
        if command:
            adapted = ("kqat", "adapt", "MODEL", "--data", "DATA", "-o", "adapted.keras")
            words = ("adapted.keras" if word == "MODEL" else word for word in command)
            command = (*adapted, "&&", *words)
        return _Trial(
            "adapt",
            call_text("adapted", "kqat.adapt", [[self.word], ["calibration_data=data"]])
            + "\n"
            + call_text("mended", "kqat.quantize_model", arguments),
            command,
            functools.partial(self._adapted, policy),
            True,
            _keys([*joined, *rows]),
            parts=functools.partial(output_parts, self.float_graph),
        )

    def _adapted(self, policy: QuantizePolicy, data: Any) -> keras.Model:
        """What `kqat.quantize_model` makes of what `kqat.adapt` makes."""
        with warnings.catch_warnings(record=True) as met:
            warnings.simplefilter("always")
            model = with_unlike_members_apart(self.float_graph, data, self.model.name)
        check_as_many(self.model, model, "Go on without it.")
        graph = trace(model)
        if [len(graph.outputs), len(graph.nodes)] == [
            len(self.float_graph.outputs),
            len(self.float_graph.nodes),
        ]:
            told = " ".join(str(one.message) for one in met)
            raise KqatError(
                told
                or "Expected a Concatenate of which one member reaches more than "
                f"{2**LOST_BITS:.0f} times as far as another. Received: none, on these data."
            )
        return self._quantized(policy, data, graph)

    def _quantized(
        self, policy: QuantizePolicy, data: Any, graph: Graph | None = None
    ) -> keras.Model:
        """What `kqat.quantize_model` makes, of the float model or of another graph."""
        plan = make_plan(graph or self.float_graph, policy, self.model.name)
        made = wrap(plan, preserved_kinds(self.kept or None))
        calibrate_for(made, data, DEFAULT_METHOD, stacklevel=2)
        return made

    def _ships(self, user: str, config: QuantizeConfig) -> bool:
        """Whether a layer has kernels for a config."""
        assert self.policy is not None
        try:
            rules = self.users.for_all_tied({user: config})
            make_plan(self.float_graph, with_rules(self.policy, rules), "model")
        except KqatError:
            return False
        return True

    def _config(self, user: str) -> QuantizeConfig | None:
        assert self.policy is not None
        return config_of(self.policy, self.float_graph, user)

    def _over_all(self, finding: Finding) -> dict[str, Any]:
        found = {}
        for user in self._owners(finding.layer):
            config = self._config(user)
            if config is not None:
                found[user] = dataclasses.replace(config, activation_range=MinMax())
        return found

    def _only_16(self, finding: Finding) -> dict[str, Any]:
        """16 bits for what has one scale for many; the members keep theirs."""
        if finding.cause is not Cause.SHARED_SCALE:
            return {}
        return self._at_16(self._users(self._meetings(finding)))

    def _around_16(self, finding: Finding) -> dict[str, Any]:
        """16 bits for the layers that make and that read a value: it is one of both."""
        return self._at_16(_around(self.graph, self._nodes(finding.layer), self._users))

    def _at_16(self, users: Iterable[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for user in users:
            config = self._config(user)
            if config is None or config.activation.bits == 16:
                continue
            if user not in self.weighted and config.activation_range == MovingAverage():
                found[user] = PRESETS["int16x8"]
                continue
            try:
                found[user] = dataclasses.replace(config, activation=INT16_ACTIVATION)
            except KqatError:
                found[user] = PRESETS["int16x8"]
        return found

    def _at_8(self, finding: Finding) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for user in self._users([finding.layer]):
            config = self._config(user)
            if config is not None:
                found[user] = dataclasses.replace(
                    config, weights=INT8_WEIGHTS, weight_step=MaxAbs()
                )
        return found

    def _per_channel(self, finding: Finding) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for user in self._users([finding.layer]):
            config = self._config(user)
            if config is not None and isinstance(config.weights, QuantSpec):
                weights = dataclasses.replace(config.weights, axis="channel")
                found[user] = dataclasses.replace(config, weights=weights)
        return found

    def _owners(self, label: str) -> list[str]:
        """The user's layer that a value is the output of, or the input of the model."""
        return self._users([label]) or [
            user for node in self._nodes(label) for user in self._users([node.layer.label])
        ]

    def _nodes(self, label: str) -> list[Node]:
        """The roundings of a value of that name."""
        return [
            node
            for node in self.graph.nodes
            if isinstance(node.layer, ActivationQuantizer)
            and self.names.of(node.layer, node.kwargs.get("site", 0)) == label
        ]

    def _meetings(self, finding: Finding) -> list[str]:
        """The values in which what shares a scale with a value first meets."""
        return [self._meeting(node.layer) for node in self._nodes(finding.layer)]

    def _joins(self, finding: Finding) -> list[Node]:
        """What joins a value with others of its scale; none where one is chosen of them."""
        return [
            meeting
            for node in self._nodes(finding.layer)
            for meeting in self.names.meetings_of(node.layer)
            if isinstance(meeting.layer, keras.layers.Concatenate)
        ]

    def _readers_of(self, node: Node, readers: Mapping[Ref, Sequence[Node]]) -> Iterator[Node]:
        """The nodes that read what a node makes, rounded or not."""
        for reader in (reader for ref in node.outputs for reader in readers[ref]):
            if isinstance(reader.layer, ActivationQuantizer):
                yield from self._readers_of(reader, readers)
            else:
                yield reader

    def _meeting(self, quantizer: ActivationQuantizer) -> str:
        if quantizer.sites == 1:
            return self.names.of(quantizer, 0)
        return self.names.meeting_of(quantizer)

    def _users(self, parts: Iterable[str]) -> list[str]:
        """The names, as a rule gives them, of the layers and inputs that parts belong to."""
        known = {node.name for node in self.float_graph.nodes} | set(self.float_graph.input_names)
        users = (self.users.names.get(part, part) for part in parts)
        return list(dict.fromkeys(user for user in users if user in known))


def _cannot_tell(data: Any) -> keras.Model:
    raise KqatError(
        "Expected grids that a preset and rules for layers explain, so that a rule can be added. "
        "Received: others. Add a rule for these layers to the policy that the model was made with."
    )


def _listed(rules: Mapping[str, Any]) -> str:
    names = [f"'{user}'" for user in rules]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _around(
    graph: Graph, roundings: Sequence[Node], users: Callable[[Iterable[str]], list[str]]
) -> list[str]:
    """The user's layers inside the kernels that make and that read rounded values."""
    producers, readers = graph.producers(), graph.consumers()
    inputs = dict(zip(graph.inputs, graph.input_names, strict=True))
    parts: list[str] = []
    quantizers = {id(node.layer) for node in roundings}
    every = [node for node in graph.nodes if id(node.layer) in quantizers]
    for node in every:
        ref, maker = node.inputs[0], producers.get(node.inputs[0])
        while maker is not None and isinstance(maker.layer, ActivationQuantizer):
            ref, maker = maker.inputs[0], producers.get(maker.inputs[0])
        parts += [inputs[ref]] if maker is None else _parts(maker)
        parts += _parts(node)
    waiting, met = [ref for node in every for ref in node.outputs], set[Ref]()
    while waiting:
        ref = waiting.pop()
        if ref in met:
            continue
        met.add(ref)
        for reader in readers[ref]:
            if id(reader.layer) in quantizers:
                waiting += reader.outputs
                continue
            parts += _parts(reader)
            behind = [n for out in reader.outputs for n in readers[out]]
            rounding = [n for n in behind if isinstance(n.layer, ActivationQuantizer)]
            parts += [part for n in rounding for part in _parts(n)]
            # What only hands values on has no grid of its own: who reads it decides.
            if not rounding and not isinstance(reader.layer, QuantizedRecurrence):
                waiting += reader.outputs
            waiting += [
                out for n in rounding if id(n.layer) in quantizers for out in n.outputs
            ]  # fmt: skip
    return users(parts)


def _parts(node: Node) -> list[str]:
    """The names of the layers that a node of a QAT model computes."""
    layer: Any = node.layer
    if isinstance(layer, QuantizeWrapper):
        return [part.name for part in (layer.layer, *layer.between, *layer.normalizations)]
    if isinstance(layer, ActivationQuantizer | QuantizedRecurrence):
        return [layer.label, node.name]
    return [node.name]


def _has_same_weights(base: Graph, graph: Graph) -> bool:
    """Whether the layers of a QAT model have the weights of the float model's of their names."""
    floats = {str(node.layer.name): node.layer for node in base.nodes if node.has_weights}
    for node in graph.nodes:
        if not isinstance(node.layer, QuantizeWrapper):
            continue
        for part in (node.layer.layer, *node.layer.normalizations):
            own = floats.get(str(part.name))
            if own is None or type(own) is not type(part):
                continue  # a part of a composite layer of that name
            pairs = zip(own.get_weights(), part.get_weights(), strict=False)
            if not all(np.array_equal(a, b) for a, b in pairs):
                return False
    return True
