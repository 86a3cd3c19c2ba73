"""The command `kqat`: from a saved Keras model to a verified file, without a script.

Exit codes: 0 for success; 1 if a check found a fault (a file differs from its model, a layer does
not fit the device); 2 for an error, with one message and no traceback.
"""

import io
import sys
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import kqat
import tflite_export
from kqat.base import ExportError, KqatError, ModelError, save_model
from kqat.devices import LITERT, TARGETS
from tflite_export.devices import checks
from tflite_export.runtimes import tflite_micro_arena_bytes
from tflite_export.verification import DEFAULT_RUNTIMES, html_page

# The width of help, tables and messages: that of a standard terminal.
WIDTH = 80
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW = click.Path(dir_okay=False, path_type=Path)
_TARGET = click.option(
    "--target", type=click.Choice(sorted(TARGETS)), help="The device that will run the file."
)
_POLICY = click.option(
    "--policy", default="int8", show_default=True, help="A preset's name, or 'float'."
)
_LAYERS = click.option(
    "--layer",
    "rules",
    multiple=True,
    metavar="PATTERN=PRESET",
    help="Another preset, or 'float', for layers of this name. Can be given repeatedly.",
)


class _Quiet(click.Group):
    """A group whose commands report an error as one message, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = _note
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            known = isinstance(error, KqatError | OSError)
            ending = "" if known else " (unexpected: `kqat --debug …` shows where it comes from)"
            kind = "" if known else f"{type(error).__name__}: "
            words = f"Error: {kind}{error}{ending}"
            click.echo(textwrap.fill(words, WIDTH, subsequent_indent="  "), err=True)
            ctx.exit(2)


@click.group(cls=_Quiet, context_settings={"max_content_width": WIDTH})
@click.version_option(version=kqat.__version__, prog_name="kqat")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def main(debug: bool) -> None:
    """Quantization-aware training for Keras 3, shipped as a full-integer .tflite."""


@main.command()
@click.argument("model", type=_FILE)
@_POLICY
@_LAYERS
@_TARGET
@click.option("--json", "json_path", type=_NEW, help="Also write the plan to this file.")
@click.option(
    "--draw", "picture", type=_NEW, help="Also draw it: a .svg, .html, .mmd (Mermaid) or .dot file."
)
def plan(
    model: Path,
    policy: str,
    rules: tuple[str, ...],
    target: str | None,
    json_path: Path | None,
    picture: Path | None,
) -> None:
    """Show how every layer of MODEL, a .keras file, would be quantized.

    With --target, the exit code is 1 if the device cannot run a layer at all.
    """
    found = kqat.plan(_load(model), _policy(policy, rules), target=target)
    if json_path is not None:
        found.save(json_path)
    if picture is not None:
        found.draw(picture)
    click.echo(found.text(WIDTH))
    if any(misfit.blocking for misfit in found.misfits):
        sys.exit(1)


@main.command()
@click.argument("model", type=_FILE)
@click.option("--target", type=click.Choice(sorted(TARGETS)), required=True)
@click.option("-o", "--output", type=_NEW, required=True, help="The adapted .keras file.")
def adapt(model: Path, target: str, output: Path) -> None:
    """Replace activations of MODEL that a device does not run fast, keeping the weights."""
    _save_keras(kqat.adapt(_load(model), target), output)


@main.command()
@click.argument("model", type=_FILE)
@click.option("--data", type=_FILE, required=True, help="Typical inputs, .npy or .npz.")
@click.option("-o", "--output", type=_NEW, required=True, help="The QAT model, a .keras file.")
@_POLICY
@_LAYERS
def quantize(model: Path, data: Path, output: Path, policy: str, rules: tuple[str, ...]) -> None:
    """Make a QAT model from MODEL and calibrate it on --data, to be trained or converted."""
    chosen, given = _policy(policy, rules), _data(data)
    _save_keras(kqat.quantize_model(_load(model), chosen, calibration_data=given), output)


@main.command()
@click.argument("qat", type=_FILE)
@click.option("-o", "--output", type=_NEW, required=True, help="The .tflite file.")
@_TARGET
@click.option("--input-type", help="int8, int16, uint8 or float32; by default the plan's type.")
@click.option("--output-type", help="The same for outputs.")
@click.option("--batch-size", default=1, show_default=True, help="Samples per invocation.")
@click.option(
    "--compress",
    type=click.Choice(["lookup", "smallest"]),
    help="Encode weights for TFLite Micro's DECODE; needs a TFLite Micro target.",
)
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
) -> None:
    """Convert QAT, the .keras file of a QAT model, to a full-integer .tflite."""
    blob = tflite_export.convert(
        _load(qat),
        inference_input_type=input_type,
        inference_output_type=output_type,
        target=target,
        batch_size=batch_size,
        compress=compress,
        float_weights=float_weights,
        weights=weights,
    )
    tflite_export.save(blob, output)
    click.echo(f"{output}: {len(blob):,} bytes")


@main.command()
@click.argument("paths", nargs=-1, required=True, type=_FILE, metavar="[QAT] FILE")
@click.option("--data", type=_FILE, help="Inputs, .npy or .npz; random if QAT is not given.")
@click.option("--html", type=_NEW, help="Write the report to this file as one HTML page.")
@click.option("--json", "json_path", type=_NEW, help="Write the report to this file as JSON.")
@click.option("--samples", default=64, show_default=True, type=click.IntRange(min=1))
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
    values of QAT are missing in the file: then it is not that model's file.
    """
    if len(paths) > 2:
        raise click.UsageError("Expected one .tflite, with or without the .keras file before it.")
    if len(paths) == 2 and data is None:
        raise click.UsageError("Expected --data: inputs on which to compare with the QAT model.")
    qat = _load(paths[0]) if len(paths) == 2 else None
    given = None if data is None else _data(data)
    runtimes = [r for r in DEFAULT_RUNTIMES if target is None or _is_of(target, r)]
    report = tflite_export.verify(
        qat, paths[-1].read_bytes(), given, runtimes=runtimes, samples=samples, target=target
    )
    if html is not None:
        report.save_html(html)
    if json_path is not None:
        report.save(json_path)
    click.echo(str(report))
    parts = report.runtimes
    ran = [part for part in parts if part.problem is None]
    wrong = not ran or not all(part.is_right for part in parts)
    missed = any(part.unmatched or (qat is not None and not part.sites) for part in ran)
    if wrong or missed:
        sys.exit(1)


