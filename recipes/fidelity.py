"""How close is the integer file to the float model? Six pretrained models, calibration only.

    python -m recipes.fidelity --out out/fidelity [--only mlperf_tiny/ic]

Nothing is trained: ranges are calibrated on some inputs, and the model is converted. The recipe
reports four results for each file:

outputs    float and integer accuracy, if there are labelled images; the signal-to-noise ratio
           (SQNR) of the outputs against the float model's, in dB,
               10 log10(sum(float^2) / sum((float - integer)^2)),
           and the share of samples for which both name the same class. If the vendor has an
           integer file, it gets the same inputs.
operators  their number, and how many read or write a float.
lockstep   every operator gets the values that the runtime computed before it. Reported are the
           largest difference from the Keras model, in output steps, and the share of equal
           values. Ties are values exactly between two steps; a kernel may round them either way.
file       bytes, beside the vendor's.

The inputs (see also each case below): the images for `ic` and `resnet20` come from CIFAR-10's
training set. Both models may have seen them, so only compare columns with each other. `vww` has no
photographs here and gets CIFAR-10 images enlarged to 96x96, which show no person: its SQNR says
more than its class agreement. `ad` has one clip, so its ranges fit that clip, while the vendor's
serve a whole data set. `sww` gets the 45 spectrograms on which the vendor calibrated too.

Writes to --out: results.json, and a .tflite and a report for each model.
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from recipes import converter, data, running
from recipes.models import digits_cnn
from recipes.running import Table
from tflite_export import Report

RUNTIMES = ("litert_reference", "tflite_micro")
CALIBRATION_IMAGES = 512
LEGEND = """\
accuracy, SQNR and agreement with the float model: on LiteRT (XNNPACK)
lockstep, equal: the operator that differs most, on LiteRT's reference kernels
                 and on TFLite Micro"""
KWS_CALIBRATION = 100
ONE_SCALE = kqat.QuantizeConfig(
    weights=kqat.QuantSpec(bits=8, symmetric=True, narrow_range=True, axis=None)
)
VWW_IMAGES = 500
VWW_CALIBRATION_IMAGES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A pretrained model, the inputs to calibrate on and the inputs to compare the files on.

    `about` describes `inputs`. `is_classifier` says whether the largest output is a class.
    `one_scale` says whether to make a second file with one scale per weight tensor, as the
    vendor's file has.
    """

    model: keras.Model
    about: str
    calibration: np.ndarray
    inputs: np.ndarray
    labels: np.ndarray | None = None
    vendor: bytes | None = None
    is_classifier: bool = True
    one_scale: bool = False


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    cases = {options.only: CASES[options.only]} if options.only else CASES
    models = {}
    for name, read in ({"smoke": _fake} if options.smoke else cases).items():
        models[name] = _measure(name, read(), options.out)
        print(f"{_four_lines(name, models[name])}\n", flush=True)
    results = running.save_results(options, "fidelity", {"models": models})
    running.show(tables(results))
    return results


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/fidelity")
    parser.add_argument("--only", choices=tuple(CASES), help="one model (default all)")
    return parser.parse_args(argv)


def _cifar(name: str, vendor: bytes | None) -> Case:
    images, labels = data.cifar10_lossless()
    # From the test set, so that no image is used for both calibration and comparison.
    calibration, _ = data.cifar10_jpeg("test", count=CALIBRATION_IMAGES)
    return Case(
        model=data.pretrained(name),
        about=f"{len(images):,} lossless images of CIFAR-10's training set",
        calibration=data.model_input(name, calibration),
        inputs=data.model_input(name, images),
        labels=labels,
        vendor=vendor,
    )


def _ic() -> Case:
    return _cifar("mlperf_tiny/ic", data.vendor_tflite("mlperf_tiny/ic"))


def _kws() -> Case:
    features, labels = data.kws01()
    return Case(
        model=data.pretrained("mlperf_tiny/kws"),
        about=f"the last {len(features) - KWS_CALIBRATION} of kws01, ranges from the others",
        calibration=features[:KWS_CALIBRATION],
        inputs=features[KWS_CALIBRATION:],
        labels=labels[KWS_CALIBRATION:],
        vendor=data.vendor_tflite("mlperf_tiny/kws"),
    )


