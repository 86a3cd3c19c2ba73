"""Operators that compute the same from the same: one of them is left."""

from collections.abc import Collection
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.integer_pass.draft import Draft

# What such an operator writes may depend on more than on what it reads.
_NOT_ALONE = (
    "CALL", "CALL_ONCE", "IF", "MULTINOMIAL", "RANDOM_STANDARD_NORMAL", "RANDOM_UNIFORM", "WHILE",
)  # fmt: skip
_STATES = (schema.TensorType.RESOURCE, schema.TensorType.VARIANT)


def join_equals(draft: Draft) -> None:
    """Drops operators of subgraph 0 that repeat another one, which their readers read then.

    The converter drops such repetitions among floats, but not behind markers: each marker is
    another value to it. Operators repeat one another if they have one kind, equal options, the
    same inputs, constants by what they hold, and outputs on the same grids. What an output of the
    file is stays, as each output is a tensor of its own. A site that only a dropped tensor was
    named after is given to the tensor that is read in its place.
    """
    model, graph = draft.model, draft.graph
    outputs = set(map(int, graph.outputs))
    constants = {
        index: _content(model, index)
        for index in {int(t) for operator in graph.operators for t in operator.inputs}
        if index >= 0 and draft.is_constant(index)
    }
    first: dict[Any, OperatorT] = {}
    instead: dict[int, int] = {}  # tensor -> the equal one that is read in its place
    kept: list[OperatorT] = []
    for operator in graph.operators:
        operator.inputs = [instead.get(int(t), int(t)) for t in operator.inputs]
        if not _is_function(model, operator):
            kept.append(operator)
            continue
        read = tuple(constants.get(t, t) for t in operator.inputs)
        made = tuple(_description(model, int(t)) for t in operator.outputs)
        what = flatbuffer.op_name(model, operator), _plain(operator.builtinOptions)
        before = first.setdefault((what, read, made), operator)
        if before is operator or outputs.intersection(map(int, operator.outputs)):
            kept.append(operator)
            continue
        for dropped, left in zip(operator.outputs, before.outputs, strict=True):
            instead[int(dropped)] = int(left)
            draft.hand_name_on(int(dropped), int(left))
    graph.operators = kept


def _is_function(model: ModelT, operator: OperatorT) -> bool:
    """Whether what an operator writes depends on what it reads alone."""
    tensors = model.subgraphs[0].tensors
    touched = [tensors[int(t)] for t in (*operator.inputs, *operator.outputs) if t >= 0]
    holds_state = any(t.isVariable or t.type in _STATES for t in touched)
    custom = model.operatorCodes[operator.opcodeIndex].customCode is not None
    known = not custom and flatbuffer.op_name(model, operator) not in _NOT_ALONE
    return known and not holds_state and len(operator.outputs) > 0


def _content(model: ModelT, index: int) -> tuple[Any, ...]:
    data: Any = model.buffers[model.subgraphs[0].tensors[index].buffer].data
    return (*_description(model, index), np.asarray(data).tobytes())


def _description(model: ModelT, index: int) -> tuple[Any, ...]:
    """Type, shape and grid of a tensor."""
    tensor = model.subgraphs[0].tensors[index]
    return tensor.type, flatbuffer.tensor_shape(tensor), _plain(tensor.quantization)


def _plain(value: Any) -> Any:
    """A table of the schema, or what it holds, as values that compare by what they hold."""
    if isinstance(value, np.ndarray | list | tuple):
        return tuple(np.ravel(value).tolist())
    if isinstance(value, Collection) or not hasattr(value, "__dict__"):
        return value
    return type(value).__name__, *((key, _plain(part)) for key, part in vars(value).items())
