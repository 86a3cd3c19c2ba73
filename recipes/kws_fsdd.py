"""Spoken digits on a microcontroller: a keyword network on MFCC features, or on raw samples.

    python -m recipes.kws_fsdd --network ds_cnn --out out/kws_fsdd
    python -m recipes.kws_fsdd --network conv1d --out out/conv1d_fsdd

Trains on the Free Spoken Digit Dataset's 2,700 clips of one second at 8 kHz, then ships the network
by PTQ (calibration only) and by QAT. `ds_cnn` is MLPerf Tiny's keyword network; it reads ten MFCCs
of 49 frames. `conv1d` is a 1-D network, as used for sensors; it reads the samples themselves.
The test split has 300 clips of the same six speakers, so one clip is a third of a point.

Writes to --out: kws.tflite and kws.keras (QAT), report.json (the verification of kws.tflite) and
results.json.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from recipes import data, running, shipping
from recipes.data import Samples
from recipes.models import conv1d_audio, ds_cnn
from recipes.running import Table
from recipes.training import fit

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
# Low, because the weights need to move by only a few steps of their grids.
QAT_LEARNING_RATE = 3e-4

SAMPLE_RATE = 8000
# 40 ms every 20 ms, as in Zhang et al. 2017, "Hello Edge", section 4.1
# (https://arxiv.org/abs/1711.07128).
FRAME_LENGTH = 320
FRAME_STEP = 160
FFT_LENGTH = 512
MEL_BANDS = 40
MEL_EDGES_HZ = 20.0, 4000.0
COEFFICIENTS = 10
CLASSES = 10


class _Network(NamedTuple):
    """A network, and the function that makes its inputs from samples (n, 8000)."""

    build: Callable[[], keras.Model]
    features: Callable[[np.ndarray], np.ndarray]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe with command-line arguments; returns what results.json holds."""
    options = _options(argv)
    running.start(options)
    network = NETWORKS[options.network]
    splits = _fake_clips() if options.smoke else (data.fsdd("train"), data.fsdd("test"))
    train, test = ((network.features(clips), labels) for clips, labels in splits)

    model = network.build()
    fit(model, train, options.epochs, LEARNING_RATE, batch_size=BATCH_SIZE)
    rows = [running.measure_float("FP32", model, test)]

    ptq = shipping.ptq(model, train, test)
    rows.append(ptq.row)
    qat = shipping.train_on(
        ptq, train, test, options.qat_epochs, QAT_LEARNING_RATE, batch_size=BATCH_SIZE
    )
    shipping.write(options, qat, "kws")
    found = {"test_clips": len(test[1]), "rows": running.as_json([*rows, qat.row])}
    results = running.save_results(options, "kws_fsdd", found)
    running.show(tables(results))
    print(f"\nWritten to {options.out}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What the recipe prints, from what results.json holds."""
    title = f"{results['options']['network']}, {results['test_clips']} clips"
    return [running.row_table(title, results["rows"])]


def mfcc(clips: np.ndarray) -> np.ndarray:
    """Clips (n, 8000) in [-1, 1) as mel-frequency cepstral coefficients (n, 49, 10, 1)."""
    spectrum = tf.abs(tf.signal.stft(clips, FRAME_LENGTH, FRAME_STEP, FFT_LENGTH))
    bands = tf.signal.linear_to_mel_weight_matrix(
        MEL_BANDS, FFT_LENGTH // 2 + 1, SAMPLE_RATE, *MEL_EDGES_HZ
    )
    # Smaller values are the silence of 16-bit samples.
    log_mel = tf.math.log(tf.matmul(spectrum, bands) + 1e-3)
    coefficients = tf.signal.mfccs_from_log_mel_spectrograms(log_mel)[..., :COEFFICIENTS]
    return coefficients.numpy()[..., np.newaxis]


def samples(clips: np.ndarray) -> np.ndarray:
    """Clips (n, 8000) as inputs of the 1-D network, (n, 8000, 1)."""
    return clips[..., np.newaxis]


NETWORKS = {
    "ds_cnn": _Network(lambda: ds_cnn((49, COEFFICIENTS, 1), CLASSES), mfcc),
    "conv1d": _Network(lambda: conv1d_audio((SAMPLE_RATE, 1), CLASSES), samples),
}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = running.parser(__doc__, out="out/kws_fsdd")
    parser.add_argument("--network", choices=NETWORKS, default="ds_cnn")
    parser.add_argument("--epochs", type=int, default=30, help="in float (default 30)")
    parser.add_argument("--qat-epochs", type=int, default=6, help="quantized (default 6)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.epochs = options.qat_epochs = 1
    return options


def _fake_clips() -> tuple[Samples, Samples]:
    """One batch for training and one for testing."""
    random = np.random.default_rng(0)
    clips = random.uniform(-1, 1, (16, SAMPLE_RATE)).astype(np.float32)
    batch = clips, random.integers(0, CLASSES, len(clips))
    return batch, batch


if __name__ == "__main__":
    main()
