"""Marked float file to integer file, as a list of passes that `pipeline` shows in one place."""

from tflite_export.integer_pass import fused_lstm, pipeline
from tflite_export.integer_pass.fused_lstm import call_layer
from tflite_export.integer_pass.pipeline import quantize

__all__ = [
    "call_layer",
    "fused_lstm",
    "pipeline",
    "quantize",
]
