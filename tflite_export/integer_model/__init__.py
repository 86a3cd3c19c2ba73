"""A file's integer arithmetic, to the last integer: as a Keras model, and in NumPy step by step."""

from tflite_export.integer_model.execution import carry_out, execute
from tflite_export.integer_model.keras_model import integer_model
from tflite_export.integer_model.operators import kind_of, supported
from tflite_export.integer_model.program import Program, Step, read_program

__all__ = [
    "Program",
    "Step",
    "carry_out",
    "execute",
    "integer_model",
    "kind_of",
    "read_program",
    "supported",
]
