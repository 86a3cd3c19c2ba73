"""Weights of layers that stay float, in float16: half the bytes, widened when the file is read."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.base import ExportError
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, new_operator

# With fewer weights, a DEQUANTIZE and a second tensor cost more bytes than float16 saves.
_FEWEST = 128
# Of DEQUANTIZE for float16: TensorFlow's `lite/tools/versioning/op_version.cc`.
_VERSION = 3


def halve_weights(model: ModelT) -> None:
    """Rounds large float constants to float16, each behind a DEQUANTIZE to float32, in place.

    The rounding is 2**-11 of a weight at most, or 2**-25 below 2**-14.

    Raises:
        ExportError: if the file has no large float constant, or one is beyond float16's range.
    """
    graph = model.subgraphs[0]
    widened: dict[int, int] = {}
    first: list[OperatorT] = []
    for operator in graph.operators:
        for index in map(int, operator.inputs):
            if index >= 0 and index not in widened and _is_large(model, index):
                widened[index], dequantize = _halved(model, index)
                first.append(dequantize)
        operator.inputs = [widened.get(int(t), int(t)) for t in operator.inputs]
    if not widened:
        raise ExportError(
            f"Expected a layer that stays float, with {_FEWEST} weights or more, for "
            "float_weights='float16'. "
            "Received: a model without. Leave float_weights out, or give a layer None in the "
            "policy."
        )
    graph.operators = [*first, *graph.operators]


def _is_large(model: ModelT, index: int) -> bool:
    tensor = model.subgraphs[0].tensors[index]
    data = model.buffers[tensor.buffer].data
    is_float = tensor.type == schema.TensorType.FLOAT32
    return is_float and data is not None and len(data) >= 4 * _FEWEST


def _halved(model: ModelT, index: int) -> tuple[int, OperatorT]:
    """The float32 tensor that DEQUANTIZE makes of the float16 one, and that operator."""
    tensor = model.subgraphs[0].tensors[index]
    name = flatbuffer.tensor_name(tensor)
    values = np.asarray(flatbuffer.tensor_data(model, tensor))
    if np.max(np.abs(values)) > np.finfo(np.float16).max:
        raise ExportError(
            f"Expected float weights within ±65504 for float_weights='float16'. Received: "
            f"'{name}' with {np.max(np.abs(values)):.3g}. Leave float_weights out."
        )
    kinds, shape, halves = schema.TensorType, tensor.shape, values.astype(np.float16)
    half = flatbuffer.add_tensor(model, shape, kinds.FLOAT16, name=name, data=halves)
    wide = flatbuffer.add_tensor(model, shape, kinds.FLOAT32, name=f"{name}/float32")
    operator = new_operator(model, "DEQUANTIZE", [half], [wide], _VERSION)
    operator.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
    operator.builtinOptions = schema.DequantizeOptionsT()
    return wide, operator
