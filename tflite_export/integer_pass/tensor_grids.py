"""Which tensors have which grid, and which stay float."""

from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import ACTIVATION_DTYPES, OP_TABLE, TENSOR_TYPES, quantization
from tflite_export.lowering import take_markers


def read_markers(draft: Draft) -> None:
    """Takes the markers out of the tree, and labels the tensors that they stood on."""
    draft.labels = take_markers(draft.model, draft.frozen.sites)


def spread_grids(draft: Draft) -> None:
    """Gives unlabelled tensors the grid that same-scale operators hand on, both ways.

    The converter moves markers across RESHAPE and its like, so that one tensor may have none.
    """
    sites = draft.sites
    changed = True
    while changed:
        changed = False
        for operator in draft.graph.operators:
            rule = OP_TABLE.get(draft.op_name(operator))
            if rule is None or rule.scales != "same" or draft.reads_float(operator):
                continue
            tensors = [*draft.activations(operator, rule), *map(int, operator.outputs)]
            known = [sites[t] for t in tensors if t in sites]
            for tensor in tensors:
                if known and tensor not in sites:
                    sites[tensor] = known[0]
                    changed = True


def find_float_islands(draft: Draft) -> None:
    """Finds the operators that compute on integers.

    The others are those that a float reaches, those that touch no quantity at all (they compute
    shapes), and the placeholders of tables.
    """
    floats, graph = draft.labels.floats, draft.graph
    inputs = map(int, graph.inputs)
    floats.update(t for t in inputs if draft.is_quantity(t) and t not in draft.sites)
    placeholders = {id(operator) for operator, _ in draft.labels.tables}
    for operator in graph.operators:
        # QUANTIZE is where a float becomes an integer.
        if draft.op_name(operator) != "QUANTIZE" and draft.reads_float(operator):
            floats.update(int(t) for t in operator.outputs)
            continue
        computes = any(draft.is_quantity(int(t)) for t in [*operator.inputs, *operator.outputs])
        if computes and id(operator) not in placeholders:
            draft.integer_operators.append(operator)


def convert_tensors(draft: Draft) -> None:
    """Gives every tensor with a site its type, scale and zero point."""
    for index, site in draft.sites.items():
        tensor = draft.graph.tensors[index]
        tensor.type = TENSOR_TYPES[ACTIVATION_DTYPES[site.bits]]
        tensor.quantization = quantization([site.scale], [site.zero_point], 0)
