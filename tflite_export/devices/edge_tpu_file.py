"""Finds the operators of a file that do not map to the Edge TPU, by their shapes and options."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.devices import TARGETS, shape_limit, too_many_axes, version_limit
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.kernels import OP_TABLE

IO_TYPES = ("int8", "uint8")
# "No fused activation function."
_WITHOUT_CLAMP = ("AVERAGE_POOL_2D", "MAX_POOL_2D", "CONCATENATION")
# Operator -> index of the input that names axes, for Coral's rules "No padding in batch dimension",
# "No packing …" and "Cannot operate on the batch dimension". PACK has an option instead.
_REDUCTIONS = ("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN")


def limits(model: ModelT) -> Iterator[str]:
    """One line for each rule that the file breaks; operators without a kernel are left out."""
    for tensor in (model.subgraphs[0].tensors[int(i)] for i in _ends(model)):
        if (dtype := flatbuffer.type_name(tensor)) not in IO_TYPES:
            name = flatbuffer.tensor_name(tensor)
            yield f"'{name}' is {dtype}; inputs and outputs must be int8"
    if (count := len(model.subgraphs)) > 1:
        yield f"the file has {count} subgraphs; control flow runs on the CPU"
    for graph in model.subgraphs:
        reader = _Reader(model, graph.tensors)
        for operator in graph.operators:
            if TARGETS["edge_tpu"].accelerates(flatbuffer.op_name(model, operator)):
                yield from reader.read(operator)


def _ends(model: ModelT) -> list[int]:
    graph = model.subgraphs[0]
    return [*graph.inputs, *graph.outputs]


class _Reader:
    """Reads the operators of one subgraph."""

    def __init__(self, model: ModelT, tensors: list[Any]):
        self.model, self.tensors = model, tensors

    def read(self, operator: OperatorT) -> Iterator[str]:
        """The lines about one operator, which name the tensor that it writes."""
        name = flatbuffer.op_name(self.model, operator)
        for index in dict.fromkeys(i for i in [*operator.inputs, *operator.outputs] if i >= 0):
            if problem := self._tensor(index):
                yield f"{name}: '{flatbuffer.tensor_name(self.tensors[index])}' {problem}"
        version = self.model.operatorCodes[operator.opcodeIndex].version
        ends = [self._shape(int(i)) for i in (operator.inputs[0], operator.outputs[0])]
        result = flatbuffer.tensor_name(self.tensors[operator.outputs[0]])
        for problem in (
            version_limit(name, version),
            shape_limit(name, ends[0], ends[1]),
            self._options(name, operator),
            self._constants(name, operator),
        ):
            if problem:
                yield f"{name}: '{result}' {problem}"

    def _shape(self, index: int) -> tuple[int, ...]:
        return flatbuffer.tensor_shape(self.tensors[index])

    def _constant(self, operator: OperatorT, position: int) -> np.ndarray | None:
        if position >= len(operator.inputs) or operator.inputs[position] < 0:
            return None
        return flatbuffer.tensor_data(self.model, self.tensors[operator.inputs[position]])

    def _tensor(self, index: int) -> str | None:
        """Why a tensor does not map, or `None`: its type, its unknown sizes or its shape."""
        tensor = self.tensors[index]
        dtype = flatbuffer.type_name(tensor)
        # "Tensor parameters are quantized (8-bit fixed-point numbers; int8 or uint8)."
        if dtype in ("int4", "int2", "int16") or dtype.startswith("float"):
            return f"is {dtype}; the Edge TPU runs 8 bits only"
        # "Tensor sizes are constant at compile-time (no dynamic sizes)."
        signature = tensor.shapeSignature
        if signature is not None and any(size < 0 for size in signature):
            return f"has unknown sizes, {tuple(map(int, signature))}; all must be known"
        if self.model.buffers[tensor.buffer].data is not None and tensor.buffer:
            return None
        return too_many_axes(self._shape(index))

    def _options(self, name: str, operator: OperatorT) -> str | None:
        options = operator.builtinOptions
        clamp = getattr(options, "fusedActivationFunction", 0)
        if name in _WITHOUT_CLAMP and clamp != schema.ActivationFunctionType.NONE:
            return "has a fused activation, which this operator may not have on the Edge TPU"
        # Conv2d, DepthwiseConv2d: "Must use the same dilation in x and y dimensions."
        dilations = [getattr(options, f"dilation{axis}Factor", 1) for axis in "WH"]
        if dilations[0] != dilations[1]:
            return f"has dilations {tuple(dilations)}; both must be the same"
        if name == "PACK" and options.axis == 0:
            return "packs along the batch, which stays on the CPU"
        # StridedSlice: "with ellipsis-axis-mask == 0, and new-axis-max == 0".
        if name == "STRIDED_SLICE" and (options.ellipsisMask or options.newAxisMask):
            return "has an ellipsis or a new axis, which it may not have on the Edge TPU"
        return None

    def _constants(self, name: str, operator: OperatorT) -> str | None:
        # "Model parameters (such as bias tensors) are constant at compile-time."
        for position in OP_TABLE[name].parameters if name in OP_TABLE else ():
            given = position < len(operator.inputs) and operator.inputs[position] >= 0
            if given and self._constant(operator, position) is None:
                return "has weights that are not constants"
        axes = self._constant(operator, 1)
        if name in _REDUCTIONS and axes is not None and 0 in axes:
            return "reduces the batch, which stays on the CPU"
        if name == "PAD" and axes is not None and np.any(axes.reshape(-1, 2)[0]):
            return "pads the batch, which stays on the CPU"
        strides = self._constant(operator, 3)
        # StridedSlice: "Supported only when all strides are equal to 1".
        if name == "STRIDED_SLICE" and strides is not None and np.any(strides != 1):
            return f"has strides {strides.tolist()}; all must be 1"
        # PReLU: "Alpha must be 1-dimensional (only the innermost dimension can be >1 size)."
        if name == "PRELU" and any(size != 1 for size in self._shape(operator.inputs[1])[:-1]):
            return "has slopes along more axes than the last; use shared_axes for the others"
        return self._joined(operator) if name == "CONCATENATION" else None

    def _joined(self, operator: OperatorT) -> str | None:
        # "If any input is a compile-time constant tensor, there must be only 2 inputs, and this
        # constant tensor must be all zeros (effectively, a zero-padding op)."
        for position, index in enumerate(operator.inputs):
            data = self._constant(operator, position)
            if data is None:
                continue
            zero = int(self.tensors[index].quantization.zeroPoint[0])
            if len(operator.inputs) != 2 or np.any(data != zero):
                return "joins a constant; it must be zeros, with only one other input"
        return None
