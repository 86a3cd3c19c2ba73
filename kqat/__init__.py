"""Quantization-aware training for Keras 3 that ends in a full-integer `.tflite`.

    qat = kqat.quantize_model(model, calibration_data=x[:512])
    qat.compile(optimizer, loss)
    qat.fit(x, y, epochs=3)
    blob = tflite_export.convert(qat)

`kqat` trains; the package `tflite_export` ships.
"""

from kqat.analysis import Diagnosis, Sensitivity, diagnose, sensitivity
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
    Binary,
    Entropy,
    Fixed,
    LastValue,
    LearnedStep,
    LeastSquares,
    MaxAbs,
    MinMax,
    MovingAverage,
    Percentile,
    QuantSpec,
    Ternary,
)
from kqat.old_files import load_model
from kqat.parts import PrecisionBoundary
from kqat.planning import Plan
from kqat.policy_search import SearchedPolicy, search
from kqat.registry import LayerRule, Output, register_layer, supported_layers
from kqat.training import (
    ActivationQuantizer,
    CalibrationWarning,
    Distiller,
    FreezeBatchNorm,
    FreezeObservers,
    Pruning,
    QuantizeWrapper,
    algorithms,
    calibrate,
    cluster,
    prune,
)

__version__ = "0.1.0"

__all__ = [
    "MSE",
    "TARGETS",
    "ActivationQuantizer",
    "Binary",
    "CalibrationError",
    "CalibrationWarning",
    "Diagnosis",
    "Distiller",
    "Entropy",
    "ExportError",
    "Fixed",
    "FreezeBatchNorm",
    "FreezeError",
    "FreezeObservers",
    "FrozenModel",
    "GapCallback",
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
    "Percentile",
    "Plan",
    "PolicyError",
    "PolicyWarning",
    "PrecisionBoundary",
    "Pruning",
    "QuantSpec",
    "QuantizeConfig",
    "QuantizePolicy",
    "QuantizeWrapper",
    "RangeWarning",
    "RuntimeUnavailableError",
    "SearchedPolicy",
    "Sensitivity",
    "SpecError",
    "Target",
    "TargetError",
    "TargetWarning",
    "Ternary",
    "TrainerWarning",
    "UnsupportedLayerError",
    "adapt",
    "algorithms",
    "calibrate",
    "cluster",
    "diagnose",
    "freeze",
    "integer_model",
    "load_model",
    "plan",
    "prune",
    "quantize_annotate_layer",
    "quantize_apply",
    "quantize_model",
    "register_layer",
    "search",
    "sensitivity",
    "strip",
    "supported_layers",
]
