"""What means of masked steps keep of their values, at growing lengths, and what it costs.

    python -m benchmarks.masked_means

Sentences of 1 to `steps` words are averaged as users write it by hand. The table has the SQNR in dB
of the QAT model against the float model, and the operators of its file: without
`kqat.planning.counted_sums`, which divides in groups of counts, and with it.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import keras
import numpy as np
from keras import layers, ops

import kqat
import tflite_export
from recipes.timing import print_table

WORDS, WIDTH = 20, 8
STEPS = (6, 12, 25, 50, 200, 512)
Row = tuple[str, int, float, float, int, int]


def _plain(x: Any, shown: Any) -> Any:
    return ops.sum(x * shown[..., None], 1) / ops.sum(shown, 1, keepdims=True)


def _weights_first(x: Any, shown: Any) -> Any:
    weights = shown / ops.sum(shown, 1, keepdims=True)
    return ops.sum(x * weights[..., None], 1)


def _root(x: Any, shown: Any) -> Any:
    return ops.sum(x * shown[..., None], 1) * ops.rsqrt(ops.sum(shown, 1, keepdims=True))


def _attention(x: Any, shown: Any) -> Any:
    weights = ops.exp(layers.Dense(1)(x)[..., 0]) * shown
    return ops.sum(x * (weights / ops.sum(weights, 1, keepdims=True))[..., None], 1)


def _repeated(x: Any, shown: Any) -> Any:
    every = ops.repeat(shown[..., None], WIDTH, axis=-1)
    return ops.sum(x * every, 1) / ops.sum(every, 1)


SPELLINGS: Mapping[str, Callable[[Any, Any], Any]] = {
    "sum / count": _plain,
    "weights first": _weights_first,
    "sum * rsqrt(count)": _root,
    "exp weights": _attention,
    "mask over channels": _repeated,
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints; returns spelling, steps, both SQNRs and both numbers of operators."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--only", nargs="+", default=list(SPELLINGS), help="names of spellings")
    options = parser.parse_args(arguments)
    found: list[Row] = []
    for name in options.only:
        for steps in options.steps:
            with mock.patch("kqat.planning.planner.scale_sums", _as_it_is):
                before = measure(SPELLINGS[name], steps, options.samples)
            after = measure(SPELLINGS[name], steps, options.samples)
            found.append((name, steps, before[0], after[0], before[1], after[1]))
    rows = [
        (name, str(steps), f"{b:.1f}", f"{a:.1f}", str(few), str(many))
        for name, steps, b, a, few, many in found
    ]
    header = "mean", "steps", "SQNR before", "SQNR", "operators before", "operators"
    print_table(header, rows)
    return found


def _as_it_is(graph: Any, origins: Any, configs: Any, name: str) -> Any:
    return graph, origins


def measure(spelling: Callable[..., Any], steps: int, samples: int) -> tuple[float, int]:
    """The SQNR in dB on the samples of calibration, and the operators of the file."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, WORDS, (samples, steps))
    ids *= np.arange(steps) < rng.integers(1, steps + 1, samples)[:, None]
    words = keras.Input((steps,), dtype="int32", name="words")
    normal = keras.initializers.RandomNormal(stddev=1.0)
    x = layers.Embedding(WORDS, WIDTH, embeddings_initializer=normal)(words)
    shown = ops.cast(ops.not_equal(words, 0), "float32")
    model = keras.Model(words, spelling(x, shown), name="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kqat.CalibrationWarning)
        qat = kqat.quantize_model(model, calibration_data=ids)
    expected, got = np.asarray(model(ids), np.float64), np.asarray(qat(ids))
    noise = np.mean(np.square(expected - got))
    report = tflite_export.inspect(tflite_export.convert(qat))
    return float(10.0 * np.log10(np.mean(np.square(expected)) / noise)), len(report.operators)


if __name__ == "__main__":
    main()