@main.command()
@click.argument("model", type=_FILE)
@click.argument("qat", type=_FILE)
@click.option("--data", type=_FILE, required=True, help="Typical inputs, .npy or .npz.")
@click.option("--html", type=_NEW, help="Write the diagnosis to this file as one HTML page.")
@click.option("--json", "json_path", type=_NEW, help="Write the diagnosis to this file as JSON.")
@click.option("--remedies/--no-remedies", default=True, help="Whether to try what could help.")
def diagnose(
    model: Path,
    qat: Path,
    data: Path,
    html: Path | None,
    json_path: Path | None,
    remedies: bool,
) -> None:
    """Show where QAT, made of the float MODEL, loses, why, and what helps."""
    found = kqat.diagnose(_load(model), _load(qat), _data(data), remedies=remedies)
    if html is not None:
        found.save_html(html)
    if json_path is not None:
        found.save(json_path)
    click.echo(str(found))


@main.command()
@click.argument("file", type=_FILE)
@_TARGET
def inspect(file: Path, target: str | None) -> None:
    """Show the operators, types and sizes of FILE, any .tflite.

    Types are those of an operator's weights and of its outputs.
    """
    blob = file.read_bytes()
    found = tflite_export.inspect(blob)
    _show_inspection(found, file.name)
    _say(_arena_words(blob))
    estimate, notes = checks.check_file(blob, found, target)
    if estimate is not None:
        on_npu = estimate.operators - len(estimate.fallbacks)
        click.echo(
            f"{estimate.accelerator}: {on_npu} of {estimate.operators} operators on the NPU, "
            f"{estimate.cycles:,} cycles"
        )
        notes = tuple(f"on the CPU: {f.operator} '{f.tensor}'" for f in estimate.fallbacks)
    for note in (*found.decoding_notes(), *notes):
        _say(f"- {note}")


