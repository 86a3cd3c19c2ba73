"""Reads, writes and tidies TFLite flatbuffers; no other room touches their bytes.

A model travels as the schema's object tree, `ModelT`: `model.subgraphs[i].tensors[j]` and so on.
Integer vectors of a tree that was read are read-only views of the file: assign a new list or
array to a field, never write into one.
Schema: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.schema_py_generated import ModelT, OperatorT, SubGraphT, TensorT

from kqat.errors import ExportError
from tflite_export.sharing import share_vectors

_IDENTIFIER = b"TFL3"
# schema.fbs gives Buffer.data force_align: 16, so that an MCU may read int32 and int64 in place.
_BUFFER_ALIGNMENT = 16
# A table takes 8 bytes at least: its offset in a vector and the offset of its vtable.
_TABLE_BYTES = 8
# Writers may share strings and tables a little; a file that shares more is an unpacking bomb.
_UNPACKED_BYTES_PER_FILE_BYTE = 16
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
    blob = bytes(blob)
    if blob[4:8] != _IDENTIFIER:
        raise ExportError(
            "Expected a TFLite file, with b'TFL3' in bytes 4 to 7. "
            f"Received: {len(blob)} bytes, there {blob[4:8]!r}. Use the bytes of a whole .tflite."
        )
    try:
        root = schema.Model.GetRootAs(blob, 0)
        _check_unpacked_size(root, len(blob))
        model = ModelT.InitFromObj(root)
        _fill_absent_vectors(model)
        _check_self_contained(model)
        _check_references(model)
    except ExportError:
        raise
    # Hostile bytes make the generated parser raise nearly anything, from struct.error on.
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
    _check_references(model)
    try:
        packed = _copied(model)
        packed.buffers = [_AlignedBuffer(data=b.data) for b in _items(packed.buffers)]
        _set_vector_dtypes(packed)
        share_vectors(packed)
        size_bytes = sum(len(_raw_bytes(b.data)) for b in packed.buffers if b.data is not None)
        builder = flatbuffers.Builder(size_bytes + 65536)
        builder.Finish(packed.Pack(builder), _IDENTIFIER)
        return bytes(builder.Output())
    # The packer checks no types: a wrong one surfaces as whatever its arithmetic raises.
    except Exception as error:
        raise ExportError(
            "Expected an object tree that fits the TFLite schema. "
            f"Received: {type(error).__name__}: {error}. "
            "Use plain ints, lists or 1-D arrays in the fields that were set."
        ) from error


def compact(model: ModelT) -> ModelT:
    """Returns the same network without what nothing refers to, with all indices renumbered.

    Dropped: tensors that no operator, subgraph or signature names; buffers that no tensor or
    metadata names; unused operator codes. Constants with equal bytes share one buffer; buffer 0
    stays empty, and every tensor without data points to it. Subgraphs keep their number.

    Raises:
        ExportError: if metadata lists tensors or buffers by position.
    """
    for metadata in _items(model.metadata):
        if metadata.name in _POSITIONAL_METADATA:
            raise ExportError(
                "Expected metadata that outlive a renumbering. "
                f"Received: metadata={metadata.name.decode()!r}, which lists tensors by position. "
                "Use compact before the tool that adds it."
            )
    result = _copied(model)
    signatures = _items(result.signatureDefs)
    for index, graph in enumerate(result.subgraphs):
        own = [s for s in signatures if s.subgraphIndex == index]
        _drop_tensors(graph, [m for s in own for m in (*_items(s.inputs), *_items(s.outputs))])
    _drop_operator_codes(result)
    _merge_buffers(result)
    return result


def op_name(model: ModelT, operator: OperatorT) -> str:
    """Returns the schema's name of an operator, as "CONV_2D"; for a custom one its own name."""
    code = model.operatorCodes[operator.opcodeIndex]
    # Files older than schema 3a have the code in the deprecated field alone.
    builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
    if builtin == schema.BuiltinOperator.CUSTOM and code.customCode is not None:
        return _text(code.customCode)
    return _OP_NAMES.get(builtin, f"UNKNOWN_{builtin}")


