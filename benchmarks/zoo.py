"""Architectures of other people's collections: quantized, trained for a step, converted, verified.

    python -m benchmarks.zoo [--out out/zoo] [--only BERT ViT] [--seconds 400]

Needs the extra `zoo` (KerasHub, kimm, keras-tcn, …). Weights are random, so only operators, bytes
and signal-to-noise ratios mean something. Each architecture runs in a process of its own, with a
limit of processor time, and its row is a file of `--out`: a run that was stopped goes on where it
ended, and `--only` runs rows anew. With no `--only` the table is written to `benchmarks/zoo.md` and
`benchmarks/zoo.json`, once all rows are there; with `--no-run`, of those that are. Beside ours
stands what TensorFlow's converter makes of the same float model with the same calibration data
(post-training, full integer).
"""

import argparse
import dataclasses
import json
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from benchmarks.zoo_models import MODELS, TOKENS, VOCABULARY
from kqat.base import decimal, write_file
from kqat.freezing import freeze
from kqat.graph.keras_internals import parts_of
from recipes import converter, running
from recipes.running import Table

KEPT = Path(__file__).with_name("zoo.json")
SAMPLES, VERIFIED = 16, 2
# A network that leaves less than this many dB of either file amplifies rounding so far that the
# ratio depends on the weights drawn more than on the tool: there it is the mean of several draws,
# and of more where the mean of the first lies beyond the bound. So it is where the first draw is
# below the converter's at all, as one draw may be 2 dB off. Not only where it is beyond the bound:
# of these the mean would say how unlucky the first was, and nothing of those just within.
# Where those leave it open on which side of the bound the mean lies, it is that of the most draws.
CHAOTIC_DB, DRAWS, MORE_DRAWS, MOST_DRAWS = 15.0, 4, 12, 36
LOSS_DB = 0.5
# A mean of draws lies on one side of the bound if it is so many standard errors away from it: that
# of the differences within each draw, as both files are of the same weights.
RESOLVED = 2.0
RUNTIME = "litert"

LEGEND = """\
outcome    "integer": no float operator and at most 1 step in lockstep; else what stopped it
operators  in our file, and in that of TensorFlow's converter (post-training, int8)
bytes      likewise
SQNR       of the outputs against the float model's, in dB: ours, the converter's; with a spread
           in parentheses, the mean of 4 draws of the random weights, the smallest, the largest,
           and the mean of ours less the converter's ± its standard error; of 12 draws where the
           mean of the first 4 lies beyond the bound, of 36 where those leave it open
seconds    of the processor: quantize_model, convert"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one architecture; the converter's figures are `None` where it failed."""

    outcome: str
    operators: int | None = None
    size_bytes: int | None = None
    float_operators: int | None = None
    max_steps: dict[str, int | str] = dataclasses.field(default_factory=dict)
    unmatched: int | None = None
    # By runtime: integers of all operators that are not those of the integer model; or what it
    # does not know.
    differing: dict[str, int | str] = dataclasses.field(default_factory=dict)
    sqnr_db: float | None = None
    quantize_seconds: float | None = None
    convert_seconds: float | None = None
    converter_operators: int | None = None
    converter_bytes: int | None = None
    converter_sqnr_db: float | None = None
    converter_problem: str | None = None
    drawn_db: tuple[tuple[float, float], ...] = ()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the architectures that have no row yet, and those of `--only`; prints the table.

    Returns:
        What results.json of `--out` holds: of all architectures that have a row, or of `--only`.
    """
    options = _parser().parse_args(arguments)
    if options.one is not None:
        return _one(options)
    running.start(options)
    found: dict[str, Any] = {}
    for collection, name in _chosen(options):
        row = _kept(name, options) if options.only is None else None
        if row is None and options.no_run:
            continue
        found[name] = {"collection": collection, **(row or _apart(name, options))}
        if row is None:
            print(*_cells(name, found[name]), flush=True)
    results = running.save_results(options, "zoo", {"models": found}, package="benchmarks")
    if options.only is None:
        write_file(KEPT, json.dumps(results, indent=1).encode())
        write_file(KEPT.with_suffix(".md"), page(results).encode())
    running.show(tables(results))
    return results


def _chosen(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for collection, rows in MODELS.items():
        for name in rows:
            if options.only is None or name in options.only or collection in options.only:
                yield collection, name


def _row_file(name: str, options: argparse.Namespace) -> Path:
    return Path(options.out, "rows", re.sub(r"\W+", "_", name) + ".json")


def _kept(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The row of an earlier run; `None` if there is none."""
    path = _row_file(name, options)
    return json.loads(path.read_text()) if path.exists() else None


