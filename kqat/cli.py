"""The command `kqat`: from a saved Keras model to a verified file, without a script.

Exit codes: 0: done; 1: a check found something wrong with the file or the model (values that differ
from the model's, a layer that the device cannot run); 2: the command could not do what was asked,
with one message and no traceback; 130: interrupted by Ctrl-C; 141: what reads the output, as
`| head`, has ended. A kernel that a runtime lacks, or an approximation that a kernel is known for,
is a note and changes no exit code.

Keras and TensorFlow are imported by the commands that need them, when they need them.
"""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import kqat
import tflite_export
from kqat import terminal
from kqat.base import (
    ExportError,
    KqatError,
    ModelError,
    PolicyError,
    counted,
    json_text,
    save_model,
)
from kqat.devices import LITERT, TARGETS
from kqat.input_files import HDF5, KERAS, TFLITE, check_kind, for_inputs, kind_of, read_data
from kqat.terminal import WIDTH, in_shell_words, say, tell


class _Found(click.Path):
    """An existing file of one of two kinds; the other kind is refused with the way to it."""

    def __init__(self, wants: str | None = None) -> None:
        super().__init__(exists=True, path_type=Path)
        self.wants = wants

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, if it is no file of the other kind."""
        path: Path = super().convert(value, param, ctx)  # type: ignore[assignment]
        if path.is_dir() and not (self.wants == KERAS and (path / "saved_model.pb").is_file()):
            saved = ", or the folder of a SavedModel" if self.wants == KERAS else ""
            self.fail(f"Expected a file{saved}. Received: '{path}', a folder.", param, ctx)
        kind = kind_of(path)
        if self.wants == KERAS and kind == TFLITE:
            self.fail(
                f"Expected a Keras model. Received: '{path}', a TFLite file. "
                f"`kqat inspect {path}` shows what is in it.",
                param,
                ctx,
            )
        if self.wants == TFLITE and kind in (KERAS, HDF5):
            self.fail(
                f"Expected a TFLite file. Received: '{path}', a Keras model. "
                f"`kqat plan {path}` shows it; `kqat ptq` and `kqat convert` make a TFLite file.",
                param,
                ctx,
            )
        if self.wants is not None and kind not in (self.wants, HDF5, "a folder"):
            made = (
                "`kqat ptq` and `kqat convert` make one."
                if self.wants == TFLITE
                else ("Save the model with model.save('model.keras').")
            )
            if kind != "a damaged archive":  # `load_model` says in which way.
                self.fail(f"Expected {self.wants}. Received: '{path}', {kind}. {made}", param, ctx)
        return path


class _Data(click.Path):
    """A file of arrays; another kind is refused before a model is loaded."""

    def __init__(self) -> None:
        super().__init__(exists=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, if it is a file of arrays."""
        path: Path = super().convert(value, param, ctx)  # type: ignore[assignment]
        check_kind(path)
        return path


