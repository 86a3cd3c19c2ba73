"""Errors, string enumerations, and files that are written whole or not at all."""

from kqat.base.atomic_files import save_model, write_file, write_files
from kqat.base.errors import (
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
from kqat.base.text_enum import TextEnum

__all__ = [
    "CalibrationError",
    "ExportError",
    "FreezeError",
    "KqatError",
    "LoweringError",
    "ModelError",
    "PolicyError",
    "RuntimeUnavailableError",
    "SpecError",
    "TargetError",
    "TextEnum",
    "UnsupportedLayerError",
    "save_model",
    "write_file",
    "write_files",
]
