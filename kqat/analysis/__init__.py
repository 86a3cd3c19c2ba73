"""What a QAT model loses where, why, and how few bits each layer needs."""

from kqat.analysis.causes import Cause, Finding
from kqat.analysis.diagnosis import Diagnosis, LayerLoss, Remedy, diagnose
from kqat.analysis.sensitivity import (
    LayerCost,
    Measure,
    Sensitivity,
    measured_layers,
    sensitivity,
)

__all__ = [
    "Cause",
    "Diagnosis",
    "Finding",
    "LayerCost",
    "LayerLoss",
    "Measure",
    "Remedy",
    "Sensitivity",
    "diagnose",
    "measured_layers",
    "sensitivity",
]
