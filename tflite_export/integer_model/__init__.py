"""A file's integer arithmetic, to the last integer: as a Keras model, and in NumPy step by step."""

from tflite_export.integer_model.execution import (
    StepDifference,
    carry_out,
    differing_steps,
    execute,
)
from tflite_export.integer_model.keras_model import integer_model
from tflite_export.integer_model.operators import supported
from tflite_export.integer_model.program import Program, Step, read_program

__all__ = [
    "Program",
    "Step",
    "StepDifference",
    "carry_out",
    "differing_steps",
    "execute",
    "integer_model",
    "read_program",
    "supported",
]
