"""Tells of ranges that training took far away from those that calibration found."""

import math
import warnings
from collections.abc import Iterable

import keras

from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import all_layers
from kqat.training.calibration import CalibrationWarning

# Three of eight bits: what is left resolves 32 values.
LARGEST_FACTOR = 8.0
NAMED = 3


def warn_of_drift(qat: keras.Model, *, stacklevel: int) -> None:
    """Warns where a range is more than 8 times as wide, or as narrow, as after calibration.

    Ranges follow weights, so a model that was calibrated untrained may well do so; but so do the
    ranges of a training that diverged, or that met data unlike those of calibration.

    Args:
        qat: a QAT model.
        stacklevel: as of `warnings.warn`, for this function's caller.

    Warns:
        CalibrationWarning: once, naming the worst.
    """
    quantizers = [la for la in all_layers(qat) if isinstance(la, ActivationQuantizer)]
    found = sorted(_drifts(dict.fromkeys(quantizers)), key=lambda pair: -pair[0])
    if not found:
        return
    more = f" (and {len(found) - NAMED} more)" if len(found) > NAMED else ""
    warnings.warn(
        f"Training moved ranges of '{qat.name}' far away from those of calibration: "
        f"{'; '.join(text for _, text in found[:NAMED])}{more}. Look whether the training "
        "diverged, and whether its data are like those of calibration; kqat.calibrate(qat, data) "
        "finds the ranges of the weights as they are now.",
        CalibrationWarning,
        stacklevel=stacklevel + 1,
    )


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