def _apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One architecture in a process of its own, which may be stopped or crash."""
    path = _row_file(name, options)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", name, "--out", str(options.out)]
    if options.no_converter:
        command.append("--no-converter")

    def limit() -> None:
        # Time of the processor, so that a busy machine stops no architecture.
        resource.setrlimit(resource.RLIMIT_CPU, (options.seconds, options.seconds + 10))

    child = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    if path.exists():
        return dict(json.loads(path.read_text()))
    if -child.returncode in (signal.SIGXCPU, signal.SIGKILL):
        outcome = Outcome(outcome=f"stopped after {options.seconds} s of the processor")
    else:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        outcome = Outcome(outcome=f"crashed: {last[:200]}")
    row = dataclasses.asdict(outcome)
    write_file(path, json.dumps(row).encode())
    return row


def _one(options: argparse.Namespace) -> dict[str, Any]:
    path = _row_file(options.one, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    model, inputs = _drawn(options.one, options.seed)
    theirs = {} if options.no_converter else _converters_once(model, inputs, path)
    found = run(model, inputs, theirs)
    if _needs_draws(found):
        del model
        found = _over_draws(found, options)
    outcome = {**dataclasses.asdict(found), "commit": _commit()}
    write_file(path, json.dumps(outcome).encode())
    return outcome


def _drawn(name: str, seed: int) -> tuple[keras.Model, Any]:
    """An architecture with random weights, and inputs for it."""
    build = next(rows[name] for rows in MODELS.values() if name in rows)
    keras.utils.set_random_seed(seed)
    model = build()
    inputs = typical_inputs(model, seed)
    settle(model, inputs)
    return model, inputs


def _needs_draws(found: Outcome) -> bool:
    """Whether one draw of the weights tells too little: see `CHAOTIC_DB`."""
    ours_db, theirs_db = found.sqnr_db, found.converter_sqnr_db
    if ours_db is None or theirs_db is None:
        return False
    return ours_db < theirs_db or min(ours_db, theirs_db) < CHAOTIC_DB


def _over_draws(found: Outcome, options: argparse.Namespace) -> Outcome:
    """`found` with the mean ratios of several draws, of which its own is the first."""
    draws = [(found.sqnr_db or 0.0, found.converter_sqnr_db or 0.0)]
    for seed in range(options.seed + 1, options.seed + MOST_DRAWS):
        if _are_enough(draws):
            break
        keras.backend.clear_session()
        model, inputs = _drawn(options.one, seed)
        arrays, expected = keras.tree.flatten(inputs), model(inputs, training=False)
        blob = tflite_export.convert(kqat.quantize_model(model, calibration_data=inputs))
        ours = running.predict(blob, arrays, runtime=RUNTIME)
        try:
            theirs = converter.post_training_int8_of_many(model, inputs)
            others = converter.run_signature(theirs, model, inputs)
        except Exception:
            continue  # The converter makes no file of this draw that runs: nothing to compare.
        draws.append((_sqnr(expected, ours), _sqnr(expected, others)))
    mean = np.mean(draws, axis=0)
    return dataclasses.replace(
        found,
        sqnr_db=float(mean[0]),
        converter_sqnr_db=float(mean[1]),
        drawn_db=tuple(draws),
    )


def _are_enough(draws: Sequence[tuple[float, float]]) -> bool:
    """Whether draws of both ratios say enough; asked when there are `DRAWS`, and `MORE_DRAWS`.

    At these counts alone: to stop at the first good mean would favour us.
    """
    if len(draws) not in (DRAWS, MORE_DRAWS):
        return False
    ours_db, theirs_db = np.mean(draws, axis=0)
    if ours_db >= theirs_db - LOSS_DB:
        return True
    return len(draws) == MORE_DRAWS and not _is_open({"drawn_db": draws})


def _commit() -> str | None:
    """The commit that is checked out; `None` where this is no clone of the repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() if found.returncode == 0 else None


