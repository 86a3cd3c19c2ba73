"""Tells of ranges that training moved far from those of calibration, or trained behind noise."""

import math
import warnings
from collections.abc import Iterable

import keras

from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import all_layers
from kqat.training.calibration import CalibrationWarning

# Three of eight bits: what is left resolves 32 values.
LARGEST_FACTOR = 8.0
# More than Dropout of 0.3 widens values in benchmarks/dropout_ranges.md, less than Dropout of 0.5.
LEAST_NOISE = 1.75
NAMED = 3


def warn_of_drift(qat: keras.Model, *, stacklevel: int) -> None:
    """Warns of ranges that training moved far, and of those that were trained behind Dropout.

    Far is more than 8 times as wide, or as narrow, as after calibration. Ranges follow weights, so
    a model that was calibrated untrained may well do so; but so do the ranges of a training that
    diverged, or that met data unlike those of calibration.

    Where Dropout or noise makes values more than 1.75 times as wide, batches of training hardly
    show what inference computes: what goes beyond the ranges that they left is clipped.

    Args:
        qat: a QAT model.
        stacklevel: as of `warnings.warn`, for this function's caller.

    Warns:
        CalibrationWarning: at most once for each of the two, naming the worst.
    """
    quantizers = dict.fromkeys(la for la in all_layers(qat) if isinstance(la, ActivationQuantizer))
    if far := list(_drifts(quantizers)):
        warnings.warn(
            f"Training moved ranges of '{qat.name}' far away from those of calibration: "
            f"{_worst(far)}. Look whether the training diverged, and whether its data are like "
            "those of calibration; kqat.calibrate(qat, data) finds the ranges of the weights as "
            "they are now.",
            CalibrationWarning,
            stacklevel=stacklevel + 1,
        )
    if hidden := list(_hidden(quantizers)):
        warnings.warn(
            f"Dropout or noise hid from training what inference computes in '{qat.name}': values "
            f"were {_worst(hidden)} as those of inference when the model was calibrated. Where "
            "the weights have moved them since, they may be clipped. Call kqat.calibrate(qat, "
            "data) after fit: it finds the ranges of the weights as they are now, without noise.",
            CalibrationWarning,
            stacklevel=stacklevel + 1,
        )


def _worst(found: list[tuple[float, str]]) -> str:
    found.sort(key=lambda pair: -pair[0])
    more = f" (and {len(found) - NAMED} more)" if len(found) > NAMED else ""
    return f"{'; '.join(text for _, text in found[:NAMED])}{more}"


def _hidden(quantizers: Iterable[ActivationQuantizer]) -> Iterable[tuple[float, str]]:
    """How many times noise widened the values that moved each range, and its description."""
    for quantizer in quantizers:
        factor = quantizer.stretched()
        if factor >= LEAST_NOISE:
            yield factor, f"'{quantizer.label}' {factor:.1f} times as wide"


def _drifts(quantizers: Iterable[ActivationQuantizer]) -> Iterable[tuple[float, str]]:
    """How many powers of two each range has drifted, and its description."""
    for quantizer in quantizers:
        widths = quantizer.widths()
        if widths is None or min(widths) <= 0.0:
            continue
        width, before = widths
        drift = abs(math.log2(width / before))
        if drift > math.log2(LARGEST_FACTOR):
            yield drift, f"'{quantizer.label}' spanned {before:.4g}, and now {width:.4g}"