def tensor_name(tensor: TensorT) -> str:
    """Returns the tensor's name, empty when it has none."""
    return _text(tensor.name)


def tensor_shape(tensor: TensorT) -> tuple[int, ...]:
    """Returns the tensor's shape, () for a scalar; a dynamic dimension counts as stored, 1."""
    return tuple(int(size) for size in _items(tensor.shape))


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
    """A buffer that packs its data at the alignment which the Python packer leaves out."""

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


def _items(vector: Sequence | np.ndarray | None) -> Sequence:
    """Returns a vector's items as a plain sequence, () for an absent vector."""
    if vector is None:
        return ()
    return vector.tolist() if isinstance(vector, np.ndarray) else vector


def _text(name: bytes | str | None) -> str:
    if name is None:
        return ""
    return name if isinstance(name, str) else name.decode(errors="replace")


def _raw_bytes(data: bytes | Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns buffer data, whatever its container, as a flat uint8 array."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(bytes(data), np.uint8)


def _copied(model: ModelT) -> ModelT:
    """Returns a deep copy of the tree that shares the buffers' data."""
    shared = {id(b.data): b.data for b in _items(model.buffers)}
    return copy.deepcopy(model, shared)


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


def _check_unpacked_size(root: schema.Model, file_bytes: int) -> None:
    left = _UNPACKED_BYTES_PER_FILE_BYTE * file_bytes
    for cost in _unpacking_costs(root):
        left -= cost
        if left < 0:
            raise ExportError(
                "Expected a TFLite file whose tables are written once each. "
                f"Received: {file_bytes} bytes that unpack to more than "
                f"{_UNPACKED_BYTES_PER_FILE_BYTE} times as much. Use a file from a trusted writer."
            )


def _fill_absent_vectors(table: ModelT | SubGraphT | OperatorT) -> None:
    for field in _WALKED_VECTORS:
        if getattr(table, field, ()) is None:
            setattr(table, field, [])
    for child in (*getattr(table, "subgraphs", ()), *getattr(table, "operators", ())):
        _fill_absent_vectors(child)


def _check_self_contained(model: ModelT) -> None:
    operators = (o for graph in model.subgraphs for o in graph.operators)
    # schema.fbs: an offset from 2 on points behind the flatbuffer, as in files above 2 GB.
    outside = [b for b in model.buffers if b.offset > 1]
    if outside or _items(model.externalBuffers) or any(o.largeCustomOptionsSize for o in operators):
        raise ExportError(
            "Expected a TFLite file that holds its weights and options in its flatbuffer. "
            "Received: some of them behind it or in another file. Use a file below 2 GB."
        )


def _check_references(model: ModelT) -> None:
    """Refuses a tree in which an index points to nothing."""
    if not _items(model.subgraphs):
        raise ExportError("Expected at least one subgraph. Received: none. Use a converted model.")
    buffers, codes = len(_items(model.buffers)), len(_items(model.operatorCodes))
    for g, graph in enumerate(model.subgraphs):
        tensors, where = len(_items(graph.tensors)), f"subgraph {g}"
        _check_range(graph.inputs, tensors, f"inputs of {where}")
        _check_range(graph.outputs, tensors, f"outputs of {where}")
        for t, tensor in enumerate(_items(graph.tensors)):
            _check_range([tensor.buffer], buffers, f"buffer of tensor {t}, {where}")
            _check_range(tensor.shape, math.inf, f"shape of tensor {t}, {where}")
        for o, operator in enumerate(_items(graph.operators)):
            _check_range([operator.opcodeIndex], codes, f"code of operator {o}, {where}")
            # -1 stands for an optional tensor that is left out.
            for field in ("inputs", "outputs", "intermediates"):
                indices = getattr(operator, field)
                _check_range(indices, tensors, f"{field} of operator {o}, {where}", lowest=-1)
    for metadata in _items(model.metadata):
        _check_range([metadata.buffer], buffers, f"buffer of metadata {metadata.name!r}")
    _check_range(model.metadataBuffer, buffers, "metadata buffers")
    for signature in _items(model.signatureDefs):
        where = f"signature {_text(signature.signatureKey)!r}"
        _check_range([signature.subgraphIndex], len(model.subgraphs), f"subgraph of {where}")
        tensors = len(_items(model.subgraphs[signature.subgraphIndex].tensors))
        maps = (*_items(signature.inputs), *_items(signature.outputs))
        _check_range([m.tensorIndex for m in maps], tensors, f"tensors of {where}")


def _check_range(
    indices: Sequence[int] | np.ndarray | None, end: float, where: str, *, lowest: int = 0
) -> None:
    for index in _items(indices):
        if not lowest <= index < end:
            raise ExportError(
                f"Expected {lowest} to {end} (exclusive) in the {where}. "
                f"Received: {index}. Use a file that its writer has finished."
            )


def _set_vector_dtypes(model: ModelT) -> None:
    """Gives vectors the schema's dtype: the packer would write an int64 array as it stands."""
    tables = list(model.subgraphs)
    for graph in model.subgraphs:
        tables += [*_items(graph.operators), *_items(graph.tensors)]
        tables += [t.quantization for t in _items(graph.tensors) if t.quantization is not None]
    for table, (field, dtype) in itertools.product(tables, _VECTOR_DTYPES.items()):
        value = getattr(table, field, None)
        if value is not None:
            setattr(table, field, np.asarray(value, dtype=dtype))


def _drop_tensors(graph: SubGraphT, signature_maps: Sequence[schema.TensorMapT]) -> None:
    """Drops the tensors that nothing names, in place, and renumbers those that name one."""
    named = {*_items(graph.inputs), *_items(graph.outputs)}
    named |= {m.tensorIndex for m in signature_maps}
    fields = ("inputs", "outputs", "intermediates")
    for operator in _items(graph.operators):
        named.update(*(_items(getattr(operator, field)) for field in fields))
    kept = [index for index in range(len(_items(graph.tensors))) if index in named]
    new = {old: position for position, old in enumerate(kept)} | {-1: -1}
    graph.tensors = [graph.tensors[index] for index in kept]
    for table in (graph, *_items(graph.operators)):
        for field in fields:
            indices = getattr(table, field, None)
            if indices is not None:
                setattr(table, field, [new[index] for index in _items(indices)])
    for tensor_map in signature_maps:
        tensor_map.tensorIndex = new[tensor_map.tensorIndex]


def _drop_operator_codes(model: ModelT) -> None:
    operators = [o for graph in model.subgraphs for o in _items(graph.operators)]
    kept = sorted({o.opcodeIndex for o in operators})
    model.operatorCodes = [model.operatorCodes[index] for index in kept]
    for operator in operators:
        operator.opcodeIndex = kept.index(operator.opcodeIndex)


def _merge_buffers(model: ModelT) -> None:
    """Rebuilds the list of buffers, in place: the empty one, the constants, the metadata."""
    old, new = model.buffers, [schema.BufferT()]
    positions: dict[bytes, int] = {}
    for tensor in (t for graph in model.subgraphs for t in _items(graph.tensors)):
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
    # A metadata buffer stays its own: a tool may rewrite it without thinking of constants.
    moved: dict[int, int] = {}
    named = [metadata.buffer for metadata in _items(model.metadata)]
    for index in (*named, *_items(model.metadataBuffer)):
        if index not in moved:
            moved[index] = len(new)
            new.append(schema.BufferT(data=old[index].data))
    for metadata in _items(model.metadata):
        metadata.buffer = moved[metadata.buffer]
    if model.metadataBuffer is not None:
        model.metadataBuffer = [moved[index] for index in _items(model.metadataBuffer)]
    model.buffers = new
