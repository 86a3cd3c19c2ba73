"""Code that the recipes share: options, the measurement of a file, printing and saving."""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

import kqat
import tflite_export
from kqat.base import write_file
from recipes.converter import float_tflite, packed
from recipes.data import Samples
from recipes.timing import machine
from tflite_export import flatbuffer
from tflite_export.runtimes import run, tflite_micro_arena_bytes

# LiteRT's default CPU path is the fastest, so whole test sets run on it.
ACCURACY_RUNTIME = "litert"
BATCH_SIZE = 256

LEGEND = """\
accuracy   of the .tflite itself, over the whole test set, on LiteRT (XNNPACK);
           of the Keras model where no .tflite is shown
arena      as TFLite Micro uses it on this 64-bit host
lockstep   largest difference of any operator from the Keras model, in output
           steps, on {runtimes}
agreement  share of the test set on which the .tflite and the Keras model that
           it was made of name the same class"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The row of one file in a table; `None` for a column that does not apply.

    Attributes:
        accuracy: of the file itself on LiteRT, over the whole test split, 0..1; without a file,
            of the Keras model.
        arena_bytes: what TFLite Micro uses on this 64-bit host.
        lockstep_steps: runtime -> largest difference of any value in lockstep, in output steps;
            a runtime that did not run the file is left out.
        top1_agreement: share of the test split on which the file and the Keras model that it
            was made of name the same class.
    """

    name: str
    accuracy: float
    file_bytes: int | None = None
    arena_bytes: int | None = None
    lockstep_steps: Mapping[str, int] | None = None
    top1_agreement: float | None = None


def parser(
    description: str | None, *, out: str, reads_data: bool = True
) -> argparse.ArgumentParser:
    """The options of every recipe; `description` is its docstring, `out` its default folder."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path(out), help="folder for what is written")
    if reads_data:
        options.add_argument(
            "--data", type=Path, help="folder of data/ and models/ (else KQAT_DATA)"
        )
    options.add_argument("--seed", type=int, default=0, help="of weights and batch order")
    options.add_argument("--smoke", action="store_true", help="one step on made-up data")
    return options


def start(options: argparse.Namespace) -> None:
    """Sets all random seeds, sets the data folder and makes the output folder.

    On a CPU, equal seeds then give equal bytes. A GPU also needs
    `tf.config.experimental.enable_op_determinism()`, which cannot be switched off again.
    """
    keras.utils.clear_session()  # Layers without a name are numbered, and names are in the file.
    keras.utils.set_random_seed(options.seed)
    if getattr(options, "data", None) is not None:
        os.environ["KQAT_DATA"] = str(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    commit_at_start()


def predict(
    blob: bytes, inputs: Sequence[np.ndarray], *, runtime: str = ACCURACY_RUNTIME
) -> list[np.ndarray]:
    """A file's outputs as floats, for float inputs of shape (samples, …) in the file's order."""
    graph = flatbuffer.read(blob).subgraphs[0]
    feeds = [
        _to_integers(x, graph.tensors[index]) for x, index in zip(inputs, graph.inputs, strict=True)
    ]
    outputs = run(blob, feeds, runtime=runtime).outputs
    return [_to_floats(y, graph.tensors[i]) for y, i in zip(outputs, graph.outputs, strict=True)]


def first(x: Any, count: int) -> Any:
    """The first `count` samples of an array, or of a list or dict of arrays."""
    return keras.tree.map_structure(lambda array: array[:count], x)


def keras_outputs(model: keras.Model, x: Any) -> np.ndarray:
    """The outputs of a model of one output for `x`, batch by batch."""
    # Not by `predict`, which traces again for every model and for every last batch.
    arrays = keras.tree.flatten(x)
    outputs = []
    for start in range(0, len(arrays[0]), BATCH_SIZE):
        batch = [array[start : start + BATCH_SIZE] for array in arrays]
        outputs.append(model(packed(model, batch), training=False))
    return np.concatenate([np.asarray(y) for y in outputs])


def measure_keras(name: str, model: keras.Model, test: Samples) -> Row:
    """The row of a model of one output that is not converted."""
    return Row(name=name, accuracy=accuracy(keras_outputs(model, test[0]), test[1]))


def measure_float(name: str, model: keras.Model, test: Samples) -> Row:
    """The row of a float model of one input and one output, converted without quantization."""
    blob = float_tflite(model)
    row = measure_file(name, blob, test)
    return dataclasses.replace(row, top1_agreement=_agreement(model, blob, test[0]))


def measure_file(name: str, blob: bytes, test: Samples) -> Row:
    """The row of a file without its Keras model."""
    x, y = test
    (outputs,) = predict(blob, keras.tree.flatten(x))
    return Row(
        name=name,
        accuracy=accuracy(outputs, y),
        file_bytes=len(blob),
        arena_bytes=_arena_bytes(blob),
    )


def measure_integer(
    name: str, qat: keras.Model, blob: bytes, test: Samples, *, lockstep_samples: int = 64
) -> tuple[Row, tflite_export.Report]:
    """The row of `blob`, the file of `qat`, and the report of its verification on three runtimes.

    Raises:
        RuntimeError: if some value of the model was not found in the file.
    """
    report = tflite_export.verify(qat, blob, test[0], samples=lockstep_samples)
    for part in report.runtimes:
        if part.problem is None and (part.unmatched or not part.sites):
            raise RuntimeError(
                f"Expected all values of '{name}' in its file. Received: {part.runtime} has no "
                f"value to compare for {list(part.unmatched) or 'any'}."
            )
    row = dataclasses.replace(
        measure_file(name, blob, test),
        lockstep_steps={p.runtime: p.max_steps for p in report.runtimes if p.problem is None},
        top1_agreement=_agreement(qat, blob, test[0]),
    )
    return row, report


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose largest output, of shape (samples, classes), is the label's."""
    return float(np.mean(outputs.argmax(-1) == labels))


def sqnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Signal-to-noise ratio of `found` against `expected`, of one shape, in dB.

    Where all are equal it is that of a difference of one float32 in its last place, in one value.
    """
    noise = np.sum(np.square(expected - found), dtype=np.float64)
    signal = np.sum(np.square(expected), dtype=np.float64)
    least = np.square(np.finfo(np.float32).eps) * signal / max(expected.size, 1)
    return float(10 * np.log10(signal / max(noise, least)))


class Table(NamedTuple):
    """A table of text, to print and for RESULTS.md; `legend` explains its columns."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    legend: str = ""


def row_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """The table of rows as results.json holds them: name -> fields of a `Row`."""
    header = ("", "accuracy", "file bytes", "arena bytes", "lockstep", "agreement")
    read = [Row(**row) for row in rows.values()]
    runtimes = dict.fromkeys(name for row in read for name in row.lockstep_steps or ())
    cells = [
        (
            row.name,
            percent(row.accuracy),
            counted(row.file_bytes),
            counted(row.arena_bytes),
            "-" if row.lockstep_steps is None else steps(max(row.lockstep_steps.values())),
            percent(row.top1_agreement),
        )
        for row in read
    ]
    return Table(title, header, cells, LEGEND.format(runtimes=", ".join(runtimes)))


def network_tables(results: Mapping[str, Any]) -> list[Table]:
    """The table of a recipe with `--network`, from what its results.json holds."""
    title = (
        f"{results['options']['network']}, {results['test_samples']:,} test samples, "
        f"{results['float_operators']} float operators"
    )
    return [row_table(title, results["rows"])]


def show(tables: Iterable[Table]) -> None:
    """Prints tables, each with its title and legend."""
    shown = list(tables)
    for one in shown:
        print(f"\n{one.title}\n{table(one.header, one.rows)}\n")
    for legend in dict.fromkeys(one.legend for one in shown if one.legend):
        print(legend)


def as_json(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Name -> the row, as plain JSON types."""
    return {row.name: dataclasses.asdict(row) for row in rows}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns below a header line: the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join([first, *others])

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def percent(share: float | None) -> str:
    """0.9298 as "92.98 %"."""
    return "-" if share is None else f"{100 * share:.2f} %"


def percents(shares: Sequence[float]) -> str:
    """Of several seeds: 0.92, 0.94 as "93.00 % (92.00–94.00, n = 2)"; of one, its percentage."""
    if len(shares) < 2:
        return percent(shares[0] if shares else None)
    mean = sum(shares) / len(shares)
    return f"{percent(mean)} ({100 * min(shares):.2f}–{100 * max(shares):.2f}, n = {len(shares)})"


def counted(size: int | None) -> str:
    """50108 as "50,108"."""
    return "-" if size is None else f"{size:,}"


def steps(count: int) -> str:
    """1 as "1 step"."""
    return f"{count} step" if count == 1 else f"{count} steps"


def save_results(
    options: argparse.Namespace,
    recipe: str,
    results: Mapping[str, Any],
    *,
    package: str = "recipes",
) -> dict[str, Any]:
    """Writes results.json with results, settings and machine to the output folder; returns it."""
    whole = {
        "recipe": recipe,
        "command": _command(options, f"{package}.{recipe}"),
        "options": settings(options),
        "kqat": kqat.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit_at_start(),
        "machine": machine(),
        **results,
    }
    write_file(options.out / "results.json", json.dumps(whole, indent=1).encode())
    return whole


@functools.cache
def commit_at_start() -> str | None:
    """The commit of this checkout, with a `+` if files differ from it; `None` outside of git.

    As it is when this is first called: a recipe runs for hours, on what it has imported.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that influence the results; not the folders to read from and write to."""
    return {name: value for name, value in vars(options).items() if name not in ("out", "data")}


def _command(options: argparse.Namespace, module: str) -> str:
    words = [f"python -m {module}"]
    for name, value in settings(options).items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def _agreement(model: keras.Model, blob: bytes, x: Any) -> float:
    return accuracy(predict(blob, keras.tree.flatten(x))[0], keras_outputs(model, x).argmax(-1))


def _arena_bytes(blob: bytes) -> int | None:
    """The arena in bytes; `None` if TFLite Micro is not installed or lacks a kernel."""
    try:
        return tflite_micro_arena_bytes(blob)
    except kqat.RuntimeUnavailableError:
        return None


def _to_integers(x: np.ndarray, tensor: Any) -> np.ndarray:
    dtype = flatbuffer.tensor_dtype(tensor)
    # Token numbers are integers already, and masks truth values.
    if dtype.kind in "fb" or x.dtype.kind in "iu":
        return np.asarray(x, dtype)
    limits = np.iinfo(dtype)
    scale, zero_point = tensor.quantization.scale[0], int(tensor.quantization.zeroPoint[0])
    rounded = np.floor(np.asarray(x, np.float32) / scale + np.float32(0.5)) + zero_point
    return np.clip(rounded, limits.min, limits.max).astype(dtype)


def _to_floats(y: np.ndarray, tensor: Any) -> np.ndarray:
    if y.dtype.kind == "f":
        return y
    scale, zero_point = tensor.quantization.scale[0], int(tensor.quantization.zeroPoint[0])
    return (y.astype(np.float32) - zero_point) * np.float32(scale)
