"""A `.tflite` as C++ for TFLite Micro."""

from tflite_export.firmware import c_source
from tflite_export.firmware.c_source import CSource, to_c

__all__ = [
    "CSource",
    "c_source",
    "to_c",
]