def _resnet20() -> Case:
    return _cifar("cifar_resnet_keras/resnet20", None)


def _vww() -> Case:
    name = "mlperf_tiny/vww"
    images = data.cifar10_lossless()[0][:VWW_IMAGES]
    calibration, _ = data.cifar10_jpeg("test", count=VWW_CALIBRATION_IMAGES)

    def enlarged(pixels: np.ndarray) -> np.ndarray:
        resized = keras.ops.image.resize(pixels, (96, 96), interpolation="bilinear")
        return data.model_input(name, np.asarray(resized))

    return Case(
        model=data.pretrained(name),
        about=f"{len(images)} lossless images of CIFAR-10, enlarged to 96x96",
        calibration=enlarged(calibration),
        inputs=enlarged(images),
        vendor=data.vendor_tflite(name),
    )


def _ad() -> Case:
    windows = data.ad01_windows()
    return Case(
        model=data.pretrained("mlperf_tiny/ad"),
        about="every other window of one clip",
        calibration=windows[::2],
        inputs=windows[1::2],
        vendor=data.vendor_tflite("mlperf_tiny/ad"),
        is_classifier=False,
        one_scale=True,  # Per-channel scales take many bytes in a file of Dense layers.
    )


def _sww() -> Case:
    spectrograms, labels = data.sww_calibration()
    return Case(
        model=data.pretrained("mlperf_tiny/sww"),
        about=f"the vendor's {len(spectrograms)} calibration spectrograms",
        calibration=spectrograms,
        inputs=spectrograms,
        labels=labels,
        vendor=data.vendor_tflite("mlperf_tiny/sww"),
    )


CASES: dict[str, Callable[[], Case]] = {
    "mlperf_tiny/ic": _ic,
    "mlperf_tiny/vww": _vww,
    "mlperf_tiny/kws": _kws,
    "mlperf_tiny/ad": _ad,
    "mlperf_tiny/sww": _sww,
    "cifar_resnet_keras/resnet20": _resnet20,
}


def _fake() -> Case:
    """An untrained network and noise, with its float file in place of the vendor's file."""
    random = np.random.default_rng(0)
    x = random.random((32, 8, 8, 1), np.float32)
    model = digits_cnn()
    return Case(
        model=model,
        about="32 images of noise",
        calibration=x,
        inputs=x,
        labels=random.integers(0, 10, len(x)),
        vendor=converter.float_tflite(model),
        one_scale=True,
    )


def _measure(name: str, case: Case, out: Path) -> dict[str, Any]:
    """All results for one model, as plain JSON types."""
    qat = kqat.quantize_model(case.model, calibration_data=case.calibration)
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, case.inputs, runtimes=RUNTIMES)
    path = out / name.replace("/", "_")
    tflite_export.save(blob, path.with_suffix(".tflite"))
    report.save(path.with_suffix(".json"))
    expected = running.keras_outputs(case.model, case.inputs)
    labels = case.labels
    return {
        "inputs": case.about,
        "float_accuracy": None if labels is None else running.accuracy(expected, labels),
        "kqat": _fidelity(case, blob, expected),
        "one_scale": _one_scale(case, expected) if case.one_scale else None,
        "vendor": None if case.vendor is None else _fidelity(case, case.vendor, expected),
        "operators": report.operators,
        "float_operators": report.float_operators,
        "lockstep": {runtime: _lockstep(report, runtime) for runtime in RUNTIMES},
    }


def _one_scale(case: Case, expected: np.ndarray) -> dict[str, Any]:
    qat = kqat.quantize_model(case.model, ONE_SCALE, calibration_data=case.calibration)
    return _fidelity(case, tflite_export.convert(qat), expected)


def _fidelity(case: Case, blob: bytes, expected: np.ndarray) -> dict[str, Any]:
    """One integer file against the float model's outputs."""
    (found,) = running.predict(blob, [case.inputs])
    labels, agrees = case.labels, running.accuracy(found, expected.argmax(-1))
    return {
        "accuracy": None if labels is None else running.accuracy(found, labels),
        "sqnr_db": running.sqnr_db(expected, found),
        "top1_agreement": agrees if case.is_classifier else None,
        "file_bytes": len(blob),
    }