def run(model: keras.Model, inputs: Any, theirs: dict[str, Any]) -> Outcome:
    """Takes one float model the whole road; `theirs` are the converter's figures."""
    try:
        return dataclasses.replace(_ours(model, inputs), **theirs)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = "refused" if isinstance(error, kqat.KqatError) else "crashed"
        place = "" if kind == "refused" else f" ({Path(where.filename).name}:{where.lineno})"
        first = " ".join(str(error).split())[:400]
        return Outcome(outcome=f"{kind}: {type(error).__name__}{place}: {first}", **theirs)


def _ours(model: keras.Model, inputs: Any) -> Outcome:
    arrays = keras.tree.flatten(inputs)
    quantize, qat = _timed(lambda: kqat.quantize_model(model, calibration_data=inputs))
    expected = model(inputs, training=False)
    freezing, frozen = _timed(lambda: freeze(qat))  # Once, for `convert` and `verify`.
    convert, blob = _timed(lambda: tflite_export.convert(frozen))
    sqnr = _sqnr(expected, running.predict(blob, arrays, runtime=RUNTIME))
    report = tflite_export.verify(frozen, blob, inputs, samples=VERIFIED)
    steps: dict[str, int | str] = {
        part.runtime: part.problem or part.max_steps for part in report.runtimes
    }
    worst = max((s for s in steps.values() if isinstance(s, int)), default=0)
    _train(qat, inputs)
    whole = report.float_operators == 0 and worst <= 1
    return Outcome(
        outcome="integer" if whole else f"{report.float_operators} float, {worst} steps",
        operators=sum(report.operators.values()),
        size_bytes=len(blob),
        float_operators=report.float_operators,
        max_steps=steps,
        unmatched=max(len(part.unmatched) for part in report.runtimes),
        differing={
            part.runtime: ", ".join(part.exact.unknown) or part.exact.differing
            for part in report.runtimes
            if part.exact is not None
        },
        sqnr_db=sqnr,
        quantize_seconds=quantize,
        convert_seconds=freezing + convert,
    )


def _train(qat: keras.Model, inputs: Any) -> None:
    """One step; raises if no weight moves."""
    targets = keras.tree.map_structure(np.zeros_like, qat(inputs, training=False))
    before = [w.numpy() for w in qat.trainable_weights]
    # Eagerly, as tracing a deep network costs more than a step of it.
    qat.compile(keras.optimizers.SGD(1e-5), "mse", run_eagerly=True)
    qat.train_on_batch(inputs, targets)
    if not any(np.any(w.numpy() != b) for w, b in zip(qat.trainable_weights, before, strict=True)):
        raise RuntimeError("no weight of the QAT model moved in a step of training")


def _converters_once(model: keras.Model, inputs: Any, row: Path) -> dict[str, Any]:
    """As `_converters`, kept beside the row: nothing that is mended in kqat changes it."""
    path = row.with_suffix(".converter")
    if path.exists():
        return dict(json.loads(path.read_text()))
    found = _converters(model, inputs)
    write_file(path, json.dumps(found).encode())
    return found


def _converters(model: keras.Model, inputs: Any) -> dict[str, Any]:
    """What TensorFlow's converter makes of the model."""
    try:
        blob = converter.post_training_int8_of_many(model, inputs)
        found = converter.run_signature(blob, model, inputs)
        return {
            "converter_operators": len(tflite_export.inspect(blob).operators),
            "converter_bytes": len(blob),
            "converter_sqnr_db": _sqnr(model(inputs, training=False), found),
        }
    except Exception as error:  # Whatever the converter raises.
        message = re.sub(r"/\S*/", "", " ".join(str(error).split()))  # without folders
        return {"converter_problem": f"{type(error).__name__}: {message[:200]}"}


