"""Names tensors after the sites whose values they hold."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import keras
import numpy as np

from kqat.freezing import Node, Ref, is_marker
from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, SubGraphT
from tflite_export.integer_pass.draft import Draft

_MOVES = ("RESHAPE", "TRANSPOSE")  # the converter may carry markers across these


@dataclasses.dataclass(frozen=True)
class _Named:
    """A site, the tensor that holds it, and so the order in which the ones before it are read."""

    site: Site
    tensor: int


def name_tensors(draft: Draft) -> None:
    """Names the tensors of subgraph 0 after their sites.

    Where several markers stood on one tensor, the converter had moved them there across RESHAPEs
    and TRANSPOSEs. Walking back over these operators gives each site the tensor of its own shape
    whose values lie in the model's order. A site has none where the converter made one RESHAPE of
    the two around it.

    The placeholder of a table is a marker to the converter, which moves a TRANSPOSE from behind it
    to before it, and before the marker of the value that the table reads. So what is known of a
    table's result tells the order of its input.
    """
    model, graph = draft.model, draft.graph
    tables = {int(op.outputs[0]): op for op, _ in draft.labels.tables}
    # A lookup is several operators by now, its placeholder one that keeps the order.
    producers = {int(o): op for op in graph.operators for o in op.outputs} | tables
    markers = {
        draft.frozen.sites[node.layer.index]: node
        for node in draft.frozen.graph.nodes
        if is_marker(node.layer, "site")
    }
    made_by = draft.frozen.graph.producers()

    def lies_in_order(site: Site, tensor: int, later: _Named | None) -> bool:
        """Whether a tensor holds a site's values in the model's order, as `later` tells it."""
        if later is None:
            return True  # The last marker may have been carried across any number of moves.
        between = _moves_between(markers[site], markers[later.site], made_by)
        moves = _moves_in_file(tensor, later.tensor, producers)
        return _have_one_order(model, markers[site], between, tensor, moves)

    ends: dict[int, _Named] = {}  # what a table reads, directly or moved -> what is known behind it
    found_for: dict[int, list[_Named]] = {}
    for index in _from_the_end(graph, draft.labels.named):
        found_for[index] = []
        tensor: int | None = index
        known = ends.get(index)
        for site in reversed(draft.labels.named[index]):
            found = next(
                (
                    one
                    for one in _before_moves(model, tensor, producers)
                    if _holds(model, one, site) and lies_in_order(site, one, known)
                ),
                None,
            )
            if found is None:
                continue
            known = _Named(site, found)
            found_for[index].append(known)
            tensor = _before_move(model, found, producers)
            if tensor is None:
                break
        table = tables.get(_before_moves(model, index, producers)[-1])
        if table is not None and known is not None:
            for source in _before_moves(model, int(table.inputs[0]), producers):
                ends.setdefault(source, known)
    # Where two sites are one tensor, lockstep finds the other by its values: the last name stays.
    for index in draft.labels.named:
        for one in found_for[index]:
            graph.tensors[one.tensor].name = one.site.name.encode()


def _from_the_end(graph: SubGraphT, tensors: Iterable[int]) -> list[int]:
    """Tensors in the order in which they are computed, the last one first."""
    places = {int(o): i for i, op in enumerate(graph.operators) for o in op.outputs}
    return sorted(tensors, key=lambda tensor: places.get(tensor, -1), reverse=True)


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


def _moves_in_file(earlier: int, later: int, producers: Mapping[int, OperatorT]) -> list[OperatorT]:
    """The operators that hand a tensor on as another one, in order."""
    moves = list[OperatorT]()
    while later != earlier:
        moves.insert(0, producers[later])
        later = int(producers[later].inputs[0])
    return moves


def _have_one_order(
    model: ModelT,
    marker: Node,
    between: Sequence[Node],
    tensor: int,
    moves: Sequence[OperatorT],
) -> bool:
    """Whether the moves of the model leave the values of a site where those of the file do.

    Args:
        model: the file.
        marker: of the site.
        between: the moves behind it in the model.
        tensor: its tensor.
        moves: those behind it in the file.
    """
    graph = model.subgraphs[0]
    turns = [op for op in moves if flatbuffer.op_name(model, op) == "TRANSPOSE"]
    if not turns and not any(isinstance(node.layer, keras.layers.Permute) for node in between):
        return True
    batch = flatbuffer.tensor_shape(graph.tensors[int(graph.inputs[0])])[0]
    ours = _order_between(marker, between, batch)
    return bool(np.array_equal(ours, _order_in_file(model, tensor, moves)))


def _order_between(earlier: Node, moves: Sequence[Node], batch: int) -> np.ndarray:
    """Where each value stood at the marker `earlier`, once the model has moved it."""
    shape = (batch, *(int(size or 1) for size in earlier.outputs[0].shape[1:]))
    order: np.ndarray = np.arange(math.prod(shape)).reshape(shape)
    for move in moves:
        if isinstance(move.layer, keras.layers.Permute):
            order = order.transpose(0, *move.layer.dims)
        order = order.reshape(batch, *(int(size or 1) for size in move.outputs[0].shape[1:]))
    return order.reshape(-1)


def _order_in_file(model: ModelT, earlier: int, moves: Sequence[OperatorT]) -> np.ndarray:
    """Where each value stood in the tensor `earlier`, once the file has moved it."""
    tensors = model.subgraphs[0].tensors
    shape = flatbuffer.tensor_shape(tensors[earlier])
    order: np.ndarray = np.arange(math.prod(shape)).reshape(shape)
    for move in moves:
        axes = None
        if flatbuffer.op_name(model, move) == "TRANSPOSE":
            axes = flatbuffer.tensor_data(model, tensors[int(move.inputs[1])])
        order = order if axes is None else order.transpose([int(axis) for axis in axes])
        order = order.reshape(flatbuffer.tensor_shape(tensors[int(move.outputs[0])]))
    return order.reshape(-1)


def _before_moves(
    model: ModelT, tensor: int | None, producers: Mapping[int, OperatorT]
) -> list[int]:
    """A tensor, and what it was before each of the moves that it comes from."""
    found: list[int] = []
    while tensor is not None:
        found.append(tensor)
        tensor = _before_move(model, tensor, producers)
    return found


def _before_move(model: ModelT, tensor: int, producers: Mapping[int, OperatorT]) -> int | None:
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
