"""Reads, writes and compacts TFLite flatbuffers; no other module touches their bytes.

A model travels as the schema's object tree, `ModelT`: `model.subgraphs[i].tensors[j]` and so on.
Integer vectors of a tree that was read are read-only views of the file: assign a new list or
array to a field, never write into one.
Schema: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs
"""

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.schema_py_generated import ModelT, OperatorT, SubGraphT, TensorT

from kqat.base import ExportError
from tflite_export.flatbuffer.checks import (
    check_references,
    check_self_contained,
    check_unpacked_size,
    items,
    text,
)
from tflite_export.flatbuffer.shared_tables import SharingBuilder, share_tables

_IDENTIFIER = b"TFL3"
# schema.fbs gives Buffer.data force_align: 16, so that an MCU may read int32 and int64 in place.
_BUFFER_ALIGNMENT = 16
# These metadata list tensors or buffers by position, which `compact` changes.
_POSITIONAL_METADATA = (b"OfflineMemoryAllocation", b"COMPRESSION_METADATA")

_TYPE_NAMES = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
_OP_NAMES = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
# The schema's names of these types, in lower case, are NumPy's.
_NUMPY_TYPES = "FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 BOOL"
_DTYPES = {getattr(schema.TensorType, n): np.dtype(n.lower()) for n in _NUMPY_TYPES.split()}
_PACKED_BITS = {schema.TensorType.INT4: 4, schema.TensorType.UINT4: 4, schema.TensorType.INT2: 2}
_WALKED_VECTORS = "operatorCodes buffers subgraphs tensors operators inputs outputs".split()
_VECTOR_DTYPES = {
    **dict.fromkeys("shape shapeSignature inputs outputs intermediates".split(), "i4"),
    **dict.fromkeys("scale min max".split(), "f4"),
    "zeroPoint": "i8",
}


def read(blob: bytes) -> ModelT:
    """Unpacks a `.tflite` file into its object tree.

    Absent vectors of tensors, operators, buffers and indices come back as empty lists.

    Raises:
        ExportError: if the bytes are no whole TFLite file, an index in it points nowhere, or
            weights lie outside the flatbuffer.
    """
    if isinstance(blob, str | os.PathLike) or blob is None:
        raise ExportError(
            f"Expected the bytes of a .tflite. Received: {blob!r}. Read the file: "
            "pathlib.Path(path).read_bytes()."
        )
    blob = bytes(blob)
    if blob[4:8] != _IDENTIFIER:
        raise ExportError(
            "Expected a TFLite file, with b'TFL3' in bytes 4 to 7. "
            f"Received: {len(blob)} bytes, there {blob[4:8]!r}. Use the bytes of a whole .tflite."
        )
    if len(blob) >= 2**31:
        raise ExportError(
            f"Expected a file below 2 GB. Received: {len(blob):,} bytes, which the offsets of a "
            "flatbuffer cannot reach. Use a smaller model."
        )
    try:
        root = schema.Model.GetRootAs(blob, 0)
        check_unpacked_size(root, len(blob))
        model = ModelT.InitFromObj(root)
        _fill_absent_vectors(model)
        check_self_contained(model)
        check_references(model)
    except ExportError:
        raise
    # Damaged bytes make the generated parser raise nearly any exception.
    except Exception as error:
        raise ExportError(
            "Expected a whole TFLite file. "
            f"Received: {len(blob)} bytes that do not parse ({type(error).__name__}: {error}). "
            "Use the file as its writer made it; it may have been cut short."
        ) from error
    return model


def write(model: ModelT) -> bytes:
    """Packs an object tree into a `.tflite` file.

    The data of every buffer starts at a multiple of 16 bytes from the start of the file
    (schema.fbs, `force_align: 16`). `Buffer.data` may be bytes, a list of byte values or an
    array of any dtype; index, shape and scale vectors may be lists or arrays. `model` is not
    changed.

    Raises:
        ExportError: if an index in the tree points nowhere, or a field has the wrong type.
    """
    check_references(model)
    try:
        packed = _copied(model)
        packed.buffers = [_AlignedBuffer(data=b.data) for b in items(packed.buffers)]
        _set_vector_dtypes(packed)
        share_tables(packed)
        size_bytes = sum(len(_raw_bytes(b.data)) for b in packed.buffers if b.data is not None)
        builder = SharingBuilder(size_bytes + 65536)
        builder.Finish(packed.Pack(builder), _IDENTIFIER)
        return bytes(builder.Output())
    # The packer checks no types; a wrong one makes it raise nearly any exception.
    except Exception as error:
        raise ExportError(
            "Expected an object tree that fits the TFLite schema. "
            f"Received: {type(error).__name__}: {error}. "
            "Use plain ints, lists or 1-D arrays in the fields that were set."
        ) from error


