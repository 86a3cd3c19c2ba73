"""Quantization-aware training for Keras 3 that ends in a full-integer `.tflite`.

    qat = kqat.quantize_model(model, calibration_data=x[:512])
    qat.compile(optimizer, loss)
    qat.fit(x, y, epochs=3)
    blob = tflite_export.convert(qat)

`kqat` trains; the package `tflite_export` ships.
"""

from kqat.annotate import quantize_annotate_layer, quantize_apply
from kqat.api import PolicyWarning, RangeWarning, TrainerWarning, adapt, plan, quantize_model
from kqat.base import (
    CalibrationError,
    ExportError,
    FreezeError,
    KqatError,
    LoweringError,
    ModelError,
    PolicyError,
    RuntimeUnavailableError,
    SpecError,
    TargetError,
    UnsupportedLayerError,
)
from kqat.config import QuantizeConfig, QuantizePolicy
from kqat.device_model import GapCallback, integer_model
from kqat.devices import TARGETS, Misfit, Target, TargetWarning
from kqat.freezing import FrozenModel, freeze, strip
from kqat.grids import (
    MSE,
    AdditiveNoise,
    Binary,
    Clipped,
    ElementWiseScaling,
    Entropy,
    Fixed,
    Identity,
    LastValue,
    LearnedClip,
    LearnedRange,
    LearnedStep,
    LearnedTernary,
    LeastSquares,
    MaxAbs,
    MinMax,
    MovingAverage,
    Percentile,
    QuantSpec,
    Ternary,
    TrainedThreshold,
)
from kqat.old_files import FileWarning, load_model
from kqat.parts import PrecisionBoundary
from kqat.planning import Plan
from kqat.registry import LayerRule, Output, register_layer, supported_layers
from kqat.training import (
    ActivationQuantizer,
    CalibrationWarning,
    DampenOscillations,
    FallingBits,
    FreezeBatchNorm,
    FreezeObservers,
    FreezeOscillations,
    QuantizeAfter,
    QuantizeWrapper,
    ReestimateBatchNorm,
    StochasticRounding,
    WarmUpCosine,
    algorithms,
    calibrate,
    finetune,
    finetune_callbacks,
    reestimate_batchnorm,
)

__version__ = "0.1.0"

__all__ = [
    "MSE",
    "TARGETS",
    "ActivationQuantizer",
    "AdditiveNoise",
    "Binary",
    "CalibrationError",
    "CalibrationWarning",
    "Clipped",
    "DampenOscillations",
    "ElementWiseScaling",
    "Entropy",
    "ExportError",
    "FallingBits",
    "FileWarning",
    "Fixed",
    "FreezeBatchNorm",
    "FreezeError",
    "FreezeObservers",
    "FreezeOscillations",
    "FrozenModel",
    "GapCallback",
    "Identity",
    "KqatError",
    "LastValue",
    "LayerRule",
    "LearnedClip",
    "LearnedRange",
    "LearnedStep",
    "LearnedTernary",
    "LeastSquares",
    "LoweringError",
    "MaxAbs",
    "MinMax",
    "Misfit",
    "ModelError",
    "MovingAverage",
    "Output",
    "Percentile",
    "Plan",
    "PolicyError",
    "PolicyWarning",
    "PrecisionBoundary",
    "QuantSpec",
    "QuantizeAfter",
    "QuantizeConfig",
    "QuantizePolicy",
    "QuantizeWrapper",
    "RangeWarning",
    "ReestimateBatchNorm",
    "RuntimeUnavailableError",
    "SpecError",
    "StochasticRounding",
    "Target",
    "TargetError",
    "TargetWarning",
    "Ternary",
    "TrainedThreshold",
    "TrainerWarning",
    "UnsupportedLayerError",
    "WarmUpCosine",
    "adapt",
    "algorithms",
    "calibrate",
    "finetune",
    "finetune_callbacks",
    "freeze",
    "integer_model",
    "load_model",
    "plan",
    "quantize_annotate_layer",
    "quantize_apply",
    "quantize_model",
    "reestimate_batchnorm",
    "register_layer",
    "strip",
    "supported_layers",
]
