"""Ways to find ranges, on pretrained models and on data good and bad, beside TensorFlow's PTQ.

    python -m benchmarks.calibration

Writes `benchmarks/calibration.json` after each cell, and `calibration.md` beside it. Cells that the
JSON holds are not measured again: remove it to begin anew, or name another file. A cell is one
model and one choice of calibration data: 256 samples shuffled, those in the order of their classes
(measured only where ranges differ from the shuffled ones: neither we nor the converter care about
order), one class alone, 16, 128 and 1,024 samples (fewer where there are fewer). Outputs (before a
closing softmax) are compared with the float model's on other samples: SQNR in dB, accuracy in
percent. Methods are judged by the QAT model, whose outputs are those of its file up to some steps;
the default's own file and the converter's are run on LiteRT.
"""

import argparse
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from kqat.base import decimal, write_file
from kqat.grids import CALIBRATION_METHODS
from kqat.training import DEFAULT_METHOD
from recipes import converter, data, running

CONVERTER, OWN, OWN_FILE = "converter", DEFAULT_METHOD, f"{DEFAULT_METHOD} (file)"
OUT = Path(__file__).with_suffix(".json")
TEST_SAMPLES = 300
# In dB: how far below the converter's file a cell may lie, and what the mean should gain.
BELOW, MEAN_GAIN = 0.3, 1.0


@dataclasses.dataclass(frozen=True)
class Task:
    """A float model, what it is calibrated from, and what it is judged on.

    Attributes:
        pool, classes: samples for calibration and the class of each, by which they are sorted; of
            an autoencoder, the loudness.
        test: other samples; labels, or `None` where accuracy says nothing.
    """

    model: keras.Model
    pool: np.ndarray
    classes: np.ndarray
    test: np.ndarray
    labels: np.ndarray | None


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and writes it."""
    options = _parser().parse_args(arguments)
    results: dict[str, Any] = {}
    if options.out.exists() and not options.smoke:
        results = json.loads(options.out.read_text())
    for name in options.models:
        keras.utils.set_random_seed(0)
        task, cells = TASKS[name](), results.setdefault(name, {})
        _end_with_logits(task.model)
        for cell, samples in _cells(task, options.smoke):
            if cell in cells:
                continue
            if cell == "sorted" and _ranges(task, samples) == _ranges(task, task.pool[:256]):
                cells[cell] = cells["shuffled"]
            else:
                cells[cell] = measure(task, samples)
            if not options.smoke:
                write_file(options.out, _as_json(results))
    write_file(options.out, _as_json(results))
    text = as_markdown(results)
    write_file(options.out.with_suffix(".md"), text.encode())
    print(text)
    return results


def _as_json(results: dict[str, Any]) -> bytes:
    return (json.dumps(results, indent=1) + "\n").encode()


def _ranges(task: Task, samples: np.ndarray) -> list[tuple[float, float]]:
    """Those that the default finds, in order of the layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kqat.CalibrationWarning)
        qat = kqat.quantize_model(task.model, calibration_data=samples)
    return [la.range() for la in qat.layers if isinstance(la, kqat.ActivationQuantizer)]


def _end_with_logits(model: keras.Model) -> None:
    """Leaves a closing softmax out, behind which one borderline sample outweighs all others."""
    last = model.layers[-1]
    if getattr(last, "activation", None) is keras.activations.softmax:
        last.activation = keras.activations.linear


def _cells(task: Task, smoke: bool) -> Iterator[tuple[str, np.ndarray]]:
    count = min(len(task.pool), 256)
    if smoke:
        yield "16", task.pool[:16]
        return
    yield "shuffled", task.pool[:count]
    yield "sorted", task.pool[:count][np.argsort(task.classes[:count], kind="stable")]
    order = np.argsort(task.classes, kind="stable")
    one = order[: max(int(np.sum(task.classes == task.classes[order[0]])), 16)]
    yield "one class", task.pool[one][:256]
    yield "16", task.pool[:16]
    yield "128", task.pool[:128]
    yield "1024", task.pool[:1024]


