"""Which tensors have which grid, and which stay float."""

from kqat.freezing import is_marker
from kqat.grids import Site
from tflite_export.flatbuffer import add_tensor, new_operator
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import ACTIVATION_DTYPES, OP_TABLE, TENSOR_TYPES, quantization
from tflite_export.lowering import same_grid, take_markers


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
            written = [t for t in map(int, operator.outputs) if draft.is_quantity(t)]
            tensors = [*draft.activations(operator, rule), *written]
            known = [sites[t] for t in tensors if t in sites]
            for tensor in tensors:
                if known and tensor not in sites:
                    sites[tensor] = known[0]
                    changed = True


def part_merged_values(draft: Draft) -> None:
    """Puts a QUANTIZE before a same-scale operator whose input is another layer's value.

    The converter computes a product once where two layers with equal weights read one value, as
    they do where a model is untrained. Each has a grid of its own, and the file then has the
    product on one of them. And it moves a RESHAPE in between where the model has a value on one
    grid and then on another. Where a layer of the model stands between two grids, nothing is put.
    """
    graph, sites = draft.graph, draft.sites
    placeholders = {id(operator) for operator, _ in [*draft.labels.tables, *draft.labels.lstms]}
    kept = []
    for operator in graph.operators:
        rule = OP_TABLE.get(draft.op_name(operator))
        same = rule is not None and rule.scales == "same" and id(operator) not in placeholders
        if rule is not None and same and not draft.reads_float(operator):
            source, own = draft.activations(operator, rule), sites.get(int(operator.outputs[0]))
            if (
                len(source) == 1
                and own is not None
                and _is_merged(draft, draft.op_name(operator), sites[source[0]], own)
            ):
                tensor = graph.tensors[source[0]]
                name = f"{own.name}/input"
                other = add_tensor(draft.model, tensor.shape, tensor.type, name=name)
                sites[other] = own
                kept.append(new_operator(draft.model, "QUANTIZE", source, [other]))
                operator.inputs = [
                    other if int(t) == source[0] else int(t) for t in operator.inputs
                ]
        kept.append(operator)
    graph.operators = kept


def _is_merged(draft: Draft, name: str, given: Site, own: Site) -> bool:
    """Whether the model has no value of the grid `given` that it hands on to the site `own`.

    A value that the model puts from one grid on the other is none that is handed on.

    `name` is that of the operator that writes `own` in the file.
    """
    if same_grid(given, own) or given.bits != own.bits:
        return False
    frozen = draft.frozen
    made_by = frozen.graph.producers()
    node = next(
        node
        for node in frozen.graph.nodes
        if is_marker(node.layer, "site") and frozen.sites[node.layer.index] == own
    )
    while node.inputs and (before := made_by.get(node.inputs[0])) is not None:
        if is_marker(before.layer, "site"):
            site = frozen.sites[before.layer.index]
            at_once = is_marker(node.layer, "site")
            return same_grid(site, own) or (at_once and same_grid(site, given))
        if not frozen.facts(before).keeps_integers:
            # The value that has this grid is computed here, unless by the operator itself.
            return name not in frozen.facts(before).ops
        node = before
    return False


def find_float_islands(draft: Draft) -> None:
    """Finds the operators that compute on integers.

    The others are those that a float reaches, or that make one of integers without a scale, as a
    float Embedding does; those that touch no quantity at all (they compute shapes), and the
    placeholders of tables.
    """
    floats, graph = draft.labels.floats, draft.graph
    inputs = map(int, graph.inputs)
    floats.update(t for t in inputs if draft.is_quantity(t) and t not in draft.sites)
    makers = [o for o in graph.operators if draft.op_name(o) not in ("QUANTIZE", "DEQUANTIZE")]
    for operator in reversed(makers):
        if any(int(t) in floats for t in operator.outputs):
            read = [int(t) for t in operator.inputs if int(t) >= 0 and draft.is_quantity(int(t))]
            floats.update(t for t in read if t not in draft.sites and not draft.is_constant(t))
    made = {id(o) for o in makers if any(int(t) in floats for t in o.outputs)}
    placeholders = {id(operator) for operator, _ in draft.labels.tables}
    for operator in graph.operators:
        # QUANTIZE is where a float becomes an integer.
        reached = draft.op_name(operator) != "QUANTIZE" and draft.reads_float(operator)
        if reached or id(operator) in made:
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
