"""Names tensors after the sites whose values they hold."""

import math

from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.integer_pass.draft import Draft

_MOVES = ("RESHAPE", "TRANSPOSE")  # the converter may carry markers across these


def name_tensors(draft: Draft) -> None:
    """Names the tensors of subgraph 0 after their sites.

    Where several markers stood on one tensor, the converter had moved them there across RESHAPEs
    and TRANSPOSEs. Walking back over these operators gives each site the tensor of its own shape.
    """
    model, graph = draft.model, draft.graph
    producers = {int(o): op for op in graph.operators for o in op.outputs}
    for index, named in draft.labels.named.items():
        tensor: int | None = index
        for site in reversed(named):
            while tensor is not None and not _holds(model, tensor, site):
                tensor = _before_move(model, tensor, producers)
            if tensor is None:
                break
            graph.tensors[tensor].name = site.name.encode()
            tensor = _before_move(model, tensor, producers)


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