def _sqnr(expected: Any, found: list[np.ndarray]) -> float:
    """Over all outputs together, each divided by its own root mean square."""
    signal = noise = 0.0
    for e, f in zip(keras.tree.flatten(expected), found, strict=True):
        e = np.asarray(e, np.float64)
        power = float(np.mean(np.square(e))) or 1.0
        signal += float(np.sum(np.square(e))) / power
        noise += float(np.sum(np.square(e - f.reshape(e.shape)))) / power
    return float(10 * np.log10(signal / max(noise, 1e-30)))


def typical_inputs(model: keras.Model, seed: int) -> Any:
    """Random values in the model's input structure: ids, places, masks with padding, images."""
    rng = np.random.default_rng(seed)

    def values(tensor: Any) -> np.ndarray:
        shape = (SAMPLES, *tensor.shape[1:])
        if "positions" in tensor.name:
            return rng.integers(0, TOKENS, shape).astype(np.int32)
        if "mask" in tensor.name:
            lengths = rng.integers(shape[1] // 2, shape[1] + 1, SAMPLES)
            return (np.arange(shape[1]) < lengths[:, None]).astype(np.int32)
        if "segment" in tensor.name:
            return rng.integers(0, 2, shape).astype(np.int32)
        if "int" in str(tensor.dtype):
            return rng.integers(1, VOCABULARY, shape).astype(np.int32)
        if _takes_pixels(model):
            return rng.uniform(0.0, 255.0, shape).astype(np.float32)
        return rng.normal(size=shape).astype(np.float32)

    if isinstance(model, keras.Sequential):
        return values(model.inputs[0])
    return keras.tree.map_structure(values, model.input)


def _takes_pixels(model: keras.Model) -> bool:
    """Whether a model begins by bringing pixels of 0 to 255 to numbers around one."""
    kinds = [layer for layer in model.layers if isinstance(layer, keras.layers.Rescaling)]
    return any(np.max(layer.scale) <= 1 / 64 for layer in kinds)


def settle(model: keras.Model, inputs: Any) -> None:
    """Gives the BatchNormalization layers, wherever they are, the statistics of `inputs`.

    Untrained networks otherwise die out on the way, and no file of theirs means anything.
    """
    kinds = [layer for layer in parts_of(model) if _is_batch_normalization(layer)]
    momenta = [layer.momentum for layer in kinds]
    for layer in kinds:
        layer.momentum = 0.0
    model(inputs, training=True)
    for layer, momentum in zip(kinds, momenta, strict=True):
        layer.momentum = momentum


def _is_batch_normalization(layer: Any) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def tables(results: dict[str, Any]) -> list[Table]:
    """What the benchmark prints, from what results.json holds."""
    header = ("", "outcome", "operators", "bytes", "SQNR dB", "seconds")
    rows = [_cells(name, found) for name, found in results["models"].items()]
    whole = sum(found["outcome"] == "integer" for found in results["models"].values())
    kinds = {found["collection"] for found in results["models"].values()}
    title = f"{whole} of {len(rows)} architectures of {len(kinds)} collections ship as integers"
    return [Table(title, header, rows, LEGEND)]


def page(results: dict[str, Any]) -> str:
    """The table as Markdown, and which rows miss a bound against the converter's file."""
    ((title, header, rows, legend),) = tables(results)
    models = results["models"]
    lines = [f"# {title}", "", "`python -m benchmarks.zoo` writes this file.", ""]
    lines += ["```text", legend, "```", ""]
    lines += [_markdown(("architecture", "collection", *header[1:])), _markdown(("---",) * 7)]
    lines += [_markdown((row[0], models[row[0]]["collection"], *row[1:])) for row in rows]
    lines += ["", "## Rows beyond a bound", ""]
    for text, beyond in BOUNDS.items():
        names = [name for name, found in models.items() if beyond(found)]
        lines.append(f"- {text}: {len(names)}. {', '.join(names)}".rstrip())
    lines += ["", "## Where the converter makes no file that runs", ""]
    lines += [
        f"- {name}: {_markdown_text(found['converter_problem'])}"
        for name, found in models.items()
        if found["converter_problem"]
    ]
    lines += ["", "## Commits that the rows ran on", ""]
    commits: dict[str, list[str]] = {}
    for name, found in models.items():
        commits.setdefault(found.get("commit") or "not recorded", []).append(name)
    lines += [f"- {commit}: {', '.join(names)}" for commit, names in commits.items()]
    return "\n".join(lines) + "\n"


def _markdown_text(message: str) -> str:
    return re.sub(r"\s+", " ", message).replace("|", "/").strip()


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _over(found: dict[str, Any], key: str, factor: float) -> bool:
    ours, theirs = found[key], found[f"converter_{key.removeprefix('size_')}"]
    return ours is not None and theirs is not None and ours > factor * theirs


def _loses(found: dict[str, Any]) -> bool:
    ours, theirs = found["sqnr_db"], found["converter_sqnr_db"]
    return ours is not None and theirs is not None and ours < theirs - LOSS_DB


def _difference(found: dict[str, Any]) -> tuple[float, float] | None:
    """The mean of ours less the converter's over draws, in dB, and its standard error."""
    if len(found.get("drawn_db") or ()) < 2:
        return None
    differences = np.subtract(*np.transpose(found["drawn_db"]))
    error = np.std(differences, ddof=1) / np.sqrt(len(differences))
    return float(np.mean(differences)), float(error)


def _is_open(found: dict[str, Any]) -> bool:
    """Whether the draws do not tell on which side of the bound the mean lies."""
    drawn = _difference(found)
    return drawn is not None and abs(drawn[0] + LOSS_DB) < RESOLVED * drawn[1]


BOUNDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "not whole-integer, or more than 1 step": lambda found: found["outcome"] != "integer",
    "an integer that is not the integer model's, on any runtime": lambda found: any(
        found.get("differing", {}).values()
    ),
    "more than 1.1 x the converter's operators": lambda found: _over(found, "operators", 1.1),
    "more bytes than the converter's file": lambda found: _over(found, "size_bytes", 1.0),
    f"SQNR more than {LOSS_DB} dB below the converter's": _loses,
    f"of these, a mean of draws less than {RESOLVED:g} standard errors beyond the bound": (
        lambda found: _loses(found) and _is_open(found)
    ),
}


