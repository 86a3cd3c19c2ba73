"""Ways in which training could move ranges, beside the one that it uses: evidence for `Anchor`.

    python -m benchmarks.range_following

Writes `benchmarks/range_following.json` after each cell, and `range_following.md` beside it; cells
that the JSON holds are not measured again. The network and its task are those of
`benchmarks.dropout_ranges`; data are mixed, or sorted by class. One training run records the
extremes of every batch at every quantizer. Each way then finds its ranges from these records, and
the trained model is judged with them: SQNR in dB against the float model of the same weights. So
all ways see the same weights, which each would have moved a little otherwise by itself.

The ways:

- *now*: what `kqat.grids.Anchor` does.
- *16 times*: extremes follow larger ones 16 times as fast as smaller ones' average, now 4 times.
- *one sample's weight*: smaller extremes weigh by the size of their batch, 1 at 32.
- *spread*: what batches of this size show on the average, over what they showed on the average in
  calibration (from the extremes of its samples), is the factor of the calibrated range, where it
  is more than an eighth above or a quarter below 1. A moving average of all batches, which weighs
  larger and smaller ones alike.
- *spread, where there is no noise*: that, but *now* where calibration saw noise of Dropout.
- *again*: a new calibration.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import kqat
from benchmarks.dropout_ranges import network, sqnr, task
from kqat.base import write_file
from kqat.grids import FOLLOWING, Anchor, arithmetic
from kqat.training import ActivationQuantizer

OUT = Path(__file__).with_suffix(".json")
RATES = (0.0, 0.3, 0.8, 0.99)
BATCH_SIZES = (1, 8, 32)
ORDERS = ("mixed", "sorted")
# Training long enough to move ranges, in a benchmark short enough to run.
EPOCHS = {1: 2, 8: 5, 32: 10}
NOW, AGAIN = "now", "again"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of one quantizer: all arrays have the two magnitudes, `-low` and `high`.

    Attributes:
        anchor: the rows of `Anchor`, `(ROWS, 2)`.
        count: batches that calibration counts for.
        samples: the extremes of each sample in calibration, `(2, samples)`.
        batches: those of each batch in training, `(steps, 2)`.
        size: samples in a batch.
    """

    anchor: np.ndarray
    count: float
    samples: np.ndarray
    batches: np.ndarray
    size: int

    @property
    def calibrated(self) -> np.ndarray:
        """The calibrated range."""
        return self.anchor[0]

    def shares(self) -> np.ndarray:
        """The weight of each batch in the moving average."""
        counts = self.count + np.arange(len(self.batches))
        return (1.0 - FOLLOWING.decay) / -np.expm1((counts + 1.0) * math.log(FOLLOWING.decay))

    def without_noise(self) -> np.ndarray:
        """The batches' extremes without what noise adds to them."""
        anchor, batches = (np.asarray(v, np.float32) for v in (self.anchor, self.batches))
        return np.asarray(Anchor.without_noise(anchor[:, None], batches), float)


def moving_extremes(seen: Seen, more: float, less: float) -> np.ndarray:
    """The range of `Anchor`, by the weights of larger and of smaller extremes."""
    calibrated, start, slope, _, _, most = seen.anchor
    extremes = Anchor.seen(seen.anchor).astype(float)
    for share, batch in zip(seen.shares(), seen.without_noise(), strict=True):
        step = np.minimum(batch, extremes.sum() * 1.5 + most) - extremes
        extremes = extremes + np.minimum(share * np.where(step < 0.0, less, more), 1.0) * step
    kept = calibrated * np.minimum(extremes * slope, 1.0)
    grown = calibrated * (extremes * slope / 4.0 - 1.0)
    beyond = np.maximum(extremes - start, 0.0)
    return kept + np.maximum(np.minimum(5.0 * beyond, np.maximum(grown, beyond)), 0.0)


def expected(samples: np.ndarray, size: int) -> np.ndarray:
    """The mean of the greatest of `size` of the samples, `(2, samples)` -> `(2,)`."""
    values = np.sort(np.maximum(samples, 0.0), axis=1)
    below = (np.arange(values.shape[1] + 1) / values.shape[1]) ** size
    return (values * np.diff(below)).sum(axis=1)


def by_spread(seen: Seen) -> np.ndarray:
    """The calibrated range times what became of the average extremes of a batch."""
    usual = expected(seen.samples, seen.size)
    average = usual.copy()
    for share, batch in zip(seen.shares(), seen.without_noise(), strict=True):
        average = average + share * (batch - average)
    some = usual > 1e-6 * usual.max()
    ratio = np.where(some, average / np.where(some, usual, 1.0), 1.0)
    wider = np.clip(1.0 + 5.0 * (ratio - 1.125), 1.0, np.maximum(ratio, 1.0))
    narrower = np.clip(1.0 - 5.0 * (0.75 - ratio), np.minimum(ratio, 1.0), 1.0)
    return seen.calibrated * np.where(ratio > 1.0, wider, narrower)


def by_spread_without_noise(seen: Seen) -> np.ndarray:
    """`by_spread` where calibration saw no noise."""
    return by_spread(seen) if not seen.anchor[Anchor.ADDED].any() else moving_extremes(seen, 4, 0.1)


