"""The types that a file's inputs and outputs will have, before there are ranges."""

from kqat.graph import Ref
from kqat.planning.plan import LayerPlan, Plan, Role


def end_types(plan: Plan) -> tuple[dict[str, str], dict[str, str]]:
    """The types that the file's inputs and its outputs have by themselves, by name.

    int32 stands for indexes, which have no other. An end that is missing shows its type in the file
    alone, as an input does that no layer reads.
    """
    layers = {layer.name: layer for layer in plan.layers}
    makers = {ref: [layers[n.name]] for n in plan.graph.nodes for ref in n.outputs}
    readers: dict[Ref, list[LayerPlan]] = {}
    for node in plan.graph.nodes:
        for ref in node.inputs:
            readers.setdefault(ref, []).append(layers[node.name])
    graph = plan.graph
    ins, outs = (
        {
            name: kind
            for name, ref in zip(names, refs, strict=True)
            if (kind := _type(plan, ref, around.get(ref, [])))
        }
        for names, refs, around in (
            (plan.input_names, graph.inputs, readers),
            (plan.output_names, graph.outputs, makers),
        )
    )
    return ins, outs


def _type(plan: Plan, ref: Ref, around: list[LayerPlan]) -> str | None:
    """The type of a value at an end, by its quantizer or else by the layers that it is of."""
    if ref.holds_indexes:
        return "uint8" if ref.dtype == "uint8" else "int32"
    roundings = plan.roundings.get(ref, ())
    if roundings:
        specs = {group.name: group.spec for group in plan.groups}
        return _of_bits(specs[roundings[0].group].bits)
    if around and all(layer.role is Role.FLOAT for layer in around):
        return "float32"
    widths = {layer.bits for layer in around}
    return _of_bits(widths.pop()) if len(widths) == 1 and 0 not in widths else None


def _of_bits(bits: int) -> str:
    return "int16" if bits > 8 else "int8"