def compact(model: ModelT) -> ModelT:
    """Returns the same network without unused parts, with all indices renumbered.

    Dropped: tensors that no operator, subgraph or signature names; buffers that no tensor or
    metadata names; unused operator codes. Constants with equal bytes share one buffer; buffer 0
    stays empty, and every tensor without data points to it. Subgraphs keep their number.

    Raises:
        ExportError: if metadata lists tensors or buffers by position.
    """
    for metadata in items(model.metadata):
        if metadata.name in _POSITIONAL_METADATA:
            raise ExportError(
                "Expected metadata that outlive a renumbering. "
                f"Received: metadata={metadata.name.decode()!r}, which lists tensors by position. "
                "Use compact before the tool that adds it."
            )
    result = _copied(model)
    signatures = items(result.signatureDefs)
    for index, graph in enumerate(result.subgraphs):
        own = [s for s in signatures if s.subgraphIndex == index]
        _drop_tensors(graph, [m for s in own for m in (*items(s.inputs), *items(s.outputs))])
    _drop_operator_codes(result)
    _merge_buffers(result)
    return result


def op_name(model: ModelT, operator: OperatorT) -> str:
    """Returns the schema's name of an operator, as "CONV_2D"; for a custom one its own name."""
    code = model.operatorCodes[operator.opcodeIndex]
    # Files older than schema 3a have the code in the deprecated field alone.
    builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
    if builtin == schema.BuiltinOperator.CUSTOM and code.customCode is not None:
        return text(code.customCode)
    return _OP_NAMES.get(builtin, f"UNKNOWN_{builtin}")


def tensor_name(tensor: TensorT) -> str:
    """Returns the tensor's name, empty when it has none."""
    return text(tensor.name)


def tensor_shape(tensor: TensorT) -> tuple[int, ...]:
    """Returns the tensor's shape, () for a scalar; a dynamic dimension counts as stored, 1."""
    return tuple(int(size) for size in items(tensor.shape))


def type_name(tensor: TensorT) -> str:
    """Returns the schema's name of the tensor's type in lower case, as "int8" or "int4"."""
    return _TYPE_NAMES.get(tensor.type, f"type {tensor.type}").lower()


def is_numeric(tensor: TensorT) -> bool:
    """Returns whether NumPy can hold the tensor: no string, resource, bfloat16, …"""
    return tensor.type in _DTYPES or tensor.type in _PACKED_BITS


def tensor_dtype(tensor: TensorT) -> np.dtype:
    """Returns the dtype in which NumPy holds the tensor; uint8 for packed 4- and 2-bit types.

    Raises:
        ExportError: if the tensor is not numeric.
    """
    if not is_numeric(tensor):
        raise ExportError(
            "Expected a tensor of numbers that NumPy can hold. "
            f"Received: type={_TYPE_NAMES.get(tensor.type, tensor.type)} for tensor "
            f"{tensor_name(tensor)!r}. Use a model without such tensors."
        )
    return _DTYPES.get(tensor.type, np.dtype(np.uint8))


def tensor_data(model: ModelT, tensor: TensorT) -> np.ndarray | None:
    """Returns a constant's values, or None for a tensor that is computed.

    Shape and dtype are the tensor's own, save for packed types: these come as the packed bytes,
    shape (ceil(elements · bits / 8),), dtype uint8. The array may be a read-only view.

    Raises:
        ExportError: if the buffer's size is not the one that shape and type ask for, or the
            tensor is sparse.
    """
    data = model.buffers[tensor.buffer].data
    if tensor.buffer == 0 or data is None:
        return None
    raw = _raw_bytes(data)
    shape = tensor_shape(tensor)
    dtype = tensor_dtype(tensor)
    bits = _PACKED_BITS.get(tensor.type, 8 * dtype.itemsize)
    expected_bytes = (math.prod(shape) * bits + 7) // 8
    if raw.size == 0 and expected_bytes > 0:
        return None
    if tensor.sparsity is not None or raw.size != expected_bytes:
        raise ExportError(
            f"Expected {expected_bytes} bytes, dense, for tensor {tensor_name(tensor)!r} of shape "
            f"{shape} and type {_TYPE_NAMES[tensor.type]}. Received: {raw.size} bytes, "
            f"sparse={tensor.sparsity is not None}. Use a dense model with whole buffers."
        )
    values = raw.view(dtype)
    return values if tensor.type in _PACKED_BITS else values.reshape(shape)


