from kqat.devices import TARGETS
from tflite_export.devices import Fallback, NpuEstimate
from tflite_export.exporter import convert, save
from tflite_export.firmware import CSource, to_c
from tflite_export.flatbuffer import Inspection, OperatorInfo, TensorInfo, inspect
from tflite_export.integer_model import integer_model
from tflite_export.runtimes import RUNTIMES
from tflite_export.verification import (
    Exactness,
    LayerReport,
    OutputAgreement,
    Report,
    RuntimeReport,
    SiteDifference,
    verify,
)

__all__ = [
    "RUNTIMES",
    "TARGETS",
    "CSource",
    "Exactness",
    "Fallback",
    "Inspection",
    "LayerReport",
    "NpuEstimate",
    "OperatorInfo",
    "OutputAgreement",
    "Report",
    "RuntimeReport",
    "SiteDifference",
    "TensorInfo",
    "convert",
    "inspect",
    "integer_model",
    "save",
    "to_c",
    "verify",
]
