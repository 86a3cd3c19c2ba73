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
from kqat.training.finetuning import WarmUpCosine, finetune, finetune_callbacks
from kqat.training.quantized_recurrence import QuantizedRecurrence
from kqat.training.schedules.batchnorm_estimation import ReestimateBatchNorm, reestimate_batchnorm
from kqat.training.schedules.delay import QuantizeAfter
from kqat.training.schedules.falling_bits import FallingBits
from kqat.training.schedules.oscillations import DampenOscillations, FreezeOscillations
from kqat.training.schedules.stochastic_rounding import StochasticRounding
from kqat.training.weight_wrapper import QuantizeWrapper

__all__ = [
    "DEFAULT_METHOD",
    "ActivationQuantizer",
    "CalibrationWarning",
    "DampenOscillations",
    "FallingBits",
    "FreezeBatchNorm",
    "FreezeObservers",
    "FreezeOscillations",
    "QuantizeAfter",
    "QuantizeWrapper",
    "QuantizedRecurrence",
    "ReestimateBatchNorm",
    "StochasticRounding",
    "WarmUpCosine",
    "algorithms",
    "batchnorm",
    "calibrate",
    "calibrate_for",
    "check_method",
    "finetune",
    "finetune_callbacks",
    "is_quantized",
    "reestimate_batchnorm",
    "shapes_of",
    "wrap",
]
