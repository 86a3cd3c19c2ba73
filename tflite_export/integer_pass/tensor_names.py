"""Names tensors after the sites whose values they hold."""

import math
from collections.abc import Mapping, Sequence

import keras

from kqat.freezing import Node, Ref, is_marker
from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.integer_pass.draft import Draft

_MOVES = ("RESHAPE", "TRANSPOSE")  # the converter may carry markers across these
_ANY = math.inf  # the last marker may have been carried across any number of them


def name_tensors(draft: Draft) -> None:
    """Names the tensors of subgraph 0 after their sites.

    Where several markers stood on one tensor, the converter had moved them there across RESHAPEs
    and TRANSPOSEs. Walking back over these operators gives each site the tensor of its own shape,
    behind as many TRANSPOSEs as the model has between the sites. A site has none where the
    converter made one RESHAPE of the two around it.
    """
    model, graph = draft.model, draft.graph
    producers = {int(o): op for op in graph.operators for o in op.outputs}
    markers = {
        draft.frozen.sites[node.layer.index]: node
        for node in draft.frozen.graph.nodes
        if is_marker(node.layer, "site")
    }
    made_by = draft.frozen.graph.producers()
    for index, named in draft.labels.named.items():
        tensor, turns, later = index, _ANY, named[-1]
        for site in reversed(named):
            turns += _turns_between(markers[site], markers[later], made_by)
            found, left = _back_to(model, tensor, site, turns, producers)
            later = site
            if found is None:
                continue
            graph.tensors[found].name = site.name.encode()
            before = _before_move(model, found, producers)
            if before is None:
                break
            tensor, turns = before, left - _is_turn(model, producers[found])


def _turns_between(earlier: Node, later: Node, made_by: Mapping[Ref, Node]) -> int:
    """How many transpositions the model has between two markers."""
    turns = 0
    node = None if later is earlier else made_by.get(later.inputs[0])
    while node is not None and node is not earlier:
        if isinstance(node.layer, keras.layers.Permute):
            shape = [size or 1 for size in node.inputs[0].shape]
            turns += _reorders([0, *node.layer.dims], shape)
        node = made_by.get(node.inputs[0]) if node.inputs else None
    return turns


def _back_to(
    model: ModelT, tensor: int, site: Site, turns: float, producers: dict[int, OperatorT]
) -> tuple[int | None, float]:
    """The tensor of `site`, at or before `tensor`, and how many of the `turns` are left there."""
    current: int | None = tensor
    while current is not None and turns >= 0:
        if turns in (0, _ANY) and _holds(model, current, site):
            return current, 0
        before = _before_move(model, current, producers)
        turns -= before is not None and _is_turn(model, producers[current])
        current = before
    return None, turns


def _is_turn(model: ModelT, operator: OperatorT) -> bool:
    """Whether an operator changes the order of values."""
    if flatbuffer.op_name(model, operator) != "TRANSPOSE":
        return False
    tensors = model.subgraphs[0].tensors
    order = flatbuffer.tensor_data(model, tensors[int(operator.inputs[1])])
    shape = flatbuffer.tensor_shape(tensors[int(operator.inputs[0])])
    return order is None or _reorders([int(i) for i in order], shape)


def _reorders(order: Sequence[int], shape: Sequence[int]) -> bool:
    moved = [axis for axis in order if shape[axis] > 1]
    return moved != sorted(moved)


def _before_move(model: ModelT, tensor: int, producers: dict[int, OperatorT]) -> int | None:
    producer = producers.get(tensor)
    if producer is None or flatbuffer.op_name(model, producer) not in _MOVES:
        return None
    return int(producer.inputs[0])


def _holds(model: ModelT, tensor: int, site: Site) -> bool:
    """Whether the tensor has the site's shape, or that of the operator which computes its values.

    FULLY_CONNECTED has a matrix for more axes, and the convolution of a Conv1D an axis of size 1,
    whose RESHAPE behind it the converter may join with the next.
    """
    graph = model.subgraphs[0]
    shape = flatbuffer.tensor_shape(graph.tensors[tensor])
    batch_size = flatbuffer.tensor_shape(graph.tensors[int(graph.inputs[0])])[0]
    full = (batch_size, *site.shape)
    matrix = (math.prod(full[:-1]), *full[-1:])
    return shape in (full, matrix) or _without_ones(shape) == _without_ones(full)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size > 1)
