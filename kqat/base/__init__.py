"""Errors, text enumerations, whole files, lazy packages, nested data, progress, names, arrays."""

from kqat.base.atomic_files import save_model, write_file, write_files
from kqat.base.equations import spelled_out
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
    TrainerWarning,
    UnsupportedLayerError,
)
from kqat.base.json_text import json_text
from kqat.base.keras_registration import register_with_keras
from kqat.base.lazy_face import lazy_face
from kqat.base.nested_data import flat_data
from kqat.base.progress import listening, tracked
from kqat.base.quantities import counted, decimal, significant
from kqat.base.scope_names import is_scope_name, scope_name
from kqat.base.short_names import shortened, shortened_apart
from kqat.base.text_enum import TextEnum
from kqat.base.variables import array_of

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
    "TrainerWarning",
    "UnsupportedLayerError",
    "array_of",
    "counted",
    "decimal",
    "flat_data",
    "is_scope_name",
    "json_text",
    "lazy_face",
    "listening",
    "register_with_keras",
    "save_model",
    "scope_name",
    "shortened",
    "shortened_apart",
    "significant",
    "spelled_out",
    "tracked",
    "write_file",
    "write_files",
]
