"""Which layers of a network can do with fewer bits? `kqat.search` on a pretrained ResNet-8.

    python -m recipes.search --out out/search

MLPerf Tiny's ResNet-8, calibrated only. First under a budget of flash: that of four bits for all
layers, or 60 % of the int8 file's if that is less, with encoded weights (`compress="smallest"`, for
CMSIS-NN). Then under a budget of cycles on an Ethos-U55, as Arm's Vela estimates them (needs the
extra `ethos-u`). Images are CIFAR-10 after JPEG: compare these accuracies with each other only.

Writes to --out: for each budget the policy as JSON and its Pareto plot, and results.json.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from recipes import data, running
from recipes import mobilenetv2_cifar10 as lab
from recipes.data import Samples
from recipes.models import resnet8
from recipes.running import Table
from recipes.training import settle

CALIBRATION_SAMPLES = 128
SMOKE_IMAGES = 16
# The share of the int8 file's flash or cycles.
FLASH_SHARE, CYCLES_SHARE = 0.6, 0.95
CHOICES = {"flash": ("int8", "w4a8", "w3a8", "w2a8"), "cycles": ("int8", "w4a8")}
TARGETS = {"flash": "cmsis_nn", "cycles": "ethos_u55"}
UNITS = {"flash": "bytes", "cycles": "cycles"}
LEGEND = """\
bytes,     of the file with encoded weights, or as Vela estimates them: measured
cycles     for the found policy and for one choice for all layers, for the
           others the sum of what each layer adds
cost       what the search minimizes: noise over signal of the outputs where one
           layer alone has few bits, summed over the layers
accuracy   of the same integers on LiteRT (XNNPACK), and SQNR of the outputs
           against the float model's, in dB; for measured policies"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    count = SMOKE_IMAGES if options.smoke else CALIBRATION_SAMPLES
    wanted = argparse.Namespace(smoke=options.smoke, train_images=count)
    (x, _), (x_test, y_test) = lab.samples(wanted)
    images = x[:CALIBRATION_SAMPLES].astype(np.float32)
    test = x_test[: options.test_images].astype(np.float32), y_test[: options.test_images]
    model = resnet8()
    if options.smoke:
        settle(model, images)
    else:
        model.set_weights(data.pretrained("mlperf_tiny/ic").get_weights())
    want = running.keras_outputs(model, test[0])
    found = {}
    for measure in options.measures:
        print(f"{measure}: searching", flush=True)
        found[measure] = _searched(measure, model, images, test, want, options)
    results = running.save_results(
        options,
        "search",
        {
            "test_images": len(test[1]),
            "float_accuracy": running.accuracy(want, test[1]),
            "measures": found,
        },
    )
    running.show(tables(results))
    print(f"\nWritten to {options.out}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """One table for each budget, from what results.json holds."""
    found = []
    for measure, one in results["measures"].items():
        header = ("", "layers", UNITS[measure], "of int8", "cost", "accuracy", "SQNR")
        whole = next(row["used"] for row in one["rows"] if row["name"] == "int8")
        rows = [
            (
                row["name"],
                ", ".join(f"{count} {preset}" for preset, count in row["presets"].items()),
                running.counted(round(row["used"])),
                running.percent(row["used"] / whole),
                f"{row['cost']:.3g}",
                running.percent(row.get("accuracy")),
                f"{row['sqnr_db']:.1f}" if "sqnr_db" in row else "-",
            )
            for row in one["rows"]
        ]
        title = (
            f"ResNet-8 within {running.counted(int(one['budget']))} {UNITS[measure]} on "
            f"{TARGETS[measure]}, {results['test_images']:,} test images, float "
            f"{running.percent(results['float_accuracy'])}"
        )
        found.append(Table(title, header, rows, LEGEND))
    return found


def _searched(
    measure: str,
    model: keras.Model,
    images: np.ndarray,
    test: Samples,
    want: np.ndarray,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The Pareto rows of a search, with the accuracy of the policies that can be told by name."""
    compress = "smallest" if measure == "flash" else None
    target, choices = TARGETS[measure], CHOICES[measure]
    budget = CYCLES_SHARE
    if measure == "flash":
        sizes = [
            len(
                tflite_export.convert(
                    kqat.quantize_model(model, policy, calibration_data=images),
                    target=target,
                    compress=compress,
                )
            )
            for policy in ("int8", "w4a8")
        ]
        budget = min(int(FLASH_SHARE * sizes[0]), sizes[1])
    policy = kqat.search(
        model, images, budget=budget, measure=measure, target=target, choices=choices,
        compress=compress,
    )  # fmt: skip
    policy.save(options.out / f"{measure}.json")
    policy.plot(options.out / f"{measure}.svg")
    rows = []
    for row in policy.rows():
        one = {**dataclasses.asdict(row), "presets": dict(row.presets)}
        if row.name != "mixed":
            asked = policy if row.name == "found" else row.name
            qat = kqat.quantize_model(model, asked, calibration_data=images)
            (got,) = running.predict(tflite_export.convert(qat, target="litert"), [test[0]])
            one |= {
                "accuracy": running.accuracy(got, test[1]),
                "sqnr_db": running.sqnr_db(want, got),
            }
        rows.append(one)
    return {"budget": policy.budget, "choices": dict(policy.choices), "rows": rows}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/search")
    parser.add_argument("--measures", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--test-images", type=int, default=10_000)
    options = parser.parse_args(argv)
    if options.smoke:
        options.test_images = SMOKE_IMAGES
    return options


if __name__ == "__main__":
    main()
