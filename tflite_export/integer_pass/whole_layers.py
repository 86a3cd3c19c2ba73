"""Layers that the converter took apart, put together again: their values between are unmarked.

It makes a MUL of a Dense over one channel, leaves the bias of a convolution of one filter behind
as an ADD, and computes two layers of equal weights once, with an ADD for the bias of each.
"""

import copy
import itertools

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, new_operator
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import OP_TABLE
from tflite_export.lowering import Labels

# Lowest version of FULLY_CONNECTED that keeps the axes of its input.
_KEEPS_AXES = 5


def make_layers_whole(draft: Draft) -> None:
    """Gives the layers one operator each where the converter made more."""
    kernels = {w.values.tobytes() for w in draft.frozen.weights if len(w.values.shape) == 2}
    operators = draft.graph.operators
    draft.graph.operators = [_product(draft.model, operator, kernels) for operator in operators]
    _join_biases(draft.model, draft.labels)


def _product(model: ModelT, operator: OperatorT, kernels: set[bytes]) -> OperatorT:
    """FULLY_CONNECTED for a MUL of one channel by the kernel of a Dense; other operators stay."""
    graph = model.subgraphs[0]
    if flatbuffer.op_name(model, operator) != "MUL":
        return operator
    shape = flatbuffer.tensor_shape(graph.tensors[int(operator.outputs[0])])
    for source, factor in (map(int, operator.inputs), map(int, reversed(operator.inputs))):
        data = flatbuffer.tensor_data(model, graph.tensors[factor])
        if data is None or data.dtype != np.float32 or not data.size == shape[-1] > 1:
            continue
        one_channel = (*shape[:-1], 1) == flatbuffer.tensor_shape(graph.tensors[source])
        if not one_channel or (data + np.float32(0)).tobytes() not in kernels:
            continue
        kind = schema.TensorType.FLOAT32
        name = graph.tensors[factor].name
        weights = flatbuffer.add_tensor(
            model, (shape[-1], 1), kind, name=name, data=data.reshape(-1, 1)
        )
        made = new_operator(
            model, "FULLY_CONNECTED", [source, weights], list(operator.outputs), _KEEPS_AXES
        )
        made.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        made.builtinOptions = schema.FullyConnectedOptionsT()
        made.builtinOptions.keepNumDims = True
        clamp = operator.builtinOptions.fusedActivationFunction
        made.builtinOptions.fusedActivationFunction = clamp
        return made
    return operator


def _join_biases(model: ModelT, labels: Labels) -> None:
    """Adds a constant that is added behind an operator with a bias to that bias, in place."""
    graph = model.subgraphs[0]
    producers = {int(o): op for op in graph.operators for o in op.outputs}
    marked = _marked(model, labels)
    kept: list[OperatorT] = []
    replaced: list[OperatorT] = []
    for operator in graph.operators:
        chain = _biased(model, operator, labels, marked, producers)
        if chain is None:
            kept.append(operator)
            continue
        made = _with_bias(model, operator, *chain)
        producers.update((int(o), op) for op in made for o in op.outputs)
        kept += made
        replaced += chain[0]
    # From the end, so that a whole chain goes that nobody reads any more.
    graph.operators = []
    read = set(map(int, graph.outputs))
    for operator in reversed(kept):
        if any(operator is old for old in replaced) and not read & set(map(int, operator.outputs)):
            continue
        graph.operators.append(operator)
        read.update(map(int, operator.inputs))
    graph.operators.reverse()


def _marked(model: ModelT, labels: Labels) -> set[int]:
    """Tensors that hold the numbers of a site: its own, and those that only RESHAPEs part from it.

    The converter moves a RESHAPE before a marker, as between two layers that compute on images.
    """
    graph = model.subgraphs[0]
    marked = set(labels.sites)
    for operator in reversed(graph.operators):
        source = int(operator.inputs[0]) if len(operator.inputs) else -1
        reshapes = flatbuffer.op_name(model, operator) == "RESHAPE"
        if reshapes and int(operator.outputs[0]) in marked and source not in labels.floats:
            marked.add(source)
    return marked


def _biased(
    model: ModelT,
    operator: OperatorT,
    labels: Labels,
    marked: set[int],
    producers: dict[int, OperatorT],
) -> tuple[list[OperatorT], np.ndarray] | None:
    """The operator with a bias and the RESHAPEs before an ADD, and what that adds to each channel.

    `None` where the value between is a value of its own: marked, or a float layer's.
    """
    graph = model.subgraphs[0]
    output = int(operator.outputs[0])
    if flatbuffer.op_name(model, operator) != "ADD" or output not in marked:
        return None
    shape = flatbuffer.tensor_shape(graph.tensors[output])
    for source, other in (map(int, operator.inputs), map(int, reversed(operator.inputs))):
        data = flatbuffer.tensor_data(model, graph.tensors[other])
        if data is None or not _is_per_channel(data, shape):
            continue
        chain = _chain(model, source, shape, labels, producers)
        if chain:
            return chain, np.broadcast_to(data.reshape(-1), shape[-1:])
    return None


def _is_per_channel(data: np.ndarray, shape: tuple[int, ...]) -> bool:
    return data.size == 1 or (data.size == data.shape[-1] == shape[-1])


def _chain(
    model: ModelT,
    value: int,
    shape: tuple[int, ...],
    labels: Labels,
    producers: dict[int, OperatorT],
) -> list[OperatorT]:
    """An operator with a bias and the RESHAPEs behind it that make `value`; empty for others."""
    tensors = model.subgraphs[0].tensors
    chain: list[OperatorT] = []
    if flatbuffer.tensor_shape(tensors[value]) != shape:
        return []
    while value in producers and value not in labels.sites and value not in labels.floats:
        before = producers[value]
        chain.insert(0, before)
        rule = OP_TABLE.get(flatbuffer.op_name(model, before))
        if rule is not None and rule.bias is not None:
            return [] if before.builtinOptions.fusedActivationFunction else chain
        value = int(before.inputs[0])
        same_channels = flatbuffer.tensor_shape(tensors[value])[-1:] == shape[-1:]
        if flatbuffer.op_name(model, before) != "RESHAPE" or not same_channels:
            return []
    return []


def _with_bias(
    model: ModelT, addition: OperatorT, chain: list[OperatorT], more: np.ndarray
) -> list[OperatorT]:
    """A copy of `chain` that adds `more` to its bias and writes what `addition` writes."""
    tensors = model.subgraphs[0].tensors
    made = copy.deepcopy(chain)
    first, position = made[0], OP_TABLE[flatbuffer.op_name(model, made[0])].bias
    assert position is not None  # `_chain` has looked.
    inputs = [int(t) for t in first.inputs]
    bias = more.astype(np.float64)
    if len(inputs) > position and inputs[position] >= 0:
        old = flatbuffer.tensor_data(model, tensors[inputs[position]])
        bias = bias if old is None else bias + old
    kind = schema.TensorType.FLOAT32
    added = flatbuffer.add_tensor(model, bias.shape, kind, data=bias.astype(np.float32))
    first.inputs = [*inputs[:position], added]
    first.builtinOptions.fusedActivationFunction = addition.builtinOptions.fusedActivationFunction
    for operator, behind in itertools.pairwise(made):
        shape = flatbuffer.tensor_shape(tensors[int(operator.outputs[0])])
        between = flatbuffer.add_tensor(model, shape, kind)
        operator.outputs = [between]
        behind.inputs = [between, *map(int, behind.inputs[1:])]
    made[-1].outputs = list(addition.outputs)
    return made
