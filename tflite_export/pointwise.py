"""FULLY_CONNECTED as a convolution of one pixel, where only that takes weights of four bits.

TFLite Micro packs the weights of FULLY_CONNECTED with one scale only; its CONV_2D packs those with
one scale per channel. The sums and their rescaling are the same.
"""

import math

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.markers import new_operator, operator_code
from tflite_export.op_table import OP_TABLE
from tflite_export.packing import PACKED_TYPES, pack

# Two RESHAPEs with their tensors and shapes; a matrix that saves less stays as it is.
_COST_BYTES = 512
_BITS = 4


def convolve(model: ModelT, operators: list[OperatorT]) -> None:
    """Has CONV_2D compute those FULLY_CONNECTED whose matrices, int8 up to here, pay for it.

    The convolution's output takes the name of the matrix product, so that both are compared with
    the same site.
    """
    graph = model.subgraphs[0]
    chosen = {id(op) for op in operators if _saved_bytes(model, op) > _COST_BYTES}
    graph.operators = [
        made
        for operator in graph.operators
        for made in (_convolution(model, operator) if id(operator) in chosen else [operator])
    ]


def _saved_bytes(model: ModelT, operator: OperatorT) -> int:
    return math.prod(flatbuffer.tensor_shape(model.subgraphs[0].tensors[operator.inputs[1]])) // 2


def _convolution(model: ModelT, operator: OperatorT) -> list[OperatorT]:
    """RESHAPE to an image of one row, CONV_2D, RESHAPE back."""
    graph = model.subgraphs[0]
    source, weights, output = int(operator.inputs[0]), int(operator.inputs[1]), operator.outputs[0]
    matrix, result = graph.tensors[weights], graph.tensors[output]
    units, features = flatbuffer.tensor_shape(matrix)
    pixels = math.prod(flatbuffer.tensor_shape(graph.tensors[source])) // features
    image = _image(model, source, (1, pixels, 1, features))
    product = _image(model, output, (1, pixels, 1, units))
    graph.tensors[product].name, result.name = result.name, None
    matrix.shape = [units, 1, 1, features]
    matrix.type = PACKED_TYPES[_BITS]
    buffer = schema.BufferT()
    buffer.data = pack(np.asarray(model.buffers[matrix.buffer].data), _BITS)
    model.buffers[matrix.buffer] = buffer
    options = schema.Conv2DOptionsT()
    options.padding = schema.Padding.VALID
    options.strideW = options.strideH = 1
    options.fusedActivationFunction = operator.builtinOptions.fusedActivationFunction
    operator.builtinOptionsType = schema.BuiltinOptions.Conv2DOptions
    operator.builtinOptions = options
    operator.inputs = [image, *map(int, operator.inputs[1:])]
    operator.outputs = [product]
    version = OP_TABLE["CONV_2D"].packing(_BITS).version
    operator.opcodeIndex = operator_code(model, schema.BuiltinOperator.CONV_2D, version)
    return [_reshape(model, source, image), operator, _reshape(model, product, int(output))]


def _image(model: ModelT, like: int, shape: tuple[int, ...]) -> int:
    graph = model.subgraphs[0]
    tensor = schema.TensorT()
    tensor.shape, tensor.type, tensor.buffer = list(shape), graph.tensors[like].type, 0
    tensor.quantization = graph.tensors[like].quantization
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _reshape(model: ModelT, source: int, result: int) -> OperatorT:
    graph = model.subgraphs[0]
    shape = np.asarray(flatbuffer.tensor_shape(graph.tensors[result]), np.int32)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(shape.tobytes(), np.uint8)
    model.buffers.append(buffer)
    tensor = schema.TensorT()
    tensor.shape, tensor.type = [len(shape)], schema.TensorType.INT32
    tensor.buffer = len(model.buffers) - 1
    graph.tensors.append(tensor)
    operator = new_operator(model, "RESHAPE", [source, len(graph.tensors) - 1], [result])
    operator.builtinOptionsType = schema.BuiltinOptions.ReshapeOptions
    operator.builtinOptions = schema.ReshapeOptionsT()
    operator.builtinOptions.newShape = shape
    return operator
