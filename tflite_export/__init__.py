"""From a trained QAT model to a verified full-integer `.tflite`."""

from tflite_export.exporting import convert

__all__ = ["convert"]
