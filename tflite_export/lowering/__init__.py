"""Frozen model to marked float file, by the TensorFlow converter; reads the markers back."""

from tflite_export.lowering.converter import lower
from tflite_export.lowering.markers import Labels, same_grid, take_markers

__all__ = [
    "Labels",
    "lower",
    "same_grid",
    "take_markers",
]
