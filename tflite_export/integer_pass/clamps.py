"""RELU and RELU6 as the integer kernels have them: fused into their producer, or on their own."""

import copy
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, new_operator
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import ACTIVATION_DTYPES, OP_TABLE
from tflite_export.lowering import Labels, same_grid


def fuse_clamps(draft: Draft) -> None:
    """Folds a RELU or RELU6 into its producer where the value between was never marked.

    The integer kernel clamps to the output's range in any case, which for a clamp begins
    at zero; the option only says so.
    """
    model, labels, graph = draft.model, draft.labels, draft.graph
    producers = {int(o): op for op in graph.operators for o in op.outputs}
    kept = []
    for operator in graph.operators:
        name = flatbuffer.op_name(model, operator)
        source = int(operator.inputs[0]) if len(operator.inputs) else -1
        producer: Any = producers.get(source)
        marked = source in labels.sites or source in labels.floats
        clamps = name in ("RELU", "RELU6") and not marked
        if not clamps or not _may_fuse(model, labels, producer, source):
            kept.append(operator)
            continue
        kind = getattr(schema.ActivationFunctionType, name)
        producer.builtinOptions.fusedActivationFunction = kind
        producer.outputs = list(operator.outputs)
        producers[int(operator.outputs[0])] = producer
    graph.operators = kept


def _may_fuse(model: ModelT, labels: Labels, producer: OperatorT | None, value: int) -> bool:
    """Whether the clamp is the one reader of a kernel that clamps and scales as it likes."""
    if producer is None or not hasattr(producer.builtinOptions, "fusedActivationFunction"):
        return False
    graph = model.subgraphs[0]
    rule = OP_TABLE.get(flatbuffer.op_name(model, producer))
    readers = [op for op in graph.operators if value in map(int, op.inputs)]
    marked = [int(t) for t in producer.inputs if int(t) in labels.sites]
    shown = value in map(int, graph.outputs)
    return bool(rule and rule.scales == "own" and len(readers) == 1 and marked and not shown)


def split_clamps(draft: Draft) -> None:
    """Takes a clamp out of a same-scale operator, into which the converter fused it.

    Behind the clamp the scale may be another, which such an operator cannot give.
    """
    model, graph = draft.model, draft.graph
    kinds = schema.ActivationFunctionType
    names = {kinds.RELU: "RELU", kinds.RELU6: "RELU6"}
    kept: list[OperatorT] = []
    for operator in graph.operators:
        kept.append(operator)
        rule = OP_TABLE.get(flatbuffer.op_name(model, operator))
        fused = getattr(operator.builtinOptions, "fusedActivationFunction", kinds.NONE)
        if rule is None or rule.scales != "same" or fused not in names:
            continue
        operator.builtinOptions.fusedActivationFunction = kinds.NONE
        output = int(operator.outputs[0])
        between = copy.copy(graph.tensors[output])
        between.name = flatbuffer.tensor_name(between).encode() + b"/unclamped"
        graph.tensors.append(between)
        operator.outputs = [len(graph.tensors) - 1]
        kept.append(new_operator(model, names[fused], list(operator.outputs), [output]))
    graph.operators = kept


def drop_vast_clamps(draft: Draft) -> None:
    """Makes RELU of a fused RELU6 whose 6 is no int32 on the output's grid: kernels refuse that.

    The output's range ends below 6, so the two are the same.
    """
    kinds = schema.ActivationFunctionType
    for operator in draft.integer_operators:
        options = operator.builtinOptions
        if getattr(options, "fusedActivationFunction", None) == kinds.RELU6:
            scale = float(draft.sites[int(operator.outputs[0])].scale)
            if 6.0 / scale >= 2.0**31:
                options.fusedActivationFunction = kinds.RELU


def drop_idle_clamps(draft: Draft) -> None:
    """Drops RELUs that hand every integer of their input's grid on, as one behind another one does.

    Such a grid begins at zero, and is the output's: the kernel multiplies by one and clamps to what
    is there. A RELU6 ships as RELU where a grid ends at 6.
    """
    graph, sites = draft.graph, draft.sites
    outputs = set(map(int, graph.outputs))
    instead: dict[int, int] = {}
    kept: list[OperatorT] = []
    for operator in graph.operators:
        operator.inputs = [instead.get(int(t), int(t)) for t in operator.inputs]
        result = int(operator.outputs[0]) if len(operator.outputs) else -1
        idle = draft.op_name(operator) == "RELU" and result not in outputs
        own = sites.get(result) if idle else None
        source = sites.get(int(operator.inputs[0])) if own is not None else None
        if own is None or source is None or not _begins_at_zero(source, own):
            kept.append(operator)
            continue
        instead[result] = int(operator.inputs[0])
        draft.hand_name_on(result, instead[result])
    graph.operators = kept


def _begins_at_zero(source: Site, own: Site) -> bool:
    """Whether two sites have one grid, whose smallest integer is zero."""
    lowest = np.iinfo(ACTIVATION_DTYPES[source.bits]).min
    return same_grid(source, own) and source.zero_point == lowest
