"""Checks of a file and of an object tree, before any other code walks them.

A flatbuffer's parser follows whatever offsets and indices it finds, so damaged and hostile files
are refused here.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.schema_py_generated import ModelT

from kqat.base import ExportError

# A table takes at least 8 bytes: its offset in a vector and the offset of its vtable.
_TABLE_BYTES = 8
# Writers may share strings and tables. A file that shares many times more than that is made to
# exhaust memory when it is unpacked.
_UNPACKED_BYTES_PER_FILE_BYTE = 16


def items(vector: Sequence | np.ndarray | None) -> Sequence:
    """Returns a vector's items as a plain sequence, () for an absent vector."""
    if vector is None:
        return ()
    return vector.tolist() if isinstance(vector, np.ndarray) else vector


def text(name: bytes | str | None) -> str:
    """Returns a string of the schema as text, empty where it is absent."""
    if name is None:
        return ""
    return name if isinstance(name, str) else name.decode(errors="replace")


def _unpacking_costs(root: schema.Model) -> Iterator[int]:
    """Yields roughly how many file bytes each part would need if no table were shared."""
    yield _TABLE_BYTES * (root.BuffersLength() + root.MetadataLength() + root.SubgraphsLength())
    for i in range(root.OperatorCodesLength()):
        yield _TABLE_BYTES + len(root.OperatorCodes(i).CustomCode() or b"")
    for i in range(root.SubgraphsLength()):
        graph = root.Subgraphs(i)
        yield _TABLE_BYTES * (graph.TensorsLength() + graph.OperatorsLength())
        for j in range(graph.TensorsLength()):
            tensor = graph.Tensors(j)
            yield len(tensor.Name() or b"") + _TABLE_BYTES * tensor.VariantTensorsLength()
    for i in range(root.SignatureDefsLength()):
        signature = root.SignatureDefs(i)
        yield _TABLE_BYTES * (signature.InputsLength() + signature.OutputsLength())


def check_unpacked_size(root: schema.Model, file_bytes: int) -> None:
    """Refuses a file that unpacks to many times its size."""
    left = _UNPACKED_BYTES_PER_FILE_BYTE * file_bytes
    for cost in _unpacking_costs(root):
        left -= cost
        if left < 0:
            raise ExportError(
                "Expected a TFLite file whose tables are written once each. "
                f"Received: {file_bytes} bytes that unpack to more than "
                f"{_UNPACKED_BYTES_PER_FILE_BYTE} times as much. Use a file from a trusted writer."
            )


def check_self_contained(model: ModelT) -> None:
    """Refuses a file whose weights or options lie outside the flatbuffer."""
    operators = (o for graph in model.subgraphs for o in graph.operators)
    # schema.fbs: an offset from 2 on points behind the flatbuffer, as in files above 2 GB.
    outside = [b for b in model.buffers if b.offset > 1]
    if outside or items(model.externalBuffers) or any(o.largeCustomOptionsSize for o in operators):
        raise ExportError(
            "Expected a TFLite file that holds its weights and options in its flatbuffer. "
            "Received: some of them behind it or in another file. Use a file below 2 GB."
        )


def check_references(model: ModelT) -> None:
    """Refuses a tree in which an index points to nothing."""
    if not items(model.subgraphs):
        raise ExportError("Expected at least one subgraph. Received: none. Use a converted model.")
    buffers, codes = len(items(model.buffers)), len(items(model.operatorCodes))
    for g, graph in enumerate(model.subgraphs):
        tensors, where = len(items(graph.tensors)), f"subgraph {g}"
        _check_range(graph.inputs, tensors, f"inputs of {where}")
        _check_range(graph.outputs, tensors, f"outputs of {where}")
        for t, tensor in enumerate(items(graph.tensors)):
            _check_range([tensor.buffer], buffers, f"buffer of tensor {t}, {where}")
            _check_range(tensor.shape, math.inf, f"shape of tensor {t}, {where}")
        for o, operator in enumerate(items(graph.operators)):
            _check_range([operator.opcodeIndex], codes, f"code of operator {o}, {where}")
            # -1 stands for an optional tensor that is left out.
            for field in ("inputs", "outputs", "intermediates"):
                indices = getattr(operator, field)
                _check_range(indices, tensors, f"{field} of operator {o}, {where}", lowest=-1)
    for metadata in items(model.metadata):
        _check_range([metadata.buffer], buffers, f"buffer of metadata {metadata.name!r}")
    _check_range(model.metadataBuffer, buffers, "metadata buffers")
    for signature in items(model.signatureDefs):
        where = f"signature {text(signature.signatureKey)!r}"
        _check_range([signature.subgraphIndex], len(model.subgraphs), f"subgraph of {where}")
        tensors = len(items(model.subgraphs[signature.subgraphIndex].tensors))
        maps = (*items(signature.inputs), *items(signature.outputs))
        _check_range([m.tensorIndex for m in maps], tensors, f"tensors of {where}")


def _check_range(
    indices: Sequence[int] | np.ndarray | None, end: float, where: str, *, lowest: int = 0
) -> None:
    for index in items(indices):
        if not lowest <= index < end:
            raise ExportError(
                f"Expected {lowest} to {end} (exclusive) in the {where}. "
                f"Received: {index}. Use a file that its writer has finished."
            )
