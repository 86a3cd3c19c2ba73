"""What the command prints and how it ends: messages, tables, JSON, progress, quiet libraries."""

import contextlib
import faulthandler
import io
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from kqat.base import listening, write_file

# The width of help, tables and messages: that of a standard terminal.
WIDTH = 80


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps what TensorFlow and LiteRT write from C++ away from the terminal meanwhile.

    They write to the file descriptor of stderr, whatever Python's `sys.stderr` is. That descriptor
    is a temporary file meanwhile, and `sys.stderr` a copy of the real one. A crash in C++ is told
    by `faulthandler`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow says on import that it found no GPU driver, and that oneDNN is on.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    sys.stderr.flush()
    python = sys.stderr
    descriptor = os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        sys.stderr = open(  # noqa: PTH123
            descriptor, "w", buffering=1, encoding=python.encoding, errors="backslashreplace"
        )
        faulthandler.enable(file=sys.stderr, all_threads=False)
        try:
            yield
        finally:
            faulthandler.disable()
            sys.stderr.flush()
            os.dup2(descriptor, 2)
            # Those who still hold it, as loggers do, may write to it until the process ends.
            sys.stderr = python


# What messages of the library say in Python -> the same on the command line. Options that differ
# from their argument by more than dashes have a row of their own.
_OPTIONS = "target|compress|float_weights|weights|batch_size|measure|layout|samples|budget"
_IN_SHELL = (
    (r"the argument (\w+)= of tflite_export\.(\w+)", r"the option --\1 of `kqat \2`"),
    (r"policy=\{'([^']+)': None\}", r"--layer \1=float"),
    (r"kqat\.quantize_model(\([^)]*\))? or kqat\.plan\b", "`kqat plan`"),
    (r"kqat\.quantize_model\(…, preserve='sparsity'\) or 'clusters'", r"\g<0> in Python"),
    (r"kqat\.quantize_model\b(\((?!…)[^)]*\))?", "`kqat quantize`"),
    (r"kqat\.adapt\(model, calibration_data=…\)", "`kqat adapt --data …`"),
    (r"kqat\.(plan|adapt|calibrate|diagnose|search)\b(\([^)]*\))?", r"`kqat \1`"),
    (r"tflite_export\.(convert|verify|inspect)\b(\([^)]*\))?", r"`kqat \1`"),
    (r"tflite_export\.to_c\b(\([^)]*\))?", "`kqat to-c`"),
    (r"\binput_shapes=\(([\d, ]+?),?\)", r"--input-shape \1"),
    (r"\bcalibration_data\b", "--data"),
    (r"\binference_(input|output)_type\b", r"--\1-type"),
    (r"\bcalibration='?(\w+)'?", r"--calibration \1"),
    (rf"\b({_OPTIONS})=None", r"no --\1"),
    (rf"\b({_OPTIONS})='?([\w.]+)'?", r"--\1 \2"),
    (rf"\b([Ll]eave) ({_OPTIONS}) out\b", r"\1 --\2 out"),
    (
        r"Give classes and functions of its own as custom_objects\b",
        "Give the Python file that defines its own classes and functions as --code FILE",
    ),
    (r"\bGive them as custom_objects\b", "Give the Python file that defines them as --code FILE"),
)


def in_shell_words(text: str) -> str:
    """A message of the library with commands and options in the place of functions and arguments.

    What has no command, such as `kqat.register_layer`, stays as it is.
    """
    for pattern, words in _IN_SHELL:
        text = re.sub(pattern, words, text)
    text = re.sub(r"--[a-z_]+", lambda found: found[0].replace("_", "-"), text)
    return re.sub(r"(--input-shape )([\d, ]+)", lambda m: m[1] + m[2].replace(", ", ","), text)


def tell(text: str) -> None:
    """Prints a message on stderr, in lines of 80 characters."""
    click.echo(filled(text), err=True)


def filled(text: str, indent: int = 0) -> str:
    """`text` in lines of 80 characters; `indent` characters stand before it in the first line."""
    made = textwrap.fill(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent="  ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return made[indent:]


def note(message: Warning | str, *_: Any, **__: Any) -> None:
    """Prints a note on stderr; stands for `warnings.showwarning`."""
    tell(f"Note: {in_shell_words(str(message))}")


def say(words: str) -> None:
    """Prints text in lines of 80 characters."""
    click.echo(filled(words))


def show_text(text: str) -> None:
    """Prints text of several lines; those of more than 80 characters are broken between words."""
    for line in text.splitlines():
        click.echo(line if len(line) <= WIDTH else filled(line))


def write_json(path: Path | None, text: str) -> bool:
    """Writes JSON where `--json` says; whether that is stdout, which then shows nothing else."""
    if path is None:
        return False
    if str(path) == "-":
        click.echo(text)
        return True
    write_file(path, text.encode())
    return False


def table(**columns: str) -> Table:
    """A table of 80 columns: header -> how a column is laid out: left, right, cut or fold."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, kind in columns.items():
        made.add_column(
            name,
            justify="right" if kind == "right" else "left",
            no_wrap=kind != "fold",
            overflow="fold" if kind == "fold" else "ellipsis",
            max_width=21 if kind == "cut" else None,
        )
    return made


def show(made: Table) -> None:
    """Prints a table on stdout, without spaces at the ends of lines."""
    with io.StringIO() as text:
        Console(file=text, width=WIDTH, highlight=False).print(made)
        click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


@contextlib.contextmanager
def doing(words: str) -> Iterator[None]:
    """Says on stderr what goes on, for as long as it does, if that is a terminal.

    For what has no steps to count. Not inside of `progress`, nor around it.
    """
    console = Console(file=sys.stderr, width=WIDTH)
    if not console.is_terminal:
        yield
        return
    with console.status(textwrap.shorten(words, WIDTH - 4, placeholder=" …")):
        yield


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """Shows bars on stderr for the tracked loops inside, if that is a terminal."""
    console = Console(file=sys.stderr, width=WIDTH)
    if not console.is_terminal:
        yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def listener(doing: str, done: int, total: int | None) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing, total=total)
            bars.update(tasks[doing], completed=done, total=total, visible=done != total)

        with listening(listener):
            yield