class _AlignedBuffer(schema.BufferT):
    """A buffer that packs its data at the schema's alignment, which the Python packer ignores."""

    def Pack(self, builder: flatbuffers.Builder) -> int:
        vector = None
        if self.data is not None:
            data = _raw_bytes(self.data).tobytes()
            builder.Prep(_BUFFER_ALIGNMENT, len(data))
            vector = builder.CreateByteVector(data)
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


def _raw_bytes(data: bytes | Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns buffer data, whatever its container, as a flat uint8 array."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(bytes(data), np.uint8)


def _copied(model: ModelT) -> ModelT:
    """Returns a deep copy of the tree that shares what is never written into: bytes and arrays."""
    made: dict[int, Any] = {}  # as `copy.deepcopy`, which takes five times as long

    def copied(value: Any) -> Any:
        if type(value) is list:
            return [copied(part) for part in value]
        if not type(value).__module__.endswith("schema_py_generated") and not isinstance(
            value, schema.BufferT
        ):
            return value
        if id(value) not in made:
            made[id(value)] = new = object.__new__(type(value))
            vars(new).update({field: copied(part) for field, part in vars(value).items()})
        return made[id(value)]

    copy: ModelT = copied(model)
    return copy


def _fill_absent_vectors(table: ModelT | SubGraphT | OperatorT) -> None:
    for field in _WALKED_VECTORS:
        if getattr(table, field, ()) is None:
            setattr(table, field, [])
    for child in (*getattr(table, "subgraphs", ()), *getattr(table, "operators", ())):
        _fill_absent_vectors(child)


def _set_vector_dtypes(model: ModelT) -> None:
    """Gives vectors the schema's dtype: the packer would write an int64 array as it stands."""
    tables = list(model.subgraphs)
    for graph in model.subgraphs:
        tables += [*items(graph.operators), *items(graph.tensors)]
        tables += [t.quantization for t in items(graph.tensors) if t.quantization is not None]
    for table, (field, dtype) in itertools.product(tables, _VECTOR_DTYPES.items()):
        value = getattr(table, field, None)
        if value is not None:
            setattr(table, field, np.asarray(value, dtype=dtype))


def _drop_tensors(graph: SubGraphT, signature_maps: Sequence[schema.TensorMapT]) -> None:
    """Drops unused tensors, in place, and renumbers whatever refers to a tensor."""
    named = {*items(graph.inputs), *items(graph.outputs)}
    named |= {m.tensorIndex for m in signature_maps}
    fields = ("inputs", "outputs", "intermediates")
    for operator in items(graph.operators):
        named.update(*(items(getattr(operator, field)) for field in fields))
    kept = [index for index in range(len(items(graph.tensors))) if index in named]
    new = {old: position for position, old in enumerate(kept)} | {-1: -1}
    graph.tensors = [graph.tensors[index] for index in kept]
    for table in (graph, *items(graph.operators)):
        for field in fields:
            indices = getattr(table, field, None)
            if indices is not None:
                setattr(table, field, [new[index] for index in items(indices)])
    for tensor_map in signature_maps:
        tensor_map.tensorIndex = new[tensor_map.tensorIndex]


def _drop_operator_codes(model: ModelT) -> None:
    operators = [o for graph in model.subgraphs for o in items(graph.operators)]
    kept = sorted({o.opcodeIndex for o in operators})
    model.operatorCodes = [model.operatorCodes[index] for index in kept]
    for operator in operators:
        operator.opcodeIndex = kept.index(operator.opcodeIndex)


def _merge_buffers(model: ModelT) -> None:
    """Rebuilds the list of buffers, in place: the empty one, the constants, the metadata."""
    old, new = model.buffers, [schema.BufferT()]
    positions: dict[bytes, int] = {}
    for tensor in (t for graph in model.subgraphs for t in items(graph.tensors)):
        data = None if tensor.buffer == 0 else old[tensor.buffer].data
        if data is None:
            tensor.buffer = 0
            continue
        # An empty vector is kept apart from no vector: the first makes an empty constant.
        key = _raw_bytes(data).tobytes()
        if key not in positions:
            positions[key] = len(new)
            new.append(schema.BufferT(data=data))
        tensor.buffer = positions[key]
    # A metadata buffer is never shared with a constant: a tool may rewrite it.
    moved: dict[int, int] = {}
    named = [metadata.buffer for metadata in items(model.metadata)]
    for index in (*named, *items(model.metadataBuffer)):
        if index not in moved:
            moved[index] = len(new)
            new.append(schema.BufferT(data=old[index].data))
    for metadata in items(model.metadata):
        metadata.buffer = moved[metadata.buffer]
    if model.metadataBuffer is not None:
        model.metadataBuffer = [moved[index] for index in items(model.metadataBuffer)]
    model.buffers = new
