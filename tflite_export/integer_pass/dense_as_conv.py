"""FULLY_CONNECTED as a 1 × 1 convolution, where only that takes packed weights of four bits.

TFLite Micro packs the weights of FULLY_CONNECTED with one scale only; its CONV_2D packs those with
one scale per channel. The sums and their requantization are the same.
"""

import math

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, TensorT, new_reshape, operator_code
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import OP_TABLE, PACKED_TYPES, pack, quantization

# Bytes of two RESHAPEs with their tensors and shapes; a matrix that saves fewer stays as it is.
_COST_BYTES = 512
_BITS = 4


def convolve_dense(draft: Draft) -> None:
    """Has CONV_2D compute the FULLY_CONNECTED whose matrices, int8 up to here, are large enough.

    The convolution's output has no name; the RESHAPE behind it hands the name on.
    """
    model, graph = draft.model, draft.graph
    chosen = {id(op) for op in draft.unpacked if _saved_bytes(model, op) > _COST_BYTES}
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
    matrix = graph.tensors[weights]
    units, features = flatbuffer.tensor_shape(matrix)
    pixels = math.prod(flatbuffer.tensor_shape(graph.tensors[source])) // features
    image = _image(model, source, (1, pixels, 1, features))
    product = _image(model, output, (1, pixels, 1, units))
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
    biases = [int(t) for t in operator.inputs[2:] if t >= 0]
    operator.inputs = [image, weights, *(biases or [_no_bias(model, image, matrix)])]
    operator.outputs = [product]
    version = OP_TABLE["CONV_2D"].packing(_BITS).version
    operator.opcodeIndex = operator_code(model, schema.BuiltinOperator.CONV_2D, version)
    return [new_reshape(model, source, image), operator, new_reshape(model, product, int(output))]


def _image(model: ModelT, like: int, shape: tuple[int, ...]) -> int:
    tensor = model.subgraphs[0].tensors[like]
    return flatbuffer.add_tensor(model, shape, tensor.type, grid=tensor.quantization)


def _no_bias(model: ModelT, image: int, matrix: TensorT) -> int:
    """A bias of zeros, which LiteRT's reference kernel of CONV_2D demands."""
    scale = np.float64(model.subgraphs[0].tensors[image].quantization.scale[0])
    grid = quantization(scale * matrix.quantization.scale, matrix.quantization.zeroPoint, 0)
    zeros = np.zeros(matrix.shape[0], np.int32)
    return flatbuffer.add_tensor(model, zeros.shape, schema.TensorType.INT32, grid=grid, data=zeros)
