"""Which operators run on an Ethos-U? Three networks, calibrated only, compiled by Arm's Vela.

    python -m recipes.npu --out out/npu

Nothing is trained. ResNet-8 and DS-CNN (keyword spotting) have MLPerf Tiny's pretrained weights and
are calibrated on its data. MobileNetV2 has random weights and inputs, so only its operators, cycles
and memory mean something. The recipe needs the extra `ethos-u`. Vela's estimates are for the
systems that its own configuration describes.

Writes to --out: results.json, and for each network a .tflite and the HTML report for the U55.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from recipes import data, running
from recipes.models import digits_cnn, mobilenet_v2
from recipes.running import Table
from recipes.training import settle
from tflite_export.devices import ACCELERATORS, estimate

SAMPLES = 128
HEADER = ("network", "NPU", "on it", "cycles", "SRAM", "DRAM", "flash")
LEGEND = "SRAM, DRAM and flash in bytes, as Vela says"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    networks = {"smoke": _fake} if options.smoke else NETWORKS
    measured: dict[str, Any] = {}
    for name, read in networks.items():
        model, x = read()
        qat = kqat.quantize_model(model, calibration_data=x)
        blob = tflite_export.convert(qat, target="ethos_u55")
        tflite_export.save(blob, options.out / f"{name}.tflite")
        report = tflite_export.verify(
            qat, blob, x, runtimes=["litert_reference"], samples=16, target="ethos_u55"
        )
        report.save_html(options.out / f"{name}.html")
        found = {target: estimate(blob, target) for target in ACCELERATORS}
        measured[name] = {
            t: {**dataclasses.asdict(e), "fallbacks": list(e.fallbacks), "npu_share": e.npu_share}
            for t, e in found.items()
        }
    results = running.save_results(options, "npu", {"networks": measured})
    running.show(tables(results))
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the recipe prints, from what results.json holds."""
    rows = [
        _cells(name, found) for name, by in results["networks"].items() for found in by.values()
    ]
    return [Table("Networks as Vela compiles them", HEADER, rows, LEGEND)]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    return running.parser(__doc__, out="out/npu").parse_args(argv)


def _cells(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    sizes = (found[key] for key in ("cycles", "sram_bytes", "dram_bytes", "flash_bytes"))
    return (
        name,
        found["accelerator"],
        f"{100 * found['npu_share']:.0f} %",
        *map(running.counted, sizes),
    )


def _resnet8() -> tuple[keras.Model, np.ndarray]:
    name = "mlperf_tiny/ic"
    images, _ = data.cifar10_jpeg("test", count=SAMPLES)
    return data.pretrained(name), data.model_input(name, images)


def _ds_cnn() -> tuple[keras.Model, np.ndarray]:
    return data.pretrained("mlperf_tiny/kws"), data.kws01()[0][:SAMPLES]


def _mobilenet_v2() -> tuple[keras.Model, np.ndarray]:
    model = mobilenet_v2((96, 96, 3))
    x = np.random.default_rng(0).normal(size=(16, 96, 96, 3)).astype(np.float32)
    settle(model, x)
    return model, x


def _fake() -> tuple[keras.Model, np.ndarray]:
    return digits_cnn(), np.random.default_rng(0).random((8, 8, 8, 1), np.float32)


NETWORKS: dict[str, Callable[[], tuple[keras.Model, np.ndarray]]] = {
    "resnet8": _resnet8,
    "ds_cnn": _ds_cnn,
    "mobilenet_v2": _mobilenet_v2,
}


if __name__ == "__main__":
    main()
