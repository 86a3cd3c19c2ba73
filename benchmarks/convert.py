"""Model to `.tflite`: kqat beside TensorFlow's float conversion and its post-training int8.

    python -m benchmarks.convert --rounds 3 --out out/convert.json

TensorFlow's road is that of its documentation: from a Keras model in memory through a SavedModel of
batch size 1 to the bytes of the file. kqat is measured twice: `convert` alone, beside the float
conversion, and `quantize_model`, which calibrates, with it, beside the post-training quantizer,
which reads the same samples.

Memory is the most that a process of its own holds during one conversion, TensorFlow included.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from benchmarks.networks import NETWORKS, SMOKE, Network
from recipes.converter import float_tflite, post_training_int8
from recipes.models import vit
from recipes.timing import (
    Measured,
    Seconds,
    as_json,
    print_table,
    ratio,
    spread,
    take_turns,
    write_json,
)
from recipes.training import settle

SAMPLES = 32
FLOAT, KQAT, QUANTIZE_AND_KQAT, PTQ = "float", "kqat", "quantize_model + kqat", "converter's int8"
RATIOS = ((KQAT, FLOAT), (QUANTIZE_AND_KQAT, PTQ), (PTQ, FLOAT))


def _residual_40(keras: ModuleType) -> Any:
    """Forty residual blocks of two convolutions: many layers, little arithmetic."""
    layers = keras.layers
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 3, padding="same")(inputs)
    for _ in range(40):
        y = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        y = layers.Conv2D(16, 3, padding="same", use_bias=False)(y)
        x = layers.ReLU()(layers.Add()([x, layers.BatchNormalization()(y)]))
    outputs = layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs, name="residual_40")


def _efficientnet_b0(keras: ModuleType) -> Any:
    return keras.applications.EfficientNetB0(weights=None, input_shape=(64, 64, 3), classes=10)


CONVERTED = {
    **NETWORKS,
    "residual_40": Network(_residual_40, (16, 16, 3), 32),
    "efficientnet_b0": Network(_efficientnet_b0, (64, 64, 3), 32),
    "transformer": Network(lambda _: vit(), (28, 28, 1), 32),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes JSON."""
    options = _parser().parse_args(arguments)
    if options.memory:
        print(_memory(CONVERTED[options.network[0]], options.memory))
        return
    rounds, samples = (2, 2) if options.smoke else (options.rounds, SAMPLES)
    results: dict[str, Any] = {}
    networks = SMOKE if options.smoke else {name: CONVERTED[name] for name in options.network}
    for name, network in networks.items():
        measured, sizes = measure(network, rounds, samples)
        results[name] = {**as_json(measured, RATIOS), "size_bytes": sizes}
        if not options.smoke:
            results[name]["memory_bytes"] = {case: memory(name, case) for case in sizes}
        _print(name, results[name], measured)
    if options.out:
        write_json(options.out, {"rounds": rounds, "samples": samples, "networks": results})


def measure(network: Network, rounds: int, samples: int) -> tuple[Measured, dict[str, int]]:
    """The seconds of every conversion in every round, and the sizes of the files in bytes."""
    conversions = _conversions(network, samples)
    sizes = {name: len(run()) for name, run in conversions.items()}
    cases = {name: _case(run) for name, run in conversions.items()}
    return take_turns(cases, rounds, warmup=0), sizes


def memory(network: str, case: str) -> int:
    """The most bytes that a fresh process holds during one conversion."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.convert", "--memory", case, "--network", network],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout.split()[-1])


def _memory(network: Network, case: str) -> int:
    conversions = _conversions(network, SAMPLES)

    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here.
    conversions[case]()
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])


def _conversions(network: Network, samples: int) -> dict[str, Callable[[], bytes]]:
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    x = generator.uniform(-1.0, 1.0, (samples, *network.input_shape)).astype(np.float32)
    model = network.build(keras)
    settle(model, x)

    def quantized() -> keras.Model:
        return kqat.quantize_model(model, calibration_data=x)

    qat = quantized()
    return {
        FLOAT: lambda: float_tflite(model),
        KQAT: lambda: tflite_export.convert(qat),
        PTQ: lambda: post_training_int8(model, x),
        QUANTIZE_AND_KQAT: lambda: tflite_export.convert(quantized()),
    }


def _print(network: str, result: Mapping[str, Any], measured: Measured) -> None:
    memories = result.get("memory_bytes", {})
    rows = [
        (
            network,
            f"{case} / {reference}",
            str(ratio(measured, case, reference, "processor")),
            str(ratio(measured, case, reference)),
            str(spread(measured, case, "processor")),
            f"{memories[case] / memories[reference]:.2f}" if memories else "",
            f"{result['size_bytes'][case]:,}",
        )
        for case, reference in RATIOS
    ]
    header = ("network", "case", "processor", "wall", "processor seconds", "memory", "bytes")
    print_table(header, rows)
    print(flush=True)


def _case(run: Callable[[], bytes]) -> Callable[[], Seconds]:
    def timed() -> Seconds:
        start = Seconds.now()
        run()
        return Seconds.now().since(start)

    return timed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each conversion")
    parser.add_argument("--network", nargs="+", choices=CONVERTED, default=list(CONVERTED))
    parser.add_argument("--out", type=Path, help="where to write JSON")
    parser.add_argument("--memory", choices=(FLOAT, KQAT, PTQ, QUANTIZE_AND_KQAT), help="one case")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, two rounds")
    return parser


if __name__ == "__main__":
    main()
