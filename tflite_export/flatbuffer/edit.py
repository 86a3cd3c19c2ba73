"""Edits of an object tree: new tensors, operators and operator codes."""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export.flatbuffer.tree import ModelT, OperatorT, tensor_shape


def add_tensor(
    model: ModelT,
    shape: Any,
    kind: int,
    *,
    name: str | bytes | None = None,
    grid: Any = None,
    data: np.ndarray | bytes | None = None,
) -> int:
    """Gives the first subgraph a new tensor, a constant if there is `data`; returns its index.

    Args:
        model: the flatbuffer.
        shape: of the tensor.
        kind: its type, of `schema.TensorType`.
        name: its name; `None` where it needs none.
        grid: its quantization parameters, or `None`.
        data: what a constant holds, of any NumPy type, in the tensor's order.
    """
    tensor = schema.TensorT()
    tensor.shape, tensor.type, tensor.buffer = np.asarray(shape, np.int32), kind, 0
    tensor.name = name.encode() if isinstance(name, str) else name
    tensor.quantization = grid
    if data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(
            data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes(), np.uint8
        )
        model.buffers.append(buffer)
        tensor.buffer = len(model.buffers) - 1
    tensors = model.subgraphs[0].tensors
    tensors.append(tensor)
    return len(tensors) - 1


def new_operator(
    model: ModelT, name: str, inputs: list[int], outputs: list[int], version: int = 1
) -> OperatorT:
    """An operator of subgraph 0 with no options; adds its code to the model where it is new."""
    operator = schema.OperatorT()
    operator.inputs, operator.outputs = inputs, outputs
    operator.opcodeIndex = operator_code(model, getattr(schema.BuiltinOperator, name), version)
    return operator


def new_reshape(model: ModelT, source: int, result: int) -> OperatorT:
    """A RESHAPE of a tensor of subgraph 0 to another one, which has its shape already."""
    shape = np.asarray(tensor_shape(model.subgraphs[0].tensors[result]), np.int32)
    numbers = add_tensor(model, shape.shape, schema.TensorType.INT32, data=shape)
    operator = new_operator(model, "RESHAPE", [source, numbers], [result])
    operator.builtinOptionsType = schema.BuiltinOptions.ReshapeOptions
    operator.builtinOptions = schema.ReshapeOptionsT()
    operator.builtinOptions.newShape = shape
    return operator


def operator_code(model: ModelT, builtin: int, version: int, custom: bytes | None = None) -> int:
    """Index of the operator code `builtin` of `version`, added where it is new.

    `custom` is the name of a custom operator.
    """
    for index, code in enumerate(model.operatorCodes):
        own = max(code.builtinCode, code.deprecatedBuiltinCode), code.version, code.customCode
        if own == (builtin, version, custom):
            return index
    code = schema.OperatorCodeT()
    code.builtinCode, code.version, code.customCode = builtin, version, custom
    code.deprecatedBuiltinCode = min(builtin, 127)
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
