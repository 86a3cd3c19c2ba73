"""Drops RESHAPEs before FULLY_CONNECTED, which flattens its input itself."""

from typing import Any

from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.integer_pass.draft import Draft


def drop_flattening(draft: Draft) -> None:
    """Removes the RESHAPEs of subgraph 0 that only FULLY_CONNECTED reads.

    Without `keep_num_dims` that operator takes an input of two or more axes, whatever their sizes,
    as rows of as many numbers as its weights have (schema.fbs, `FullyConnectedOptions`): its output
    is the same, batch and all. A site that only the dropped tensor was named after is given to the
    tensor that is read in its place.
    """
    model, graph = draft.model, draft.graph
    names = {site.name for sites in draft.labels.named.values() for site in sites}
    kept: list[OperatorT] = []
    # From the end, so that of two RESHAPEs in a row both may go.
    for operator in reversed(graph.operators):
        readers = _readers(model, operator)
        if not readers:
            kept.append(operator)
            continue
        source, dropped = int(operator.inputs[0]), graph.tensors[int(operator.outputs[0])]
        for reader in readers:
            reader.inputs = [source, *reader.inputs[1:]]
        tensor = graph.tensors[source]
        if flatbuffer.tensor_name(dropped) in names and flatbuffer.tensor_name(tensor) not in names:
            tensor.name = dropped.name
    graph.operators = kept[::-1]


def _readers(model: ModelT, operator: OperatorT) -> list[OperatorT]:
    """The readers of a RESHAPE's result if all of them flatten it themselves, else none."""
    graph = model.subgraphs[0]
    value = int(operator.outputs[0])
    if flatbuffer.op_name(model, operator) != "RESHAPE" or value in map(int, graph.outputs):
        return []
    if len(flatbuffer.tensor_shape(graph.tensors[int(operator.inputs[0])])) < 2:
        return []
    readers = [op for op in graph.operators if value in map(int, op.inputs)]
    return readers if all(_flattens(model, op, value) for op in readers) else []


def _flattens(model: ModelT, operator: OperatorT, value: int) -> bool:
    options: Any = operator.builtinOptions
    return (
        flatbuffer.op_name(model, operator) == "FULLY_CONNECTED"
        and not options.keepNumDims
        and value not in map(int, operator.inputs[1:])
    )
