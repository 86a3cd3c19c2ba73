"""Plan to QAT model, and all that moves while it trains: quantizers, calibration, callbacks and
algorithms.
"""

from kqat.training import algorithms, batchnorm
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import is_quantized, wrap
from kqat.training.calibration import (
    DEFAULT_METHOD,
    CalibrationWarning,
    calibrate,
    calibrate_for,
    check_method,
    shapes_of,
)
from kqat.training.callbacks import FreezeBatchNorm, FreezeObservers
from kqat.training.quantized_recurrence import QuantizedRecurrence
from kqat.training.unlike_joins import with_unlike_members_apart
from kqat.training.weight_wrapper import QuantizeWrapper

__all__ = [
    "DEFAULT_METHOD",
    "ActivationQuantizer",
    "CalibrationWarning",
    "FreezeBatchNorm",
    "FreezeObservers",
    "QuantizeWrapper",
    "QuantizedRecurrence",
    "algorithms",
    "batchnorm",
    "calibrate",
    "calibrate_for",
    "check_method",
    "is_quantized",
    "shapes_of",
    "with_unlike_members_apart",
    "wrap",
]
