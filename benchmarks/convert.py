"""Model to `.tflite`: kqat beside TensorFlow's float conversion and its post-training int8.

    python -m benchmarks.convert --rounds 10 --out out/convert.json

All three start from a Keras model in memory, go through a SavedModel of batch size 1 and end with
the file's bytes. Only the post-training quantizer reads data meanwhile: kqat's ranges are trained.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np

import kqat
import tflite_export
from benchmarks.networks import NETWORKS, Network
from recipes.converter import float_tflite, post_training_int8
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

SAMPLES = 100
FLOAT, KQAT, PTQ = "float", "kqat", "post-training int8"
RATIOS = ((KQAT, FLOAT), (PTQ, FLOAT), (KQAT, PTQ))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes JSON."""
    options = _parser().parse_args(arguments)
    rounds, samples = (2, 2) if options.smoke else (options.rounds, SAMPLES)
    results, rows = {}, []
    for name in options.network:
        measured, sizes = measure(NETWORKS[name], rounds, samples)
        results[name] = {**as_json(measured, RATIOS), "size_bytes": sizes}
        rows += [
            (
                name,
                case,
                str(spread(measured, case)),
                str(ratio(measured, case, FLOAT)),
                str(ratio(measured, case, FLOAT, "processor")),
                f"{size:,}",
            )
            for case, size in sizes.items()
        ]
    print_table(("network", "case", "seconds", "wall / float", "processor / float", "bytes"), rows)
    if options.out:
        write_json(options.out, {"rounds": rounds, "samples": samples, "networks": results})


def measure(network: Network, rounds: int, samples: int) -> tuple[Measured, dict[str, int]]:
    """The seconds of every conversion in every round, and the sizes of the files in bytes."""
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    x = generator.uniform(-1.0, 1.0, (samples, *network.input_shape)).astype(np.float32)
    model = network.build(keras)
    settle(model, x)
    qat = kqat.quantize_model(model, calibration_data=x)
    conversions: dict[str, Callable[[], bytes]] = {
        FLOAT: lambda: float_tflite(model),
        KQAT: lambda: tflite_export.convert(qat),
        PTQ: lambda: post_training_int8(model, x),
    }
    sizes = {name: len(run()) for name, run in conversions.items()}
    cases = {name: _case(run) for name, run in conversions.items()}
    return take_turns(cases, rounds, warmup=0), sizes


def _case(run: Callable[[], bytes]) -> Callable[[], Seconds]:
    def timed() -> Seconds:
        start = Seconds.now()
        run()
        return Seconds.now().since(start)

    return timed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="runs of each conversion")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path, help="where to write JSON")
    parser.add_argument("--smoke", action="store_true", help="two samples, two rounds")
    return parser


if __name__ == "__main__":
    main()
