"""What a `.tflite` holds, read from its bytes alone: operators, types, shapes, sizes, work.

Nothing here runs the file or knows the model that it was made of, so any writer's file will do.
"""

import dataclasses
import math

from tflite_export.flatbuffer import tree
from tflite_export.flatbuffer.checks import text
from tflite_export.flatbuffer.tree import ModelT, OperatorT, SubGraphT, TensorT
from tflite_export.kernels import OP_TABLE, multiply_accumulates

# TFLite Micro's custom operator that decodes constants; each of its outputs has two inputs.
DECODE = "TFLM_DECODE"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor: `dtype` is the schema's name in lower case, `scale` `None` without exactly one.

    `channels` counts the scales: 0 for none, 1 for one per tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | None
    zero_point: int | None
    channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorInfo:
    """One operator.

    Attributes:
        name: the schema's, or a custom operator's own.
        version: of the operator.
        subgraph: which one it is in; the file's inputs and outputs are those of 0.
        inputs, outputs: tensors, without those that are left out; constants among them.
        macs: multiply-accumulate operations of one invocation; 0 for what multiplies no matrix.
        constant_bytes: of its constant inputs, and of what DECODE makes its inputs of; 0 for DECODE
            itself.
        weight_dtype: dtype of its weights, `None` without weights.
    """

    name: str
    version: int
    subgraph: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    macs: int
    constant_bytes: int
    weight_dtype: str | None

    @property
    def is_float(self) -> bool:
        """Whether it reads or writes a float."""
        return any(t.dtype.startswith("float") for t in (*self.inputs, *self.outputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """A file: its size, ends and operators in the order in which they run."""

    size_bytes: int
    description: str
    subgraphs: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: tuple[OperatorInfo, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of one invocation."""
        return sum(operator.macs for operator in self.operators)

    @property
    def constant_bytes(self) -> int:
        """Bytes of all constants that operators read, counted once per reader."""
        return sum(operator.constant_bytes for operator in self.operators)

    @property
    def float_operators(self) -> int:
        """How many operators read or write a float."""
        return sum(operator.is_float for operator in self.operators)

    @property
    def decoded(self) -> tuple[TensorInfo, ...]:
        """The tensors that DECODE writes; each lives until the next operator has read it."""
        return tuple(t for op in self.operators if op.name == DECODE for t in op.outputs)

    def decoding_notes(self) -> list[str]:
        """A line on what decoding weights at run time costs; empty where none are decoded."""
        if not self.decoded:
            return []
        sizes = [math.prod(tensor.shape) for tensor in self.decoded]
        return [
            f"weights of {len(sizes)} operators are decoded at each invocation, {sum(sizes):,} "
            f"bytes; the arena holds one operator's at a time, {max(sizes):,} bytes at the most"
        ]

    def counts(self) -> dict[str, int]:
        """Operator -> how many there are, sorted by name."""
        names = [operator.name for operator in self.operators]
        return {name: names.count(name) for name in sorted(set(names))}


def inspect(blob: bytes) -> Inspection:
    """Reads a `.tflite` file of any writer.

    Raises:
        ExportError: if the bytes are no whole TFLite file.
    """
    return inspect_model(tree.read(blob), len(blob))


def inspect_model(model: ModelT, size_bytes: int) -> Inspection:
    """What `inspect` returns, for the tree of a file of `size_bytes` bytes."""
    first = model.subgraphs[0]
    return Inspection(
        size_bytes=size_bytes,
        description=text(model.description),
        subgraphs=len(model.subgraphs),
        inputs=tuple(_tensor(first.tensors[i]) for i in first.inputs),
        outputs=tuple(_tensor(first.tensors[i]) for i in first.outputs),
        operators=tuple(
            _operator(model, graph, index, operator, encoded)
            for index, graph in enumerate(model.subgraphs)
            for encoded in [_encoded_bytes(model, graph)]
            for operator in graph.operators
        ),
    )


def _tensor(tensor: TensorT) -> TensorInfo:
    grid = tensor.quantization
    scales = [] if grid is None or grid.scale is None else [float(s) for s in grid.scale]
    zeros = [] if grid is None or grid.zeroPoint is None else [int(z) for z in grid.zeroPoint]
    return TensorInfo(
        name=tree.tensor_name(tensor),
        dtype=tree.type_name(tensor),
        shape=tree.tensor_shape(tensor),
        scale=scales[0] if len(scales) == 1 else None,
        zero_point=zeros[0] if len(zeros) == 1 and len(scales) == 1 else None,
        channels=len(scales),
    )


def _constant_bytes(model: ModelT, tensor: TensorT) -> int:
    data = model.buffers[tensor.buffer].data
    return 0 if tensor.buffer == 0 or data is None else len(data)


def _encoded_bytes(model: ModelT, graph: SubGraphT) -> dict[int, int]:
    """Tensor that DECODE writes -> the bytes that it is made of."""
    found: dict[int, int] = {}
    for operator in graph.operators:
        if tree.op_name(model, operator) == DECODE:
            sizes = [_constant_bytes(model, graph.tensors[i]) for i in operator.inputs]
            pairs = zip(operator.outputs, sizes[::2], sizes[1::2], strict=False)
            found |= {int(output): data + ancillary for output, data, ancillary in pairs}
    return found


def _operator(
    model: ModelT, graph: SubGraphT, index: int, operator: OperatorT, encoded: dict[int, int]
) -> OperatorInfo:
    name = tree.op_name(model, operator)
    inputs = [graph.tensors[i] for i in operator.inputs if i >= 0]
    outputs = [graph.tensors[i] for i in operator.outputs if i >= 0]
    read = [int(i) for i in operator.inputs if i >= 0 and name != DECODE]
    sizes = [encoded.get(i, _constant_bytes(model, graph.tensors[i])) for i in read]
    shapes = [tree.tensor_shape(graph.tensors[i]) if i >= 0 else () for i in operator.inputs]
    position = OP_TABLE[name].weights if name in OP_TABLE else None
    weights = None
    if position is not None and position < len(operator.inputs):
        weights = operator.inputs[position]
    return OperatorInfo(
        name=name,
        version=model.operatorCodes[operator.opcodeIndex].version,
        subgraph=index,
        inputs=tuple(map(_tensor, inputs)),
        outputs=tuple(map(_tensor, outputs)),
        macs=multiply_accumulates(name, shapes, [tree.tensor_shape(t) for t in outputs]),
        constant_bytes=sum(sizes),
        weight_dtype=None
        if weights is None or weights < 0
        else tree.type_name(graph.tensors[weights]),
    )