class _New(click.Path):
    """A file to be written, in a folder that exists: a long run shall not end in that error."""

    def __init__(self, allow_dash: bool = False) -> None:
        super().__init__(dir_okay=False, allow_dash=allow_dash, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, if a file can be written there and is none of the files that are read."""
        if value == "-" and self.allow_dash:
            return Path(value)
        if str(value) in ("", "-"):
            self.fail(
                f"Expected the name of a file. Received: {value!r}. What this option writes is "
                "not printed; a file that is called '-' is ./-.",
                param,
                ctx,
            )
        path: Path = super().convert(value, param, ctx)  # type: ignore[assignment]
        if not path.parent.is_dir():
            self.fail(
                f"Expected a name in a folder that exists. Received: '{path}', in '{path.parent}', "
                "which is none. Make it first.",
                param,
                ctx,
            )
        if not os.access(path.parent, os.W_OK):
            self.fail(
                f"Expected a name in a folder that may be written. Received: '{path}', in "
                f"'{path.parent}', which is read-only for you. Name another folder.",
                param,
                ctx,
            )
        return path


# Where the context keeps what `--code` names.
_CODES = "kqat.codes"
_FILE = _Found()
_MODEL = _Found(KERAS)
_BLOB = _Found(TFLITE)
_NEW = _New()


_TARGET = click.option(
    "--target",
    type=click.Choice(sorted(TARGETS)),
    metavar="DEVICE",
    help=f"The device that will run the file: {', '.join(sorted(TARGETS))}.",
)
_POLICY = click.option(
    "--policy",
    default="int8",
    show_default=True,
    help="A preset: int8, int16x8, w4a8, w3a8, w2a8, ternary or binary; or 'float', or a .json "
    "file that `kqat search` wrote.",
)
_LAYERS = click.option(
    "--layer",
    "rules",
    multiple=True,
    metavar="PATTERN=PRESET",
    help="Another preset, or 'float', for layers of this name; `*` stands for any letters. "
    "Can be given repeatedly; the first that matches a layer decides.",
)
_DATA = click.option(
    "--data",
    type=_Data(),
    required=True,
    help="Some hundred typical inputs: a .npy file, or a .npz file with an array for each input.",
)
_CALIBRATIONS = ("auto", "minmax", "percentile", "mse", "entropy")
_ALGORITHMS = ("adaround", "awq", "correct_biases", "equalize", "gptq", "smooth_quant")
_HOW_RANGES = "How ranges are found; by default 'auto', the best of several on these data."
_CALIBRATION = click.option("--calibration", type=click.Choice(_CALIBRATIONS), help=_HOW_RANGES)
_IO_TYPES = click.Choice(["int8", "int16", "uint8", "float32"])
_INPUT_TYPE = click.option(
    "--input-type", type=_IO_TYPES, help="Type of the inputs; by default the plan's."
)
_OUTPUT_TYPE = click.option("--output-type", type=_IO_TYPES, help="The same for outputs.")
_CODE = click.option(
    "--code",
    "codes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    expose_value=False,
    callback=lambda ctx, _, paths: ctx.meta.__setitem__(_CODES, paths),
    help="A Python file that defines layers or functions of the model that Keras does not have. "
    "It is run. Can be given repeatedly.",
)
_JSON = click.option(
    "--json",
    "json_path",
    type=_New(allow_dash=True),
    metavar="FILE",
    help="Write the result to FILE as JSON; '-' prints it in the place of text.",
)


def _output(what: str) -> Any:
    return click.option("-o", "--output", type=_NEW, required=True, help=what)


def _compress(words: str) -> Any:
    return click.option("--compress", type=click.Choice(["lookup", "smallest"]), help=words)


class _Quiet(click.Group):
    """A group whose commands report an error as one message, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = terminal.note
                return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except click.ClickException as error:
            # Click prints a message in one line, however long, behind "Error: ".
            words = terminal.filled(error.format_message(), indent=len("Error: "))
            own = error.ctx if isinstance(error, click.UsageError) else None
            raise click.UsageError(words, own) from error
        except (KeyboardInterrupt, click.Abort):
            tell("Interrupted. No file was left half written.")
            ctx.exit(130)
        except BrokenPipeError:
            # What is left to print, at the end of the process too, has no reader.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(141)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            known = isinstance(error, KqatError | OSError)
            words = in_shell_words(str(error)) if known else str(error)
            ending = "" if known else " (unexpected: `kqat --debug …` shows where it comes from)"
            kind = "" if known else f"{type(error).__name__}: "
            tell(f"Error: {kind}{words}{ending}")
            ctx.exit(2)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named; for a typo, an error that names the nearest ones."""
        import difflib

        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if near := difflib.get_close_matches(args[0], self.list_commands(ctx), cutoff=0.5):
                words = f"No such command '{args[0]}'. Did you mean {' or '.join(near)}?"
                raise click.UsageError(words, ctx) from error
            raise


@click.group(cls=_Quiet, context_settings={"max_content_width": WIDTH})
@click.version_option(version=kqat.__version__, prog_name="kqat")
@click.option("--debug", is_flag=True, help="Show tracebacks, and what libraries log.")
def main(debug: bool) -> None:
    """Quantization-aware training for Keras 3, shipped as a full-integer .tflite.

    Exit codes: 0: done. 1: a check found something wrong with the file or the model. 2: the command
    could not do what was asked. 130: interrupted.
    """


def run() -> None:
    """The command as the shell runs it: without what TensorFlow and LiteRT log."""
    with contextlib.nullcontext() if "--debug" in sys.argv else terminal.quiet_libraries():
        main(prog_name="kqat")


@main.command(short_help="Show how each layer of a model would be quantized.")
@click.argument("model", type=_MODEL)
@_POLICY
@_LAYERS
@_TARGET
@_CODE
@_JSON
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    metavar="SIZES",
    help="Sizes of an input that the model leaves open, as 96,96,3, without the batch; one for "
    "each input, in order.",
)
@click.option(
    "--draw", "picture", type=_NEW, help="Also draw it: a .svg, .html, .mmd (Mermaid) or .dot file."
)
def plan(
    model: Path,
    policy: str,
    rules: tuple[str, ...],
    target: str | None,
    json_path: Path | None,
    input_shapes: tuple[str, ...],
    picture: Path | None,
) -> None:
    """Show how every layer of MODEL, a .keras file, would be quantized.

    With --target, the exit code is 1 if the device cannot run a layer at all.
    """
    chosen, shapes = _policy(policy, rules), [_sizes(text) for text in input_shapes]
    loaded = _load(model)
    with terminal.doing("planning"):
        found = kqat.plan(loaded, chosen, target=target, input_shapes=shapes or None)
    if picture is not None:
        found.draw(picture)
    if not terminal.write_json(json_path, found.to_json()):
        click.echo(found.table(WIDTH))
        for line in found.notes():
            say(in_shell_words(line))
    if any(misfit.blocking for misfit in found.misfits):
        sys.exit(1)


@main.command(short_help="Fit a float model to a device, or part what joins unlike values.")
@click.argument("model", type=_MODEL)
@_TARGET
@click.option(
    "--data",
    type=_Data(),
    help="Typical inputs, .npy or .npz, by which joins of values of unlike size are found: their "
    "members become outputs of their own, or are scaled alike.",
)
@_output("The adapted .keras file.")
@_CODE
@_JSON
def adapt(
    model: Path, target: str | None, data: Path | None, output: Path, json_path: Path | None
) -> None:
    """Fit MODEL to a device, or part what joins values of unlike size, keeping the weights.

    With --target, activations that the device does not run fast are replaced by similar ones: train
    the model on. With --data it computes the same.
    """
    _check_keras_name(output)
    _check_apart(output, model, *([data] if data else []))
    loaded = _load(model)
    given = None if data is None else _data_for(loaded, data)
    _save_keras(kqat.adapt(loaded, target, calibration_data=given), output, json_path)


@main.command(short_help="Make and calibrate a QAT model, to train or convert.")
@click.argument("model", type=_MODEL)
@_DATA
@_output("The QAT model, a .keras file.")
@_POLICY
@_LAYERS
@_CALIBRATION
@_CODE
@_JSON
def quantize(
    model: Path,
    data: Path,
    output: Path,
    policy: str,
    rules: tuple[str, ...],
    calibration: str | None,
    json_path: Path | None,
) -> None:
    """Make a QAT model from MODEL and calibrate it on --data, to be trained or converted."""
    _check_keras_name(output)
    _check_apart(output, model, data)
    qat = _quantized(model, data, policy, rules, calibration)
    _save_keras(qat, output, json_path)


@main.command(short_help="Convert a float model to an integer .tflite, untrained.")
@click.argument("model", type=_MODEL)
@_DATA
@_output("The .tflite file.")
@_POLICY
@_LAYERS
@_CALIBRATION
@_TARGET
@_INPUT_TYPE
@_OUTPUT_TYPE
@_CODE
@_JSON
def ptq(
    model: Path,
    data: Path,
    output: Path,
    policy: str,
    rules: tuple[str, ...],
    calibration: str | None,
    target: str | None,
    input_type: str | None,
    output_type: str | None,
    json_path: Path | None,
) -> None:
    """Convert MODEL, a float .keras file, to a full-integer .tflite without training.

    This is post-training quantization: calibrate on --data, then convert. Where it loses too much,
    `kqat quantize` makes the model that is trained.
    """
    _check_tflite_name(output)
    _check_apart(output, model, data)
    from kqat.devices import check_runs, target_named
    from kqat.planning import end_types, misfits
    from tflite_export.exporter import check_edge_tpu, check_end

    def check(graph: Any, plan: Any) -> None:
        """What `convert` would refuse only after calibration."""
        if target is not None:
            check_edge_tpu(target, (input_type, output_type), 1)
            check_runs(misfits(graph, plan, target_named(target)), target)
        asked = (("input", input_type), ("output", output_type))
        for (kind, one), types in zip(asked, end_types(plan), strict=True):
            for name, own in types.items():
                check_end(kind, name, own, None if own == "int32" else one)

    qat = _quantized(model, data, policy, rules, calibration, check)
    _convert(
        qat,
        output,
        json_path,
        inference_input_type=input_type,
        inference_output_type=output_type,
        target=target,
    )


@main.command(short_help="Convert a QAT model to a full-integer .tflite.")
@click.argument("qat", type=_MODEL)
@_output("The .tflite file.")
@_TARGET
@_INPUT_TYPE
@_OUTPUT_TYPE
@click.option(
    "--batch-size",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Samples per invocation.",
)
@_compress("Encode weights for TFLite Micro's DECODE; needs a TFLite Micro target.")
@click.option(
    "--float-weights",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the weights of layers left float; float16 needs the target litert.",
)
@click.option(
    "--weights",
    type=click.Choice(["packed", "unpacked"]),
    help="How weights of few bits are stored; by default packed where that costs no time.",
)
@_CODE
@_JSON
def convert(
    qat: Path,
    output: Path,
    target: str | None,
    input_type: str | None,
    output_type: str | None,
    batch_size: int,
    compress: str | None,
    float_weights: str,
    weights: str | None,
    json_path: Path | None,
) -> None:
    """Convert QAT, the .keras file of a QAT model, to a full-integer .tflite."""
    _check_tflite_name(output)
    _check_apart(output, qat)
    _convert(
        _load(qat),
        output,
        json_path,
        inference_input_type=input_type,
        inference_output_type=output_type,
        target=target,
        batch_size=batch_size,
        compress=compress,
        float_weights=float_weights,
        weights=weights,
    )


@main.command(short_help="Run a .tflite on every runtime; compare it with its model.")
@click.argument("paths", nargs=-1, required=True, type=_FILE, metavar="[QAT] FILE")
@click.option(
    "--data",
    type=_Data(),
    help="Inputs as the float model takes them, .npy or .npz; random if QAT is not given.",
)
@click.option("--html", type=_NEW, help="Write the report to this file as one HTML page.")
@_CODE
@_JSON
@click.option(
    "--samples",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Compare on so many inputs, the first ones of --data.",
)
@_TARGET
def verify(
    paths: tuple[Path, ...],
    data: Path | None,
    html: Path | None,
    json_path: Path | None,
    samples: int,
    target: str | None,
) -> None:
    """Run FILE, a .tflite, on every runtime and compare it with QAT, its .keras model.

    With --target, only the runtimes of that device are used.

    Without QAT, or for a file that kqat did not write, the runtimes are compared with each other.
    The exit code is 1 if a runtime that has the kernels does not run the file, if a value differs
    by more than one step in lockstep (or by more than its kernel is known to approximate), or if
    values of QAT are missing in the file: then it is not that model's file. It is 2 if no runtime
    has the kernels, so that nothing was compared.
    """
    if len(paths) > 2:
        raise click.UsageError("Expected one .tflite, with or without the .keras file before it.")
    if len(paths) == 2 and data is None:
        raise click.UsageError("Expected --data: inputs on which to compare with the QAT model.")
    _BLOB.convert(paths[-1], None, click.get_current_context())
    if len(paths) == 2:
        _MODEL.convert(paths[0], None, click.get_current_context())
    blob = paths[-1].read_bytes()
    qat = _load(paths[0]) if len(paths) == 2 else None
    if data is None:
        given = None
    else:
        given = _data_of_file(blob, data) if qat is None else _data_for(qat, data)
    from tflite_export.verification import DEFAULT_RUNTIMES

    runtimes = [r for r in DEFAULT_RUNTIMES if target is None or _is_of(target, r)]
    with terminal.progress():
        report = tflite_export.verify(
            qat, blob, given, runtimes=runtimes, samples=samples, target=target
        )
    if html is not None:
        report.save_html(html)
    if not terminal.write_json(json_path, report.to_json()):
        terminal.show_text(str(report))
    parts = report.runtimes
    ran = [part for part in parts if part.problem is None]
    wrong = not all(part.is_right for part in parts)
    missed = any(part.unmatched or (qat is not None and not part.sites) for part in ran)
    if wrong or missed:
        sys.exit(1)
    if not ran:
        raise ExportError(
            "Expected a runtime that has all kernels of the file. Received: none of "
            f"{', '.join(runtimes)}; nothing was compared."
        )


@main.command(short_help="Show where a QAT model loses, why, and what helps.")
@click.argument("model", type=_MODEL)
@click.argument("qat", type=_MODEL)
@click.option(
    "--data",
    type=_Data(),
    required=True,
    help="Inputs as the device sees them, .npy or .npz, that calibration did not see.",
)
@click.option("--html", type=_NEW, help="Write the diagnosis to this file as one HTML page.")
@_CODE
@_JSON
@click.option("--remedies/--no-remedies", default=True, help="Whether to try what could help.")
def diagnose(
    model: Path,
    qat: Path,
    data: Path,
    html: Path | None,
    json_path: Path | None,
    remedies: bool,
) -> None:
    """Show where QAT, made of the float MODEL, loses, why, and what helps.

    Give --data as the device sees it, held out: ranges fit the calibration data, so on these a
    fault of calibration cannot show. What helps is printed as the command that does it, or as
    Python where none does.
    """
    whole, quantized = _load(model), _load(qat)
    given = _data_for(whole, data)
    with terminal.progress():
        found = kqat.diagnose(whole, quantized, given, remedies=remedies)
    files = {"MODEL": str(model), "QAT": str(qat), "DATA": str(data)}
    if html is not None:
        found.save_html(html)
    if not terminal.write_json(json_path, found.to_json()):
        terminal.show_text(found.text(files))


@main.command(short_help="Calibrate a QAT model again, or improve it untrained.")
@click.argument("qat", type=_MODEL)
@_DATA
@_output("The new QAT model, a .keras file.")
@click.option("--calibration", type=click.Choice(_CALIBRATIONS), help=_HOW_RANGES)
@click.option(
    "--algorithm",
    type=click.Choice(_ALGORITHMS),
    help="Apply one of kqat's algorithms instead, as `kqat diagnose` advises.",
)
@_CODE
@_JSON
def calibrate(
    qat: Path,
    data: Path,
    output: Path,
    calibration: str | None,
    algorithm: str | None,
    json_path: Path | None,
) -> None:
    """Find the ranges of QAT, a QAT model, anew on --data, or improve it by an algorithm."""
    if calibration and algorithm:
        raise click.UsageError("Expected --calibration or --algorithm. Received: both.")
    _check_keras_name(output)
    _check_apart(output, qat, data)
    loaded = _load(qat)
    given = _data_for(loaded, data)
    with terminal.progress():
        if algorithm:
            loaded = getattr(kqat.algorithms, algorithm)(loaded, given)
        else:
            kqat.calibrate(loaded, given, **({"method": calibration} if calibration else {}))
    _save_keras(loaded, output, json_path)


@main.command(short_help="Choose a preset for each layer, within a budget.")
@click.argument("model", type=_MODEL)
@_DATA
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    required=True,
    help="In the unit of --measure; below 1 as a share of what the first choice takes.",
)
@click.option(
    "--measure",
    type=click.Choice(["flash", "arena", "mac_bits", "cycles"]),
    default="flash",
    show_default=True,
    help="What the budget is of: bytes of the file or of the arena, work, or Vela's cycles.",
)
@click.option(
    "--choice",
    "choices",
    multiple=True,
    default=("int8", "w4a8"),
    show_default=True,
    help="A preset that a layer may get. Can be given repeatedly.",
)
@_compress("As of `kqat convert`: encoded weights take as many bits as they need.")
@_output("The policy, a .json file for --policy of the other commands.")
@_TARGET
@_CODE
@_JSON
def search(
    model: Path,
    data: Path,
    budget: float,
    measure: str,
    choices: tuple[str, ...],
    compress: str | None,
    output: Path,
    target: str | None,
    json_path: Path | None,
) -> None:
    """Choose a preset for each layer of MODEL, so that the file fits a budget and loses least."""
    for choice in choices:
        _check_preset(choice, "--choice")
    loaded = _load(model)
    given = _data_for(loaded, data)
    with terminal.progress():
        found = kqat.search(
            loaded,
            given,
            budget=budget,
            target=target,
            measure=measure,
            choices=choices,
            compress=compress,
        )
    found.save(output)
    result = {
        "file": str(output),
        "measure": str(found.measure),
        "budget": found.budget,
        "used": found.used,
        "choices": dict(found.choices),
        "pareto": [dataclasses.asdict(point) for point in found.pareto],
    }
    if not terminal.write_json(json_path, json_text(result, indent=1)):
        terminal.show_text(found.text())
        click.echo(output)


@main.command(short_help="Show operators, types and sizes of any .tflite.")
@click.argument("file", type=_BLOB)
@_TARGET
@_JSON
def inspect(file: Path, target: str | None, json_path: Path | None) -> None:
    """Show the operators, types and sizes of FILE, any .tflite.

    Types are those of an operator's weights and of its outputs.
    """
    from tflite_export.devices import checks

    blob = file.read_bytes()
    found = tflite_export.inspect(blob)
    arena = _arena_words(blob)
    estimate, notes = checks.check_file(blob, found, target)
    lines = []
    if estimate is not None:
        on_npu = estimate.operators - len(estimate.fallbacks)
        lines.append(
            f"{estimate.accelerator}: {on_npu} of {estimate.operators} operators on the NPU, "
            f"{estimate.cycles:,} cycles"
        )
        notes = tuple(f"on the CPU: {f.operator} '{f.tensor}'" for f in estimate.fallbacks)
    notes = (*found.decoding_notes(), *notes)
    table = {
        **dataclasses.asdict(found),
        "macs": found.macs,
        "float_operators": found.float_operators,
        "arena": arena,
        "target": target,
        "notes": [*lines, *notes],
    }
    if terminal.write_json(json_path, json_text(table, indent=1)):
        return
    _show_inspection(found, file.name)
    say(arena)
    for line in lines:
        click.echo(line)
    for line in notes:
        say(f"- {line}")


@main.command("to-c", short_help="Write a .tflite as C++ for TensorFlow Lite Micro.")
@click.argument("file", type=_BLOB)
@click.argument("old_directory", required=False, metavar="")
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="The directory."
)
@click.option("--name", help="Name of the model in C++; by default FILE's name.")
@click.option(
    "--data",
    type=_Data(),
    help="Inputs of the golden vectors, as the model or as the file takes them, .npy or .npz.",
)
@click.option(
    "--samples",
    default=2,
    show_default=True,
    type=click.IntRange(min=1),
    help="So many inputs: the first ones of --data, or random ones.",
)
@click.option(
    "--layout",
    type=click.Choice(("plain", "cmake", "zephyr", "arduino")),
    default="plain",
    show_default=True,
    help="What build the files are laid out for.",
)
@_JSON
def to_c(
    file: Path,
    old_directory: str | None,
    output: Path | None,
    name: str | None,
    data: Path | None,
    samples: int,
    layout: str,
    json_path: Path | None,
) -> None:
    """Write FILE, a .tflite, as C++ for TensorFlow Lite Micro into the directory -o."""
    if output is None or old_directory is not None:
        raise click.UsageError(
            f"Expected the directory as -o {old_directory or 'DIRECTORY'}, as every command names "
            f"what it writes. Received: {old_directory or 'none'}."
        )
    import numpy as np

    blob = file.read_bytes()
    given: Any = None
    if data is not None:
        read = _data_of_file(blob, data)
        batch = tflite_export.inspect(blob).inputs[0].shape[:1]
        first = slice(samples * max((1, *batch)))
        given = [array[first] for array in ([read] if isinstance(read, np.ndarray) else read)]
    with terminal.doing("running on TFLite Micro"):
        source = tflite_export.to_c(
            blob,
            output,
            name=name or file.stem,
            inputs=given,
            samples=samples,
            layout=layout,
        )
    result = {
        "files": [str(path) for path in source.files],
        "operators": [*source.operators],
        "arena_bytes": source.arena_bytes,
    }
    if terminal.write_json(json_path, json_text(result, indent=1)):
        return
    for path in source.files:
        click.echo(path)
    click.echo(f"{len(source.operators)} operators, arena {source.arena_bytes:,} bytes")


@main.command(short_help="Print a script for completion in bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes commands, options and names in SHELL.

    \b
    For bash:
    kqat completion bash > ~/.local/share/bash-completion/completions/kqat
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, shell
    click.echo(found(main, {}, "kqat", "_KQAT_COMPLETE").source())


def _load(path: Path) -> Any:
    """The model of a file, of Keras 3 or older."""
    meta = click.get_current_context().meta
    with terminal.doing(f"loading {path.name}"):
        if not isinstance(found := meta.get(_CODES, ()), dict):
            found = meta[_CODES] = _defined_in(found)
        return kqat.load_model(path, custom_objects=found)


def _defined_in(paths: Sequence[Path]) -> dict[str, Any]:
    """The classes and functions of Python files, by name. Running them registers others."""
    import runpy

    found: dict[str, Any] = {}
    for path in paths:
        # As for a script of its own, so that it can import its neighbours.
        folder = str(path.parent.resolve())
        sys.path.insert(0, folder)
        try:
            names = runpy.run_path(str(path), run_name=path.stem)
        except SystemExit as error:
            raise ModelError(
                f"Expected Python in '{path}' that only defines layers and functions. Received: a "
                f"script that ends the process ({error.code!r}), as one that reads its own options "
                "does. Put what it does below: if __name__ == '__main__'."
            ) from error
        except Exception as error:
            raise ModelError(
                f"Expected Python in '{path}' that runs. Received: {type(error).__name__}: {error}"
            ) from error
        finally:
            # The file may have changed the list as well.
            if folder in sys.path:
                sys.path.remove(folder)
        own = (name for name, value in names.items() if callable(value))
        found |= {
            name: names[name]
            for name in own
            if getattr(names[name], "__module__", None) == path.stem
        }
    return found


def _sizes(text: str) -> tuple[int, ...]:
    """The shape that `--input-shape` names."""
    sizes = text.replace("x", ",").strip("(), ").split(",")
    if not all(size.strip().isdigit() for size in sizes):
        raise click.UsageError(f"Expected --input-shape as 96,96,3. Received: {text!r}.")
    return tuple(int(size) for size in sizes)


def _quantized(
    model: Path,
    data: Path,
    policy: str,
    rules: tuple[str, ...],
    calibration: str | None,
    check: Any = None,
) -> Any:
    from kqat.api import quantized_and_plan

    chosen, loaded = _policy(policy, rules), _load(model)
    given = _data_for(loaded, data)
    with terminal.progress():
        return quantized_and_plan(loaded, chosen, given, calibration, check=check)[0]


def _check_apart(output: Path, *inputs: Path) -> None:
    """Checks that a command does not write over what it reads."""
    for path in inputs:
        if output.exists() and output.samefile(path):
            raise click.UsageError(
                f"Expected another name for what is written. Received: -o {output}, the file that "
                "is read."
            )


def _check_tflite_name(path: Path) -> None:
    if path.suffix in (".keras", ".h5", ".hdf5"):
        raise click.UsageError(
            f"Expected the name of a .tflite file. Received: {path}, a name of Keras models."
        )


def _check_keras_name(path: Path) -> None:
    if path.suffix != ".keras":
        raise click.UsageError(f"Expected a name that ends in .keras. Received: {path}.")


def _save_keras(model: Any, path: Path, json_path: Path | None) -> None:
    save_model(model, path)
    result = {"file": str(path), "size_bytes": path.stat().st_size}
    if not terminal.write_json(json_path, json_text(result)):
        click.echo(path)


def _convert(qat: Any, path: Path, json_path: Path | None, **options: Any) -> None:
    """Converts with the options of `tflite_export.convert`, saves the file and tells of it."""
    with terminal.doing("converting"):
        blob = tflite_export.convert(qat, **options)
    tflite_export.save(blob, path)
    found = tflite_export.inspect(blob)
    result = {
        "file": str(path),
        "size_bytes": len(blob),
        "operators": len(found.operators),
        "float_operators": found.float_operators,
    }
    if not terminal.write_json(json_path, json_text(result)):
        click.echo(f"{path}: {len(blob):,} bytes")
        if found.float_operators:
            say(
                f"{found.float_operators} of {len(found.operators)} operators read or write "
                f"floats: `kqat inspect {path}` lists them."
            )


def _data_for(model: Any, path: Path) -> Any:
    """The inputs of a Keras model, from a file."""
    from kqat.graph import input_shapes

    return for_inputs(read_data(path), path, input_shapes(model))


def _data_of_file(blob: bytes, path: Path) -> Any:
    """The inputs of a .tflite, in its order, from a file."""
    found = tflite_export.inspect(blob).inputs
    given = for_inputs(read_data(path), path, {t.name: t.shape[1:] for t in found})
    return [given[tensor.name] for tensor in found] if isinstance(given, dict) else given


def _is_of(target: str, runtime: str) -> bool:
    """Whether the runtime runs the target's files: TFLite Micro, or one of LiteRT's kernel sets."""
    return (runtime in LITERT) == (TARGETS[target].runtime in LITERT)


def _policy(policy: str, rules: tuple[str, ...]) -> Any:
    parsed: list[tuple[str, str | None]] = []
    for rule in rules:
        pattern, sign, preset = rule.partition("=")
        if not (pattern and sign and preset):
            raise click.UsageError(f"Expected --layer PATTERN=PRESET. Received: {rule!r}.")
        _check_preset(preset, f"--layer {pattern}")
        parsed.append((pattern, None if preset == "float" else preset))
    if policy.endswith(".json"):
        if not Path(policy).is_file():
            raise click.UsageError(f"Expected a policy's file. Received: {policy}: no such file.")
        found = kqat.QuantizePolicy.load(policy)
        return dataclasses.replace(found, rules=(*parsed, *found.rules))
    _check_preset(policy, "--policy", " or a .json file")
    default: Any = None if policy == "float" else policy
    return kqat.QuantizePolicy(default=default, rules=tuple(parsed))


def _check_preset(name: str, option: str, more: str = "") -> None:
    """Checks the name of a preset; 'float' is one on the command line, but for a search."""
    with terminal.doing("loading Keras"):
        from kqat.config import PRESETS
        from kqat.grids import nearest_name

    known = [*PRESETS, *(["float"] if option != "--choice" else [])]
    if name not in known:
        raise PolicyError(
            f"Expected {option} to be one of {', '.join(known)}{more}. Received: '{name}'."
            + nearest_name(name, known)
        )


def _show_inspection(found: Any, name: str) -> None:
    say(
        f"{name}: {found.size_bytes:,} bytes, {len(found.operators)} operators, "
        f"{found.float_operators} of them float, {counted(found.macs)} "
        "multiply-accumulates"
    )
    for kind, tensors in (("input", found.inputs), ("output", found.outputs)):
        for tensor in tensors:
            say(f"{kind} '{tensor.name}': {_tensor_words(tensor)}")
    table = terminal.table(
        operator="cut", writes="cut", shape="right", types="right", MACs="right", bytes="right"
    )
    for operator in found.operators:
        written = operator.outputs[0] if operator.outputs else None
        types = [written.dtype if written else "", operator.weight_dtype or ""]
        table.add_row(
            operator.name,
            written.name if written else "",
            "×".join(map(str, written.shape)) if written else "",
            " ".join(filter(None, reversed(types))),
            counted(operator.macs),
            counted(operator.constant_bytes),
        )
    terminal.show(table)


def _tensor_words(tensor: Any) -> str:
    shape = "×".join(map(str, tensor.shape)) or "scalar"
    grid = "" if tensor.scale is None else f", scale {tensor.scale:.6g}, zero {tensor.zero_point}"
    return f"{tensor.dtype} {shape}{grid}"


def _arena_words(blob: bytes) -> str:
    from tflite_export.runtimes import supports, tflite_micro_arena_bytes

    if not supports("tflite_micro"):
        return "arena not measured: TFLite Micro is not installed (pip install 'kqat[tflm]')"
    try:
        return f"arena {tflite_micro_arena_bytes(blob):,} bytes (TFLite Micro, 64-bit host)"
    except KqatError as error:
        return f"TFLite Micro does not run it: {error}"


if __name__ == "__main__":
    run()
