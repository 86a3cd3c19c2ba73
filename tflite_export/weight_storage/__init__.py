"""Weights in fewer bytes: float16 for layers left float, encodings that TFLite Micro decodes."""

from tflite_export.weight_storage import encodings, huffman
from tflite_export.weight_storage.encodings import METHODS
from tflite_export.weight_storage.float16 import halve_weights
from tflite_export.weight_storage.tflm_decode import compress

__all__ = [
    "METHODS",
    "compress",
    "encodings",
    "halve_weights",
    "huffman",
]
