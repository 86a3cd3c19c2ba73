"""PADs that a convolution carries out itself, by its option SAME."""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, TensorT
from tflite_export.integer_pass.draft import Draft

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")


def join_padding(draft: Draft) -> None:
    """Removes the PADs of subgraph 0 that only convolutions read which can pad so themselves.

    SAME puts half of what is lacking before an image and the rest behind it, with the integer of
    real zero, as PAD does. So the integers of the convolution stay what they are, and the padded
    image needs no memory. A site that is named after the padded image has no tensor then.
    """
    model, graph = draft.model, draft.graph
    kept: list[OperatorT] = []
    for operator in graph.operators:
        readers = _readers(model, operator)
        for reader in readers:
            reader.inputs = [operator.inputs[0], *reader.inputs[1:]]
            reader.builtinOptions.padding = schema.Padding.SAME
        if not readers:
            kept.append(operator)
    graph.operators = kept


def _readers(model: ModelT, operator: OperatorT) -> list[OperatorT]:
    """The readers of a PAD's result if all of them can carry it out, else none."""
    graph = model.subgraphs[0]
    value = int(operator.outputs[0])
    if flatbuffer.op_name(model, operator) != "PAD" or value in map(int, graph.outputs):
        return []
    image, padded = (graph.tensors[int(t)] for t in (operator.inputs[0], value))
    pads = flatbuffer.tensor_data(model, graph.tensors[int(operator.inputs[1])])
    if pads is None or pads.shape != (4, 2) or not _have_one_grid(image, padded):
        return []
    readers = [op for op in graph.operators if value in map(int, op.inputs)]
    return readers if all(_pads_so(model, op, value, image, pads) for op in readers) else []


def _have_one_grid(a: TensorT, b: TensorT) -> bool:
    grids = [
        [] if q is None else [np.ravel(q.scale).tolist(), np.ravel(q.zeroPoint).tolist()]
        for q in (a.quantization, b.quantization)
    ]
    return bool(a.type == b.type and grids[0] == grids[1])


def _pads_so(
    model: ModelT, operator: OperatorT, value: int, image: TensorT, pads: np.ndarray
) -> bool:
    """Whether an operator is a convolution to which SAME means `pads`, (axes, 2)."""
    options: Any = operator.builtinOptions
    if (
        flatbuffer.op_name(model, operator) not in _CONVOLUTIONS
        or value in map(int, operator.inputs[1:])
        or options.padding != schema.Padding.VALID
        or np.any(pads[[0, 3]])
    ):
        return False
    weights = model.subgraphs[0].tensors[int(operator.inputs[1])]
    taps, sizes = flatbuffer.tensor_shape(weights)[1:3], flatbuffer.tensor_shape(image)[1:3]
    strides = options.strideH, options.strideW
    dilations = options.dilationHFactor, options.dilationWFactor
    return all(
        tuple(pad) == _same(size, tap, stride, dilation)
        for pad, size, tap, stride, dilation in zip(
            pads[1:3], sizes, taps, strides, dilations, strict=True
        )
    )


def _same(size: int, taps: int, stride: int, dilation: int) -> tuple[int, int]:
    """What SAME puts before and behind `size` pixels (TensorFlow's rule, kernels/padding.h)."""
    places = -(-size // stride)
    lacking = max((places - 1) * stride + (taps - 1) * dilation + 1 - size, 0)
    return lacking // 2, lacking - lacking // 2
