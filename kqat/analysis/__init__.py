"""What a QAT model loses where, why, and how few bits each layer needs."""

from kqat.analysis.causes import Cause, Finding
from kqat.analysis.diagnosis import Diagnosis, LayerLoss, diagnose
from kqat.analysis.plots import figure_class, plot_quantization
from kqat.analysis.remedies import Remedy
from kqat.analysis.sensitivity import (
    LayerCost,
    Measure,
    Sensitivity,
    measured_layers,
    sensitivity,
)
from kqat.analysis.tensorboard import TensorBoardQuantization

__all__ = [
    "Cause",
    "Diagnosis",
    "Finding",
    "LayerCost",
    "LayerLoss",
    "Measure",
    "Remedy",
    "Sensitivity",
    "TensorBoardQuantization",
    "diagnose",
    "figure_class",
    "measured_layers",
    "plot_quantization",
    "sensitivity",
]
