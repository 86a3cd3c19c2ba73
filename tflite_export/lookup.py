"""Elementwise functions as exact tables of 256 entries.

No runtime has an int8 table operator, but all have its parts: CAST to int32, ADD 128, GATHER. The
table holds the function's value for every input that eight bits can hold, rounded as in training.
"""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.marking import Site, Tabulated
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.markers import Labels, new_operator


def insert_tables(model: ModelT, labels: Labels, tables: tuple[Tabulated, ...]) -> None:
    """Puts a look-up in the place of each placeholder of `labels.tables`, in place."""
    graph = model.subgraphs[0]
    chosen = {id(placeholder): tables[index] for placeholder, index in labels.tables}
    kept: list[OperatorT] = []
    for operator in graph.operators:
        if id(operator) not in chosen:
            kept.append(operator)
            continue
        source, result = operator.inputs[0], operator.outputs[0]
        sites = labels.sites[source], labels.sites[result]
        kept += _lookup(model, chosen[id(operator)].lookup(*sites), source, result, sites[1])
    graph.operators = kept


def _lookup(
    model: ModelT, table: np.ndarray, source: int, result: int, site: Site
) -> list[OperatorT]:
    graph = model.subgraphs[0]
    shape = graph.tensors[source].shape
    name = site.name.encode()
    wide = _tensor(model, name + b"/wide", shape, schema.TensorType.INT32)
    index = _tensor(model, name + b"/index", shape, schema.TensorType.INT32)
    shift = _tensor(model, name + b"/shift", [], schema.TensorType.INT32, np.int32(128))
    entries = _tensor(model, name + b"/table", [256], schema.TensorType.INT8, table)
    params = schema.QuantizationParametersT()
    params.scale = np.asarray([site.scale], np.float32)
    params.zeroPoint = np.asarray([site.zero_point], np.int64)
    params.quantizedDimension = 0
    graph.tensors[entries].quantization = params

    cast = new_operator(model, "CAST", [source], [wide])
    cast.builtinOptionsType = schema.BuiltinOptions.CastOptions
    cast.builtinOptions = schema.CastOptionsT()
    cast.builtinOptions.inDataType = schema.TensorType.INT8
    cast.builtinOptions.outDataType = schema.TensorType.INT32
    add = new_operator(model, "ADD", [wide, shift], [index])
    add.builtinOptionsType = schema.BuiltinOptions.AddOptions
    add.builtinOptions = schema.AddOptionsT()
    gather = new_operator(model, "GATHER", [entries, index], [result], version=2)
    gather.builtinOptionsType = schema.BuiltinOptions.GatherOptions
    gather.builtinOptions = schema.GatherOptionsT()
    return [cast, add, gather]


def _tensor(
    model: ModelT, name: bytes, shape: Any, dtype: int, data: np.ndarray | np.int32 | None = None
) -> int:
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.buffer = name, dtype, 0
    tensor.shape = np.asarray(shape, np.int32)
    if data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.asarray(data).tobytes(), np.uint8)
        model.buffers.append(buffer)
        tensor.buffer = len(model.buffers) - 1
    graph = model.subgraphs[0]
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1
