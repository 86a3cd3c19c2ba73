"""A value less itself, which is zero, on a grid that is far finer than the value's."""

from tflite_export.flatbuffer import add_tensor, new_operator
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import least_output_scale


def part_own_differences(draft: Draft) -> None:
    """Has SUB of a value and itself write the value's own grid, where its kernel needs that.

    Recurrences begin with such a zero, on the grid of their state, as the converter folds constants
    away. SUB computes no output that is so fine beside its input (`least_output_scale`): TFLite
    Micro ends the process. Any grid is fine enough for zero, and a QUANTIZE behind takes it to the
    finer one.
    """
    graph, sites = draft.graph, draft.sites
    integer = {id(operator) for operator in draft.integer_operators}
    operators = []
    for operator in graph.operators:
        operators.append(operator)
        inputs, result = {int(t) for t in operator.inputs}, int(operator.outputs[0])
        if id(operator) not in integer or draft.op_name(operator) != "SUB" or len(inputs) != 1:
            continue
        given, own = sites.get(min(inputs)), sites.get(result)
        if given is None or own is None:
            continue  # `check_operators` tells of the tensor that was not marked.
        if least_output_scale("SUB", own.bits, float(given.scale)) < own.scale:
            continue
        tensor = graph.tensors[result]
        name = f"{own.name}/difference"
        coarse = add_tensor(draft.model, tensor.shape, tensor.type, name=name)
        sites[coarse], operator.outputs = given, [coarse]
        operators.append(new_operator(draft.model, "QUANTIZE", [coarse], [result]))
        draft.integer_operators.append(operators[-1])
    graph.operators = operators
