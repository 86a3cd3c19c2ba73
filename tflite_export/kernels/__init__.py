"""What integer kernels demand of operators (`op_table`) and of weights."""

from tflite_export.kernels.op_table import (
    LARGEST_MULTIPLIER,
    OP_TABLE,
    OpRule,
    fixed_output,
    kernel_version,
    least_output_scale,
    missing_kernels,
    multiply_accumulates,
)
from tflite_export.kernels.weight_layout import (
    ACTIVATION_DTYPES,
    PACKED_TYPES,
    TENSOR_TYPES,
    Weights,
    constant_on_grid,
    fit_bias,
    pack,
    quantization,
    unpack,
)

__all__ = [
    "ACTIVATION_DTYPES",
    "LARGEST_MULTIPLIER",
    "OP_TABLE",
    "PACKED_TYPES",
    "TENSOR_TYPES",
    "OpRule",
    "Weights",
    "constant_on_grid",
    "fit_bias",
    "fixed_output",
    "kernel_version",
    "least_output_scale",
    "missing_kernels",
    "multiply_accumulates",
    "pack",
    "quantization",
    "unpack",
]