def _lockstep(report: Report, runtime: str) -> dict[str, Any]:
    part = report.on(runtime)
    return {
        "problem": part.problem,
        "not_compared": list(part.unmatched),
        "arena_bytes": part.arena_bytes,
        "max_steps": part.max_steps,
        "operators": {
            operator: {
                "max_steps": found.max_steps,
                "equal_share": 1 - found.differing / found.elements,
                "tie_share": found.ties / found.elements,
            }
            for operator, found in part.by_operator().items()
        },
    }


def _four_lines(name: str, result: dict[str, Any]) -> str:
    """The four results for a model as text, in at most 80 columns."""
    ours, vendor = result["kqat"], result["vendor"]
    outputs = f"SQNR {ours['sqnr_db']:.1f} dB" + (
        "" if vendor is None else f", vendor's {vendor['sqnr_db']:.1f} dB"
    )
    if ours["accuracy"] is not None:
        outputs = (
            f"accuracy float {running.percent(result['float_accuracy'])}, "
            f"int8 {running.percent(ours['accuracy'])}"
            + ("" if vendor is None else f", vendor's {running.percent(vendor['accuracy'])}")
            + f"; {outputs}"
        )
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["operators"].items())
    size = f"{ours['file_bytes']:,} bytes" + (
        "" if vendor is None else f", vendor's {vendor['file_bytes']:,}"
    )
    return "\n".join(
        [
            f"{name}: {result['inputs']}",
            _line("outputs", outputs),
            _line("operators", f"{result['float_operators']} float; {kinds}"),
            *(_line("lockstep", _lockstep_text(*item)) for item in result["lockstep"].items()),
            _line("file", size),
        ]
    )


def _line(head: str, text: str) -> str:
    indent = " " * 12
    wrapped = textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=indent)
    return f"  {head:<10}{wrapped[12:]}"


def _lockstep_text(runtime: str, found: dict[str, Any]) -> str:
    if found["problem"] is not None:
        return f"{runtime}: did not run, {found['problem']}"
    shares = ", ".join(
        f"{operator} {100 * row['equal_share']:.2f}"
        + (f" (+ {100 * row['tie_share']:.2f} ties)" if row["tie_share"] else "")
        for operator, row in found["operators"].items()
        if operator != "input"
    )
    missing = f"; not compared: {', '.join(found['not_compared'])}" * bool(found["not_compared"])
    return f"{runtime}: at most {running.steps(found['max_steps'])}; equal, in %: {shares}{missing}"


def tables(results: dict[str, Any]) -> list[Table]:
    """What the recipe prints, from what results.json holds."""
    header = ("", "", "accuracy", "SQNR dB", "agreement", "bytes", "lockstep", "equal")
    rows: list[tuple[str, ...]] = []
    for name, result in results["models"].items():
        lockstep = [found for found in result["lockstep"].values() if found["problem"] is None]
        shares = [row["equal_share"] for found in lockstep for row in found["operators"].values()]
        worst = running.steps(max(found["max_steps"] for found in lockstep))
        own = [("kqat", *_figures(result["kqat"]), worst, running.percent(min(shares)))]
        if result["float_accuracy"] is not None:
            own.insert(0, ("float", running.percent(result["float_accuracy"]), *["-"] * 5))
        if result["one_scale"] is not None:
            own.append(("kqat, one scale", *_figures(result["one_scale"]), "-", "-"))
        if result["vendor"] is not None:
            own.append(("vendor's", *_figures(result["vendor"]), "-", "-"))
        rows += [("" if n else name.split("/")[-1], *cells) for n, cells in enumerate(own)]
    return [Table("Post-training quantization of pretrained models", header, rows, LEGEND)]


def _figures(file: dict[str, Any]) -> tuple[str, ...]:
    return (
        running.percent(file["accuracy"]),
        f"{file['sqnr_db']:.1f}",
        running.percent(file["top1_agreement"]),
        f"{file['file_bytes']:,}",
    )


if __name__ == "__main__":
    main()
