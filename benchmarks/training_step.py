"""One training step of `fit`: kqat and tfmot beside the float models that they start from.

    python -m benchmarks.training_step --rounds 40 --out out/training_step.json

All models of a network start from the same weights, see the same batches and take turns in one
process. A ratio is taken within a round; a round's time is the median step of a short `fit`.
`--only` takes some of the cases, as the last two for what it costs that biases lie on their grid.
Behind the quartiles of a ratio stands the standard error of its median.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import kqat
from benchmarks.keras2 import tf_keras, tfmot_quantize_model
from benchmarks.networks import CLASSES, NETWORKS, SMOKE, Network
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

# TensorFlow takes each small operation for an expensive one, and hands it to another thread,
# until about 90 steps have taught it better.
WARMUP_STEPS = 100
STEPS = 2

# Case, and what it is divided by.
RATIOS = (
    ("kqat", "float (Keras 3)"),
    ("tfmot", "float (tf_keras)"),
    ("tfmot", "float (Keras 3)"),
    ("kqat", "tfmot"),
    ("float (tf_keras)", "float (Keras 3)"),
    ("kqat", "kqat, biases as they are"),
)
CASES = tuple(dict.fromkeys(case for pair in RATIOS for case in pair))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes JSON."""
    options = _parser().parse_args(arguments)
    rounds, warmup_steps = (2, 0) if options.smoke else (options.rounds, WARMUP_STEPS)
    results, rows = {}, []
    networks = SMOKE if options.smoke else {name: NETWORKS[name] for name in options.network}
    for name, network in networks.items():
        measured = measure(network, rounds, warmup_steps, options.only)
        results[name] = as_json(measured, _ratios(measured))
        rows += _rows(name, measured)
    print_table(("network", "case", "ms per step", "divided by", "wall", "processor"), rows)
    if options.out:
        write_json(options.out, {"rounds": rounds, "networks": results})


def measure(
    network: Network, rounds: int, warmup_steps: int, only: Sequence[str] = CASES
) -> Measured:
    """The seconds of a training step, for every case of `only` in every round."""
    keras.utils.set_random_seed(0)
    batches = batches_of(network)
    cases = {
        name: step_of_fit(module, model, batches)
        for name, (module, model) in _models(network).items()
        if name in only
    }
    return take_turns(cases, rounds, warmup=-(-warmup_steps // STEPS))


def _models(network: Network) -> dict[str, tuple[ModuleType, Any]]:
    """Each case's model, compiled, and its Keras."""
    model, legacy = network.build(keras), network.build(tf_keras)
    legacy.set_weights(model.get_weights())
    calibration_data = next(iter(batches_of(network)))[0].numpy()
    # Nothing else than the name of the input's quantizer tells a layer to round its bias.
    with mock.patch("kqat.training.build._rounds_bias", lambda layer: False):
        unrounded = kqat.quantize_model(model, calibration_data=calibration_data)
    models = {
        "float (Keras 3)": (keras, model),
        "kqat": (keras, kqat.quantize_model(model, calibration_data=calibration_data)),
        "kqat, biases as they are": (keras, unrounded),
        "float (tf_keras)": (tf_keras, legacy),
        "tfmot": (tf_keras, tfmot_quantize_model(legacy)),
    }
    for module, compiled in models.values():
        compiled.compile(module.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    return models


def batches_of(network: Network, steps: int = STEPS) -> tf.data.Dataset:
    """Random images and labels for so many steps."""
    generator = np.random.default_rng(0)
    samples = steps * network.batch_size
    x = generator.uniform(-1.0, 1.0, (samples, *network.input_shape)).astype(np.float32)
    y = generator.integers(0, CLASSES, samples)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(network.batch_size).cache()


def step_of_fit(
    module: ModuleType, model: Any, batches: tf.data.Dataset, callbacks: Sequence[Any] = ()
) -> Callable[[], Seconds]:
    """A function that runs one `fit` and returns its median step, with what `callbacks` do in it.

    What `fit` does around its steps is left out.
    """

    def run() -> Seconds:
        started: list[Seconds] = []
        steps: list[Seconds] = []
        begin = module.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: started.append(Seconds.now())
        )
        end = module.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: steps.append(Seconds.now().since(started[-1]))
        )
        every = [begin, *callbacks, end]
        model.fit(batches, epochs=1, shuffle=False, verbose=0, callbacks=every)
        return Seconds(*(float(s) for s in np.median(steps, axis=0)))

    return run


def _rows(name: str, measured: Measured) -> list[tuple[str, ...]]:
    return [
        (
            name,
            case,
            f"{1e3 * spread(measured, case).median:.1f}",
            reference,
            _with_error(measured, case, reference, "wall"),
            _with_error(measured, case, reference, "processor"),
        )
        for case, reference in _ratios(measured)
    ]


def _ratios(measured: Measured) -> list[tuple[str, str]]:
    return [pair for pair in RATIOS if set(pair) <= set(measured)]


def _with_error(measured: Measured, case: str, reference: str, clock: str) -> str:
    """A ratio with its quartiles, and the standard error of the median of a normal sample."""
    found = ratio(measured, case, reference, clock)
    deviation = (found.upper - found.lower) / 1.349
    return f"{found} ± {1.253 * deviation / math.sqrt(len(measured[case])):.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="runs of each model")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, help="where to write JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, two rounds")
    return parser


if __name__ == "__main__":
    main()
