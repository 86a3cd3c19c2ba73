"""Products that the converter shares between sums: each gets a kernel of its own again."""

import copy

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import OP_TABLE


def split_shared_products(draft: Draft) -> None:
    """Puts biases back into kernels where two layers with equal weights read one value.

    The converter computes such a product once and adds the biases apart. The product has no grid,
    as no layer of the model ends there; with its bias it is a kernel of the op table.
    """
    model, labels, graph = draft.model, draft.labels, draft.graph
    readers: dict[int, list[OperatorT]] = {}
    for operator in graph.operators:
        for tensor in operator.inputs:
            readers.setdefault(int(tensor), []).append(operator)
    ended: dict[int, OperatorT] = {}  # identity of a sum -> the kernel in its place
    shared: set[int] = set()
    outputs = {int(t) for t in graph.outputs}
    for operator in graph.operators:
        rule = OP_TABLE.get(flatbuffer.op_name(model, operator))
        product = int(operator.outputs[0]) if len(operator.outputs) else -1
        marked = product in labels.sites or product in labels.floats or product in outputs
        if rule is None or rule.bias is None or marked:
            continue
        sums = readers.get(product, [])
        kernels = [_with_bias(model, operator, one, product, rule.bias) for one in sums]
        if len(sums) > 1 and all(kernel is not None for kernel in kernels):
            shared.add(id(operator))
            ended.update((id(s), k) for s, k in zip(sums, kernels, strict=True) if k is not None)
    graph.operators = [ended.get(id(op), op) for op in graph.operators if id(op) not in shared]


def _with_bias(
    model: ModelT, kernel: OperatorT, addition: OperatorT, product: int, position: int
) -> OperatorT | None:
    """`kernel` with the constant of `addition` in its bias; `None` if it adds anything else."""
    graph, unclamped = model.subgraphs[0], schema.ActivationFunctionType.NONE
    if flatbuffer.op_name(model, addition) != "ADD":
        return None
    if kernel.builtinOptions.fusedActivationFunction != unclamped:
        return None
    others = [int(t) for t in addition.inputs if int(t) != product]
    data = flatbuffer.tensor_data(model, graph.tensors[others[0]]) if len(others) == 1 else None
    channels = flatbuffer.tensor_shape(graph.tensors[product])[-1]
    if data is None or data.size not in (1, channels):
        return None
    bias = np.broadcast_to(data.reshape(-1), (channels,)).astype(np.float32)
    inputs = [int(t) for t in kernel.inputs]
    if len(inputs) > position and inputs[position] >= 0:
        own = flatbuffer.tensor_data(model, graph.tensors[inputs[position]])
        if own is None:
            return None
        bias = bias + own.reshape(-1)
    like = graph.tensors[others[0]]
    index = flatbuffer.add_tensor(model, [channels], like.type, name=like.name, data=bias)
    whole = copy.copy(kernel)
    whole.builtinOptions = copy.copy(kernel.builtinOptions)
    whole.builtinOptions.fusedActivationFunction = addition.builtinOptions.fusedActivationFunction
    whole.inputs = [*inputs[:position], index, *inputs[position + 1 :]]
    whole.outputs = list(addition.outputs)
    return whole