def _cells(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    def pair(key: str, shown: Callable[[Any], str]) -> str:
        both = (found[key], found[f"converter_{key.removeprefix('size_')}"])
        return " / ".join("-" if x is None else shown(x) for x in both)

    seconds = [found["quantize_seconds"], found["convert_seconds"]]
    ratios = pair("sqnr_db", decimal)
    if found.get("drawn_db"):
        ours, theirs = zip(*found["drawn_db"], strict=True)
        spread = " / ".join(f"{decimal(min(x))}–{decimal(max(x))}" for x in (ours, theirs))
        drawn = _difference(found)
        ratios += f" ({spread}" + (
            f"; {decimal(drawn[0], signed=True)} ± {drawn[1]:.1f})" if drawn else ")"
        )
    return (
        name,
        found["outcome"][:60],
        pair("operators", str),
        pair("size_bytes", "{:,d}".format),
        ratios,
        " + ".join("-" if s is None else f"{s:.1f}" for s in seconds),
    )


def _timed(call: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def _parser() -> argparse.ArgumentParser:
    parser = running.parser(__doc__, out="out/zoo", reads_data=False)
    parser.add_argument("--only", nargs="+", help="names of architectures or collections")
    parser.add_argument(
        "--seconds", type=int, default=400, help="of the processor, for one architecture"
    )
    parser.add_argument("--no-run", action="store_true", help="only the rows that there are")
    parser.add_argument("--no-converter", action="store_true", help="leave the comparison out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
