"""Quantization-aware training for Keras 3 that ends in a full-integer `.tflite`.

    qat = kqat.quantize_model(model, calibration_data=x[:512])
    qat.compile(optimizer, loss)
    qat.fit(x, y, epochs=3)
    blob = tflite_export.convert(qat)

`kqat` trains; the package `tflite_export` ships.
"""

from kqat import algorithms as algorithms
from kqat.annotating import quantize_annotate_layer, quantize_apply
from kqat.api import PolicyWarning, RangeWarning, TrainerWarning, adapt, plan, quantize_model
from kqat.config import QuantizeConfig, QuantizePolicy
from kqat.errors import (
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
from kqat.freezing import FrozenModel, freeze, strip
from kqat.layers import ActivationQuantizer, QuantizeWrapper
from kqat.marking import PrecisionBoundary
from kqat.quantizers import (
    Binary,
    Fixed,
    LastValue,
    LearnedStep,
    LeastSquares,
    MaxAbs,
    MinMax,
    MovingAverage,
    Ternary,
)
from kqat.registry import LayerRule, Output, register_layer, supported_layers
from kqat.reporting import Plan
from kqat.schedule import FreezeBatchNorm, FreezeObservers
from kqat.spec import QuantSpec
from kqat.targets import TARGETS, Misfit, Target, TargetWarning

__version__ = "0.1.0"

__all__ = [
    "TARGETS",
    "ActivationQuantizer",
    "Binary",
    "CalibrationError",
    "ExportError",
    "Fixed",
    "FreezeBatchNorm",
    "FreezeError",
    "FreezeObservers",
    "FrozenModel",
    "KqatError",
    "LastValue",
    "LayerRule",
    "LearnedStep",
    "LeastSquares",
    "LoweringError",
    "MaxAbs",
    "MinMax",
    "Misfit",
    "ModelError",
    "MovingAverage",
    "Output",
    "Plan",
    "PolicyError",
    "PolicyWarning",
    "PrecisionBoundary",
    "QuantSpec",
    "QuantizeConfig",
    "QuantizePolicy",
    "QuantizeWrapper",
    "RangeWarning",
    "RuntimeUnavailableError",
    "SpecError",
    "Target",
    "TargetError",
    "TargetWarning",
    "Ternary",
    "TrainerWarning",
    "UnsupportedLayerError",
    "adapt",
    "freeze",
    "plan",
    "quantize_annotate_layer",
    "quantize_apply",
    "quantize_model",
    "register_layer",
    "strip",
    "supported_layers",
]