WAYS: dict[str, Callable[[Seen], np.ndarray]] = {
    NOW: lambda seen: moving_extremes(seen, 4.0, 0.1),
    "16 times": lambda seen: moving_extremes(seen, 16.0, 0.1),
    "one sample's weight": lambda seen: moving_extremes(seen, 4.0, 0.1 * min(seen.size / 32, 1.0)),
    "spread": by_spread,
    "spread, where there is no noise": by_spread_without_noise,
}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measures, writes and prints the table: cell -> way -> SQNR in dB."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where to write JSON and Markdown")
    parser.add_argument("--smoke", action="store_true", help="one cell of few samples")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, float]] = {}
    if options.out.exists() and not options.smoke:
        found = json.loads(options.out.read_text())
    for rate, size, order in _cells(options.smoke):
        name = f"{rate:g} | {size} | {order}"
        if name not in found:
            found[name] = measure(rate, size, order, 64 if options.smoke else 1024)
            write_file(options.out, (json.dumps(found, indent=1) + "\n").encode())
    text = as_markdown(found)
    write_file(options.out.with_suffix(".md"), text.encode())
    print(text)
    return found


def _cells(smoke: bool) -> Iterator[tuple[float, int, str]]:
    if smoke:
        yield 0.3, 32, "sorted"
        return
    for size in reversed(BATCH_SIZES):
        for rate in RATES:
            for order in ORDERS:
                yield rate, size, order


def measure(rate: float, size: int, order: str, samples: int) -> dict[str, float]:
    """The SQNR in dB of the trained model with the ranges of each way."""
    keras.utils.set_random_seed(0)
    x, y = task(samples)
    model = network(rate)
    epochs = EPOCHS[size]
    steps = math.ceil(samples / size) * epochs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kqat.CalibrationWarning)
        qat = kqat.quantize_model(model, calibration_data=x)
        quantizers = [la for la in qat.layers if isinstance(la, ActivationQuantizer)]
        before = [(np.asarray(q.anchor)[..., 0], float(np.asarray(q.count)[0])) for q in quantizers]
        extremes = _of_samples(qat, quantizers, x)
        if order == "sorted":
            by_class = np.argsort(y, kind="stable")
            x, y = x[by_class], y[by_class]
        with _recorded(quantizers, steps) as records:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            rates = keras.optimizers.schedules.CosineDecay(1e-3, steps)
            qat.compile(keras.optimizers.Adam(rates), loss)
            qat.fit(x, y, batch_size=size, epochs=epochs, shuffle=order == "mixed", verbose=0)
            taken = [record.numpy() for record, _ in records.values()]
        found = {}
        for name, way in WAYS.items():
            parts = zip(quantizers, before, extremes, taken, strict=True)
            for quantizer, (anchor, count), of_samples, batches in parts:
                ends = way(Seen(anchor.astype(float), count, of_samples, batches, size))
                quantizer.site_low.assign([-ends[0]])
                quantizer.site_high.assign([ends[1]])
            found[name] = round(sqnr(qat, x), 2)
        kqat.calibrate(qat, x)
        found[AGAIN] = round(sqnr(qat, x), 2)
    return found


def _of_samples(qat: keras.Model, quantizers: Sequence[Any], x: np.ndarray) -> list[np.ndarray]:
    values = keras.Model(qat.inputs, [q.output for q in quantizers]).predict(x, verbose=0)
    rows = [v.reshape(len(x), -1) for v in values]
    return [np.stack([-row.min(axis=1), row.max(axis=1)]) for row in rows]


@contextlib.contextmanager
def _recorded(quantizers: Sequence[ActivationQuantizer], steps: int) -> Iterator[dict[int, Any]]:
    """Inside, quantizers write the extremes of each batch of training into variables."""
    records = {
        id(q): (tf.Variable(tf.zeros((steps, 2))), tf.Variable(0, dtype=tf.int64))
        for q in quantizers
    }
    observed = ActivationQuantizer._observed

    def recording(layer: ActivationQuantizer, x: Any, site: int) -> Any:
        least, most = arithmetic.bounds(x, layer.clamp)
        record, step = records[id(layer)]
        at, pair = tf.reshape(step, (1, 1)), tf.reshape(tf.stack([-least, most]), (1, 2))
        record.scatter_nd_update(at, pair)
        step.assign_add(1)
        return observed(layer, x, site)

    with mock.patch.object(ActivationQuantizer, "_observed", recording):
        yield records


def as_markdown(found: dict[str, dict[str, float]]) -> str:
    """The table, and how each way compares with *now*."""
    ways = [*WAYS, AGAIN]
    header = ["dropout", "batch size", "data", *ways]
    lines = ["# SQNR in dB after training, by the way in which ranges move", ""]
    lines += ["`python -m benchmarks.range_following` writes this file; what the ways are stands"]
    lines += ["there.", "", "| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for cell, sqnrs in found.items():
        lines.append(f"| {cell} | " + " | ".join(f"{sqnrs[way]:.1f}" for way in ways) + " |")
    lines += ["", "Against what training does now, in dB:", ""]
    lines += ["| way | worst | mean |", "| --- | --- | --- |"]
    for way in ways[1:]:
        gains = [sqnrs[way] - sqnrs[NOW] for sqnrs in found.values()]
        lines.append(f"| {way} | {min(gains):+.2f} | {np.mean(gains):+.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
