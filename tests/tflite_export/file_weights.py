"""The integer weights of a file, as they lie in it."""

import numpy as np

from tflite_export import flatbuffer
from tflite_export.kernels.weight_layout import PACKED_TYPES, unpack


def file_integers(blob: bytes) -> list[np.ndarray]:
    """The weights of each operator that has some, flat."""
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    kinds = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    found = []
    for operator in graph.operators:
        if flatbuffer.op_name(model, operator) not in kinds:
            continue
        tensor = graph.tensors[int(operator.inputs[1])]
        data = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
        bits = {kind: bits for bits, kind in PACKED_TYPES.items()}.get(tensor.type)
        shape = flatbuffer.tensor_shape(tensor)
        found.append((unpack(data, bits, shape) if bits else data.astype(np.int8)).reshape(-1))
    return found
