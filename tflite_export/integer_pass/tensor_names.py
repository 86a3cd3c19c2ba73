"""Names tensors after the sites whose values they hold."""

import math
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from kqat.freezing import Node, Ref, is_marker
from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, SubGraphT
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
        known: tuple[Site, int] | None = None
        for site in reversed(named):
            turns += _turns_between(markers[site], markers[later], made_by)
            found, left = _back_to(model, tensor, site, turns, producers)
            later = site
            if found is None:
                continue
            if known is not None:
                ours = _order_between(markers[site], markers[known[0]], made_by, graph)
                if not np.array_equal(ours, _order_in_file(model, found, known[1], producers)):
                    continue  # Two transpositions of the model are one of the file.
            known = site, found
            graph.tensors[found].name = site.name.encode()
            before = _before_move(model, found, producers)
            if before is None:
                break
            tensor, turns = before, left - _is_turn(model, producers[found])


def _moves_between(earlier: Node, later: Node, made_by: Mapping[Ref, Node]) -> list[Node]:
    """The nodes that hand a value on from one marker to another, in order.

    There are none between markers of which neither is behind the other, as those of a slice that
    the model takes twice and the file once: both stand on one value.
    """
    moves: list[Node] = []
    node = None if later is earlier else made_by.get(later.inputs[0])
    while node is not None and node is not earlier:
        moves.insert(0, node)
        node = made_by.get(node.inputs[0]) if node.inputs else None
    return moves if node is earlier else []


def _turns_between(earlier: Node, later: Node, made_by: Mapping[Ref, Node]) -> int:
    """How many transpositions the model has between two markers."""
    turns = 0
    for node in _moves_between(earlier, later, made_by):
        if isinstance(node.layer, keras.layers.Permute):
            shape = [size or 1 for size in node.inputs[0].shape]
            turns += _reorders([0, *node.layer.dims], shape)
    return turns


def _order_between(
    earlier: Node, later: Node, made_by: Mapping[Ref, Node], graph: SubGraphT
) -> np.ndarray:
    """Where each value of `later` stood in `earlier`, by the moves that the model has between."""
    batch = flatbuffer.tensor_shape(graph.tensors[int(graph.inputs[0])])[0]
    shape = (batch, *(int(size or 1) for size in earlier.outputs[0].shape[1:]))
    order: np.ndarray = np.arange(math.prod(shape)).reshape(shape)
    for move in _moves_between(earlier, later, made_by):
        if isinstance(move.layer, keras.layers.Permute):
            order = order.transpose(0, *move.layer.dims)
        order = order.reshape(batch, *(int(size or 1) for size in move.outputs[0].shape[1:]))
    return order.reshape(-1)


def _order_in_file(
    model: ModelT, earlier: int, later: int, producers: dict[int, OperatorT]
) -> np.ndarray:
    """Where each value of a tensor stood in an earlier one, by the moves between them."""
    tensors, moves, current = model.subgraphs[0].tensors, list[OperatorT](), later
    while current != earlier:
        moves.append(producers[current])
        current = int(producers[current].inputs[0])
    shape = flatbuffer.tensor_shape(tensors[earlier])
    order: np.ndarray = np.arange(math.prod(shape)).reshape(shape)
    for move in reversed(moves):
        axes = None
        if flatbuffer.op_name(model, move) == "TRANSPOSE":
            axes = flatbuffer.tensor_data(model, tensors[int(move.inputs[1])])
        order = order if axes is None else order.transpose([int(axis) for axis in axes])
        order = order.reshape(flatbuffer.tensor_shape(tensors[int(move.outputs[0])]))
    return order.reshape(-1)


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
