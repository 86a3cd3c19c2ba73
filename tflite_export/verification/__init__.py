"""File against model: lockstep on each runtime, the layer profile, and the `Report`."""

from tflite_export.verification import html_page, unknown_writer
from tflite_export.verification.report import (
    Exactness,
    LayerReport,
    OutputAgreement,
    Report,
    RuntimeReport,
    SiteDifference,
)
from tflite_export.verification.unknown_writer import compare_runtimes
from tflite_export.verification.verifier import DEFAULT_RUNTIMES, verify

__all__ = [
    "DEFAULT_RUNTIMES",
    "Exactness",
    "LayerReport",
    "OutputAgreement",
    "Report",
    "RuntimeReport",
    "SiteDifference",
    "compare_runtimes",
    "html_page",
    "unknown_writer",
    "verify",
]