def measure(task: Task, samples: np.ndarray) -> dict[str, dict[str, float | None]]:
    """SQNR and accuracy of every method, calibrated from `samples`."""
    want = running.keras_outputs(task.model, task.test)
    found = {}
    with warnings.catch_warnings():
        # Much of the data is bad on purpose.
        warnings.simplefilter("ignore", kqat.CalibrationWarning)
        qat = kqat.quantize_model(task.model, calibration_data=samples)
    found[OWN] = _judged(task, want, running.keras_outputs(qat, task.test))
    file = tflite_export.convert(qat)
    for name in CALIBRATION_METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", kqat.CalibrationWarning)
            kqat.calibrate(qat, samples, method=name)
        found[name] = _judged(task, want, running.keras_outputs(qat, task.test))
    files = {
        OWN_FILE: file,
        CONVERTER: converter.post_training_int8(task.model, samples),
    }
    for name, blob in files.items():
        (got,) = running.predict(blob, [task.test])
        found[name] = _judged(task, want, got)
    return found


def _judged(task: Task, want: np.ndarray, got: np.ndarray) -> dict[str, float | None]:
    accuracy = None if task.labels is None else 100 * running.accuracy(got, task.labels)
    sqnr = round(running.sqnr_db(want, got), 2)
    return {"sqnr_db": sqnr, "accuracy": None if accuracy is None else round(accuracy, 2)}


