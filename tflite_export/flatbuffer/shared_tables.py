"""Writes equal parts of a file once: constants, strings, vectors and tables.

The steps of a recurrence share weights; zero points are 8 bytes a channel, all zero; a network
has few shapes and few kinds of options.
"""

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema


class SharingBuilder(flatbuffers.Builder):
    """A flatbuffer builder that writes equal strings and equal vectors of numbers once.

    Buffers of constants, which have an alignment of their own, are written by `CreateByteVector`
    and left alone.
    """

    def __init__(self, size_bytes: int):
        super().__init__(size_bytes)
        self._strings: dict[bytes, int] = {}
        self._vectors: dict[bytes, int] = {}

    def CreateString(self, s: Any, *args: Any, **kwargs: Any) -> int:
        key = s if isinstance(s, bytes) else s.encode()
        if key not in self._strings:
            self._strings[key] = super().CreateString(s, *args, **kwargs)
        return self._strings[key]

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        key = x.dtype.str.encode() + x.tobytes()
        if key not in self._vectors:
            self._vectors[key] = super().CreateNumpyVector(x)
        return self._vectors[key]


class _Once:
    """A table that is packed once; an equal table packed later points to it."""

    def __init__(self, table: Any, packed: dict[bytes, int]):
        self._table = table
        self._packed = packed

    def Pack(self, builder: flatbuffers.Builder) -> int:
        key = _key(self._table)
        if key not in self._packed:
            self._packed[key] = self._table.Pack(builder)
        return self._packed[key]


def share_tables(model: schema.ModelT) -> None:
    """Has equal options and equal quantization parameters share one table when `model` is packed.

    Afterwards the tree can only be packed: its options are no longer the schema's objects.
    """
    packed: dict[bytes, int] = {}
    for graph in model.subgraphs or ():
        for tensor in graph.tensors or ():
            if tensor.quantization is not None:
                tensor.quantization = _Once(tensor.quantization, packed)
        for operator in graph.operators or ():
            if operator.builtinOptions is not None:
                operator.builtinOptions = _Once(operator.builtinOptions, packed)


def share_constants(model: schema.ModelT) -> None:
    """Has operators of `model` that read equal constants on equal grids read the same tensor."""
    for graph in model.subgraphs:
        first: dict[Any, int] = {}
        same: dict[int, int] = {}
        for index, tensor in enumerate(graph.tensors):
            data = model.buffers[tensor.buffer].data
            if tensor.buffer and data is not None and len(data):
                key = (tensor.type, *_as_bytes(tensor.shape, data), *_grid(tensor.quantization))
                same[index] = first.setdefault(key, index)
        for operator in graph.operators:
            operator.inputs = [same.get(int(t), int(t)) for t in operator.inputs]


def _grid(params: Any) -> tuple[Any, ...]:
    if params is None:
        return ()
    return (*_as_bytes(params.scale, params.zeroPoint), params.quantizedDimension)


def _as_bytes(*vectors: Any) -> tuple[bytes, ...]:
    return tuple(b"" if vector is None else np.asarray(vector).tobytes() for vector in vectors)


def _key(table: Any) -> bytes:
    """The whole content of a table, with the tables inside it, as a key."""
    if hasattr(table, "__dict__"):
        inner = b"".join(name.encode() + _key(value) for name, value in sorted(vars(table).items()))
        return type(table).__name__.encode() + b"(" + inner + b")"
    if isinstance(table, np.ndarray):
        return table.dtype.str.encode() + table.tobytes() + b";"
    if isinstance(table, list | tuple):
        return b"[" + b"".join(map(_key, table)) + b"]"
    return repr(table).encode() + b";"