@main.command("to-c")
@click.argument("file", type=_FILE)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", help="Name of the model in C++; by default FILE's name.")
@click.option(
    "--data", type=_FILE, help="Inputs of the golden vectors in the file's types, .npy or .npz."
)
@click.option(
    "--samples", default=2, show_default=True, help="Number of random inputs without --data."
)
@click.option(
    "--layout",
    type=click.Choice(("plain", "cmake", "zephyr", "arduino")),
    default="plain",
    show_default=True,
    help="What build the files are laid out for.",
)
def to_c(
    file: Path, directory: Path, name: str | None, data: Path | None, samples: int, layout: str
) -> None:
    """Write FILE, a .tflite, as C++ for TensorFlow Lite Micro into DIRECTORY."""
    given: Any = None if data is None else _data(data)
    if isinstance(given, Mapping):
        given = list(given.values())
    source = tflite_export.to_c(
        file.read_bytes(),
        directory,
        name=name or file.stem,
        inputs=[given] if isinstance(given, np.ndarray) else given,
        samples=samples,
        layout=layout,
    )
    for path in source.files:
        click.echo(path)
    click.echo(f"{len(source.operators)} operators, arena {source.arena_bytes:,} bytes")


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(textwrap.fill(f"Note: {message}", WIDTH, subsequent_indent="  "), err=True)


def _print(table: Table) -> None:
    with io.StringIO() as text:
        Console(file=text, width=WIDTH, highlight=False).print(table)
        click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def _load(path: Path) -> Any:
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises errors of any type for a file that is not a model.
        raise ModelError(
            f"Expected a model that Keras {keras.__version__} can load. Received: {path}: {error}"
        ) from error


def _save_keras(model: Any, path: Path) -> None:
    if path.suffix != ".keras":
        raise click.UsageError(f"Expected a name that ends in .keras. Received: {path}.")
    save_model(model, path)
    click.echo(path)


def _data(path: Path) -> Any:
    """Reads an array from .npy, or a mapping from input names to arrays from .npz."""
    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, OSError, EOFError) as error:
        raise ExportError(
            f"Expected a .npy or .npz file of numbers. Received: {path}: {error}"
        ) from error


def _is_of(target: str, runtime: str) -> bool:
    """Whether the runtime runs the target's files: TFLite Micro, or one of LiteRT's kernel sets."""
    return (runtime in LITERT) == (TARGETS[target].runtime in LITERT)


def _policy(policy: str, rules: tuple[str, ...]) -> Any:
    default: Any = None if policy == "float" else policy
    parsed: list[tuple[str, str | None]] = []
    for rule in rules:
        pattern, sign, preset = rule.partition("=")
        if not (pattern and sign and preset):
            raise click.UsageError(f"Expected --layer PATTERN=PRESET. Received: {rule!r}.")
        parsed.append((pattern, None if preset == "float" else preset))
    return kqat.QuantizePolicy(default=default, rules=tuple(parsed))


def _table(**columns: str) -> Table:
    """A table of 80 columns: header -> how a column is laid out: left, right, cut or fold."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, kind in columns.items():
        table.add_column(
            name,
            justify="right" if kind == "right" else "left",
            no_wrap=kind != "fold",
            overflow="fold" if kind == "fold" else "ellipsis",
            max_width=21 if kind == "cut" else None,
        )
    return table


def _say(words: str) -> None:
    """Prints text in lines of 80 characters."""
    click.echo(textwrap.fill(words, WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def _show_inspection(found: Any, name: str) -> None:
    _say(
        f"{name}: {found.size_bytes:,} bytes, {len(found.operators)} operators, "
        f"{found.float_operators} of them float, {html_page.counted(found.macs)} "
        "multiply-accumulates"
    )
    for kind, tensors in (("input", found.inputs), ("output", found.outputs)):
        for tensor in tensors:
            _say(f"{kind} '{tensor.name}': {_tensor_words(tensor)}")
    table = _table(
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
            html_page.counted(operator.macs),
            html_page.counted(operator.constant_bytes),
        )
    _print(table)


def _tensor_words(tensor: Any) -> str:
    shape = "×".join(map(str, tensor.shape)) or "scalar"
    grid = "" if tensor.scale is None else f", scale {tensor.scale:.6g}, zero {tensor.zero_point}"
    return f"{tensor.dtype} {shape}{grid}"


def _arena_words(blob: bytes) -> str:
    try:
        return f"arena {tflite_micro_arena_bytes(blob):,} bytes (TFLite Micro, 64-bit host)"
    except KqatError as error:
        return f"TFLite Micro does not run it: {error}"


if __name__ == "__main__":
    main()
