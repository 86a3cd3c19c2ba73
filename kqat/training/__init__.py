"""Plan to QAT model, and all that moves while it trains: quantizers, calibration, callbacks and
algorithms.
"""

from kqat.training import algorithms, batchnorm
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.algorithms.scaling import INPUT_AXES, blocks_of, blocks_text
from kqat.training.build import (
    all_layers,
    check_preserved,
    check_quantized,
    check_unquantized,
    is_quantized,
    trained_model,
    wrap,
)
from kqat.training.calibration import (
    DEFAULT_METHOD,
    CalibrationWarning,
    as_tensors,
    batches,
    beyond_calibration,
    calibrate,
    calibrate_for,
    check_method,
    of_fixed_shape,
    some_samples,
)
from kqat.training.callbacks import FreezeBatchNorm, FreezeObservers, QatCallback
from kqat.training.clustering import cluster
from kqat.training.distiller import Distiller
from kqat.training.finetuning import WarmUpCosine, finetune, finetune_callbacks
from kqat.training.finite_numbers import check_finite
from kqat.training.loss_check import (
    may_add_losses,
    same_penalties,
    weight_penalties,
    wrong_losses,
)
from kqat.training.method_choice import judged_values
from kqat.training.preservation import Preserve, preserved_kinds
from kqat.training.pruning import Pruning, prune
from kqat.training.quantized_recurrence import QuantizedRecurrence
from kqat.training.range_checks import ValueNames
from kqat.training.range_drift import warn_of_drift
from kqat.training.schedules.batchnorm_estimation import ReestimateBatchNorm, reestimate_batchnorm
from kqat.training.schedules.delay import QuantizeAfter
from kqat.training.schedules.falling_bits import FallingBits
from kqat.training.schedules.oscillations import (
    DampenOscillations,
    FreezeOscillations,
    Oscillations,
    integers_of,
)
from kqat.training.schedules.stochastic_rounding import StochasticRounding
from kqat.training.unlike_joins import OutputPart, output_parts, with_unlike_members_apart
from kqat.training.unrounded import call_unrounded, call_with, rounded_as
from kqat.training.weight_wrapper import QuantizeWrapper, rounded_once, uncorrected

__all__ = [
    "DEFAULT_METHOD",
    "INPUT_AXES",
    "ActivationQuantizer",
    "CalibrationWarning",
    "DampenOscillations",
    "Distiller",
    "FallingBits",
    "FreezeBatchNorm",
    "FreezeObservers",
    "FreezeOscillations",
    "Oscillations",
    "OutputPart",
    "Preserve",
    "Pruning",
    "QatCallback",
    "QuantizeAfter",
    "QuantizeWrapper",
    "QuantizedRecurrence",
    "ReestimateBatchNorm",
    "StochasticRounding",
    "ValueNames",
    "WarmUpCosine",
    "algorithms",
    "all_layers",
    "as_tensors",
    "batches",
    "batchnorm",
    "beyond_calibration",
    "blocks_of",
    "blocks_text",
    "calibrate",
    "calibrate_for",
    "call_unrounded",
    "call_with",
    "check_finite",
    "check_method",
    "check_preserved",
    "check_quantized",
    "check_unquantized",
    "cluster",
    "finetune",
    "finetune_callbacks",
    "integers_of",
    "is_quantized",
    "judged_values",
    "may_add_losses",
    "of_fixed_shape",
    "output_parts",
    "preserved_kinds",
    "prune",
    "reestimate_batchnorm",
    "rounded_as",
    "rounded_once",
    "same_penalties",
    "some_samples",
    "trained_model",
    "uncorrected",
    "warn_of_drift",
    "weight_penalties",
    "with_unlike_members_apart",
    "wrap",
    "wrong_losses",
]
