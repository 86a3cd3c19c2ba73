"""The bytes of a `.tflite` and its tree: `read`, `write`, `inspect`, and edits of a tree."""

from tflite_export.flatbuffer.edit import add_tensor, new_operator, new_reshape, operator_code
from tflite_export.flatbuffer.inspection import (
    DECODE,
    Inspection,
    OperatorInfo,
    TensorInfo,
    inspect,
    inspect_model,
)
from tflite_export.flatbuffer.shared_tables import share_constants
from tflite_export.flatbuffer.tree import (
    ModelT,
    OperatorT,
    SubGraphT,
    TensorT,
    compact,
    is_numeric,
    op_name,
    read,
    tensor_data,
    tensor_dtype,
    tensor_name,
    tensor_shape,
    type_name,
    write,
)

__all__ = [
    "DECODE",
    "Inspection",
    "ModelT",
    "OperatorInfo",
    "OperatorT",
    "SubGraphT",
    "TensorInfo",
    "TensorT",
    "add_tensor",
    "compact",
    "inspect",
    "inspect_model",
    "is_numeric",
    "new_operator",
    "new_reshape",
    "op_name",
    "operator_code",
    "read",
    "share_constants",
    "tensor_data",
    "tensor_dtype",
    "tensor_name",
    "tensor_shape",
    "type_name",
    "write",
]