def as_markdown(results: dict[str, Any]) -> str:
    """The table, and how each method compares with the converter."""
    names = [*CALIBRATION_METHODS, OWN, OWN_FILE, CONVERTER]
    lines = ["# SQNR in dB (accuracy in %) by calibration method", ""]
    lines += ["`python -m benchmarks.calibration` writes this file.", ""]
    lines += ["| model | data | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for model, cells in results.items():
        for cell, found in cells.items():
            texts = [_cell(found[name]) for name in names]
            lines.append(f"| {model} | {cell} | {' | '.join(texts)} |")
    lines += ["", "Against the converter's file, in dB:", ""]
    lines += ["| method | worst | mean |", "| --- | --- | --- |"]
    for name in names[:-1]:
        gains = [
            found[name]["sqnr_db"] - found[CONVERTER]["sqnr_db"]
            for cells in results.values()
            for found in cells.values()
        ]
        cells = " | ".join(decimal(x, 2, signed=True) for x in (min(gains), np.mean(gains)))
        lines.append(f"| {name} | {cells} |")
    whole = max(map(len, results.values()))
    partly = [
        f"{name} ({len(cells)} of {whole} cells)"
        for name, cells in results.items()
        if len(cells) < whole
    ]
    if partly:
        lines += ["", f"Measured in part: {', '.join(partly)}."]
    if missing := sorted(set(TASKS) - set(results)):
        lines += ["", f"Not measured: {', '.join(missing)}."]
    lines += ["", *_against_bounds(results)]
    return "\n".join(lines) + "\n"


def _against_bounds(results: dict[str, Any]) -> list[str]:
    """Whether the default's file keeps to what was aimed at, and where it does not."""
    gains = {
        f"{model}, {cell}": found[OWN_FILE]["sqnr_db"] - found[CONVERTER]["sqnr_db"]
        for model, cells in results.items()
        for cell, found in cells.items()
    }
    below = {name: gain for name, gain in gains.items() if gain < -BELOW}
    worst = ", ".join(f"{name} ({gain:+.2f})" for name, gain in below.items())
    mean = float(np.mean(list(gains.values())))
    return [
        f"Aimed at for the file of `{OWN}`: no cell more than {BELOW} dB below the converter's, "
        f"{MEAN_GAIN:g} dB above it in the mean.",
        f"Found: {len(below)} of {len(gains)} cells below{f': {worst}' if worst else ''}; "
        f"{decimal(mean, 2, signed=True)} dB in the mean.",
    ]


def _cell(found: dict[str, Any]) -> str:
    accuracy = found["accuracy"]
    return f"{found['sqnr_db']:.1f}" + ("" if accuracy is None else f" ({accuracy:.1f})")


def _pictures(name: str) -> Task:
    """CIFAR-10's images, resized and made grey as the model takes them; labels where it has ten."""
    model = data.pretrained(name)
    height, width, channels = model.input_shape[1:]
    images, labels = data.cifar10_lossless()
    order = np.random.default_rng(0).permutation(len(images))[: 1024 + TEST_SAMPLES]
    images, labels = images[order], labels[order]
    if channels == 1:
        images = images @ np.asarray([[0.299], [0.587], [0.114]], np.float32)
    if (height, width) != images.shape[1:3]:
        images = np.asarray(
            keras.ops.image.resize(images, (height, width), interpolation="bilinear")
        )
    if name in NORMALIZED_EACH:
        mean, deviation = (of(images, axis=(1, 2, 3), keepdims=True) for of in (np.mean, np.std))
        x = (images - mean) / deviation
    else:
        x = data.model_input(name, images)
    has_classes = model.output_shape[-1] == len(set(labels))
    return Task(model, x[:1024], labels[:1024], x[1024:], labels[1024:] if has_classes else None)


def _keywords(name: str) -> Task:
    """MLPerf's features; other models get frames and bands beyond them as zeros."""
    model = data.pretrained(name)
    features, labels = data.kws01()
    order = np.random.default_rng(0).permutation(len(features))
    x, y = features[order], labels[order]
    _, frames, bands, _ = model.input_shape
    x = np.pad(x, [(0, 0), (0, frames - x.shape[1]), (0, bands - x.shape[2]), (0, 0)])
    own = name == "mlperf_tiny/kws"
    return Task(model, x[:500], y[:500], x[500:], y[500:] if own else None)


def _on_off() -> Task:
    """Spoken digits as the frames of 32 bands that the model reads; none of them is its keyword."""
    model = data.pretrained("mltk_siliconlabs/keyword_spotting_on_off")
    clips, labels = data.fsdd("train")
    order = np.random.default_rng(0).permutation(len(clips))[: 1024 + TEST_SAMPLES]
    clips, labels = clips[order], labels[order]
    starts = np.linspace(0, clips.shape[1] - 256, 49).astype(int)
    frames = np.stack([clips[:, start : start + 256] for start in starts], axis=1)
    power = np.abs(np.fft.rfft(frames * np.hanning(256)))[..., :128]
    bands = np.log(power.reshape(*power.shape[:2], 32, 4).mean(axis=-1) + 1e-4)
    # The vendor's file takes whole numbers of eight bits.
    bands = np.rint((bands - bands.min()) / np.ptp(bands) * 255 - 128).astype(np.float32)
    x = bands[..., np.newaxis]
    return Task(model, x[:1024], labels[:1024], x[1024:], None)


def _wake_words() -> Task:
    """The vendor's 45 spectrograms: those that do not calibrate are few, so all are judged on."""
    x, y = data.sww_calibration()
    order = np.random.default_rng(0).permutation(len(x))
    return Task(data.pretrained("mlperf_tiny/sww"), x[order], y[order], x, y)


def _machine(name: str) -> Task:
    model = data.pretrained(name)
    windows = data.ad01_windows()
    windows = windows[np.random.default_rng(0).permutation(len(windows))]
    loudness = np.argsort(np.argsort(windows.mean(axis=1))) // 13
    windows = windows.reshape(-1, *model.input_shape[1:])
    return Task(model, windows[:128], loudness[:128], windows[128:], None)


# Networks that read pictures each of which has mean 0 and deviation 1.
NORMALIZED_EACH = ("mltk_siliconlabs/rock_paper_scissors",)
_READERS: dict[str, Callable[[str], Task]] = {
    "mlperf_tiny/kws": _keywords,
    "mlperf_tiny/sww": lambda _: _wake_words(),
    "mlperf_tiny/ad": _machine,
    "mltk_tinyml/keyword_spotting": _keywords,
    "mltk_tinyml/anomaly_detection": _machine,
    "mltk_siliconlabs/keyword_spotting_on_off": lambda _: _on_off(),
}
TASKS: dict[str, Callable[[], Task]] = {
    name: functools.partial(_READERS.get(name, _pictures), name) for name in data.pretrained_names()
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--out", type=Path, default=OUT, help="where to write JSON and Markdown")
    parser.add_argument("--smoke", action="store_true", help="one cell of each model")
    return parser


if __name__ == "__main__":
    main()
