"""What is equal is written once: constants, and the vectors of quantization parameters.

The steps of a recurrence share weights; zero points are 8 bytes a channel, all zero.
"""

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema


class SharedQuantization(schema.QuantizationParametersT):
    """Packs like its base; a vector that was packed before is pointed to, not written again."""

    def __init__(self, params: Any, packed: dict[bytes, int]):
        super().__init__()
        self.__dict__.update(vars(params))
        self._packed_vectors = packed

    def Pack(self, builder: flatbuffers.Builder) -> int:
        scale = self._vector(builder, self.scale, np.float32)
        zero_point = self._vector(builder, self.zeroPoint, np.int64)
        schema.QuantizationParametersStart(builder)
        schema.QuantizationParametersAddScale(builder, scale)
        schema.QuantizationParametersAddZeroPoint(builder, zero_point)
        schema.QuantizationParametersAddQuantizedDimension(builder, self.quantizedDimension)
        return schema.QuantizationParametersEnd(builder)

    def _vector(self, builder: flatbuffers.Builder, values: Any, dtype: type) -> int:
        array: np.ndarray = np.asarray(values, dtype)
        key = array.dtype.char.encode() + array.tobytes()
        if key not in self._packed_vectors:
            self._packed_vectors[key] = builder.CreateNumpyVector(array)
        return self._packed_vectors[key]


def share_vectors(model: schema.ModelT) -> None:
    """Has the tensors of `model` share equal scales and zero points when it is packed once."""
    packed: dict[bytes, int] = {}
    for graph in model.subgraphs or ():
        for tensor in graph.tensors or ():
            params = tensor.quantization
            plain = params is not None and params.scale is not None and params.details is None
            if plain and params.zeroPoint is not None and params.min is None and params.max is None:
                tensor.quantization = SharedQuantization(params, packed)


def share_constants(model: schema.ModelT) -> None:
    """Has the operators of `model` that read equal constants on equal grids read one, in place."""
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
