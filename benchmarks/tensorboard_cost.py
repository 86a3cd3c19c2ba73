"""What `kqat.TensorBoardQuantization` adds to a `fit`, as a ratio of one without it.

    python -m benchmarks.tensorboard_cost --rounds 8

All cases train the same kind of QAT model for so many steps; a record is written at the end, as
after an epoch. They take turns in one process, and a ratio is taken within a round.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
from benchmarks.networks import CLASSES, NETWORKS, SMOKE, Network
from recipes.timing import Seconds, as_json, print_table, ratio, spread, take_turns, write_json

PLAIN = "without"
# Case -> the callback's options.
CASES: dict[str, dict[str, Any]] = {
    "ranges and weights": {"oscillations": False},
    "with oscillations": {},
    "with oscillations and data": {"data": True},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes JSON."""
    options = _parser().parse_args(arguments)
    rounds, steps = (2, 2) if options.smoke else (options.rounds, options.steps)
    rows, results = [], {}
    networks = SMOKE if options.smoke else {name: NETWORKS[name] for name in options.network}
    for name, network in networks.items():
        with tempfile.TemporaryDirectory() as folder:
            cases = _cases(network, steps, Path(folder))
            measured = take_turns(cases, rounds, warmup=0 if options.smoke else 2)
        results[name] = as_json(measured, [(case, PLAIN) for case in CASES])
        rows += [
            (
                name,
                case,
                f"{1e3 * spread(measured, case).median / steps:.1f}",
                str(ratio(measured, case, PLAIN)) if case != PLAIN else "",
                str(ratio(measured, case, PLAIN, "processor")) if case != PLAIN else "",
            )
            for case in cases
        ]
    print_table(("network", "case", "ms per step", "ratio, wall", "ratio, processor"), rows)
    if options.out:
        write_json(options.out, {"rounds": rounds, "steps": steps, "networks": results})


def _cases(network: Network, steps: int, folder: Path) -> dict[str, Callable[[], Seconds]]:
    generator, batch = np.random.default_rng(0), network.batch_size
    x = generator.uniform(-1.0, 1.0, (steps * batch, *network.input_shape)).astype(np.float32)
    y = generator.integers(0, CLASSES, len(x))
    float_model = network.build(keras)

    def case(index: int, options: dict[str, Any] | None) -> Callable[[], Seconds]:
        qat = kqat.quantize_model(float_model, calibration_data=x[:batch])
        qat.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
        callbacks = []
        if options is not None:
            options = {**options, **({"data": x[:batch]} if options.get("data") else {})}
            callbacks = [kqat.TensorBoardQuantization(folder / str(index), **options)]

        def run() -> Seconds:
            started = Seconds.now()
            qat.fit(x, y, batch_size=batch, verbose=0, callbacks=callbacks)
            return Seconds.now().since(started)

        return run

    every = {PLAIN: None, **CASES}
    return {name: case(index, options) for index, (name, options) in enumerate(every.items())}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="runs of each case")
    parser.add_argument("--steps", type=int, default=50, help="training steps of a run")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["resnet8"])
    parser.add_argument("--out", type=Path, help="where to write JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, two rounds")
    return parser


if __name__ == "__main__":
    main()
