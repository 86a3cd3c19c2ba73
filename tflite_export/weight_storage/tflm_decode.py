"""Weights that TFLite Micro decodes into its arena before the operator that reads them runs.

One DECODE, the custom operator "TFLM_DECODE", stands before each reader of an encoded tensor: its
output lives until the next operator has run. Two things that LiteRT demands and TFLite Micro does
not are left out: a zero point for each channel, and the scales of a bias whose weights have one
scale per channel. LiteRT has no DECODE, so it cannot read such a file in any case.
"""

import copy
from collections import Counter
from collections.abc import Collection

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export import flatbuffer
from tflite_export.flatbuffer import DECODE, ModelT, OperatorT, TensorT, operator_code
from tflite_export.kernels import OP_TABLE, PACKED_TYPES, OpRule, unpack
from tflite_export.weight_storage import encodings

# Bytes that one DECODE adds to a file: the operator, its tensors, their buffers.
_COST_BYTES = 224


def compress(model: ModelT, methods: Collection[str]) -> None:
    """Encodes the weights of `model`, in place, where that makes the file smaller.

    Args:
        model: an integer model for TFLite Micro alone; 4-bit weights may be packed two a byte.
        methods: those of `encodings.METHODS` that may be used.
    """
    graph = model.subgraphs[0]
    compressor = _Compressor(model, methods)
    operators = []
    for operator in graph.operators:
        rule = OP_TABLE.get(flatbuffer.op_name(model, operator))
        if rule is not None and rule.has_trained_weights:
            _drop_bias_scales(graph.tensors, operator, rule)
            operators += compressor.decoders(operator, rule)
        operators.append(operator)
    graph.operators = operators
    for tensor in graph.tensors:
        if _channels(tensor) > 1 and not np.any(tensor.quantization.zeroPoint):
            tensor.quantization.zeroPoint = [0]


class _Compressor:
    """The working state of `compress`."""

    def __init__(self, model: ModelT, methods: Collection[str]):
        self.model = model
        self.graph = model.subgraphs[0]
        self.methods = methods
        self.encodings: dict[int, encodings.Encoding | None] = {}
        self.constants: dict[bytes, int] = {}
        read = [int(t) for operator in self.graph.operators for t in operator.inputs]
        self.readers = Counter(read)

    def decoders(self, operator: OperatorT, rule: OpRule) -> list[OperatorT]:
        """The DECODE of the weights of `operator`, which reads its output from now on.

        Empty where decoding would not make the file smaller.
        """
        index = int(operator.inputs[rule.weights])
        if index not in self.encodings:
            self.encodings[index] = self._encoding(self.graph.tensors[index], self.readers[index])
        encoding = self.encodings[index]
        if encoding is None:
            return []
        tensor = self.graph.tensors[index]
        if tensor.type == PACKED_TYPES[4]:
            code = self.model.operatorCodes[operator.opcodeIndex]
            operator.opcodeIndex = operator_code(self.model, code.builtinCode, rule.version)
        decoded = copy.copy(tensor)
        decoded.type, decoded.buffer = schema.TensorType.INT8, 0
        decoded.quantization = copy.copy(tensor.quantization)
        if _channels(tensor) == 1:
            decoded.quantization.quantizedDimension = 0
        self.graph.tensors.append(decoded)
        operator.inputs = list(map(int, operator.inputs))
        operator.inputs[rule.weights] = len(self.graph.tensors) - 1
        return [self._decode(encoding, operator.inputs[rule.weights])]

    def _encoding(self, tensor: TensorT, readers: int) -> encodings.Encoding | None:
        """The encoding that, with a DECODE for each reader, is smaller than the tensor itself."""
        data = flatbuffer.tensor_data(self.model, tensor)
        axis = int(tensor.quantization.quantizedDimension) if _channels(tensor) > 1 else None
        if data is None or data.size == 0 or axis not in (None, 0, len(tensor.shape) - 1):
            return None
        plain_bytes = data.nbytes
        if tensor.type == PACKED_TYPES[4]:
            data = unpack(data, 4, flatbuffer.tensor_shape(tensor))
        found = encodings.smallest(data, axis, self.methods)
        pays = found is not None and found.size_bytes + readers * _COST_BYTES < plain_bytes
        return found if pays else None

    def _decode(self, encoding: encodings.Encoding, output: int) -> OperatorT:
        operator = schema.OperatorT()
        operator.inputs = [self._constant(encoding.data), self._constant(encoding.ancillary)]
        operator.outputs = [output]
        custom = schema.BuiltinOperator.CUSTOM
        operator.opcodeIndex = operator_code(self.model, custom, 1, DECODE.encode())
        return operator

    def _constant(self, data: bytes) -> int:
        """The tensor of these bytes, made when they are first asked for."""
        if data not in self.constants:
            kind = schema.TensorType.UINT8
            self.constants[data] = flatbuffer.add_tensor(self.model, [len(data)], kind, data=data)
        return self.constants[data]


def _drop_bias_scales(tensors: list[TensorT], operator: OperatorT, rule: OpRule) -> None:
    """Drops the scales of a bias whose weights have one per channel: no kernel reads them."""
    if rule.bias is None or len(operator.inputs) <= rule.bias or operator.inputs[rule.bias] < 0:
        return
    if _channels(tensors[int(operator.inputs[rule.weights])]) > 1:
        tensors[int(operator.inputs[rule.bias])].quantization = None


def _channels(tensor: TensorT) -> int:
    grid = tensor.quantization
    return 0 if grid is None or grid.scale is None else len(grid.scale)
