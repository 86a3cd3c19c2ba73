"""The flatbuffer room: hostile bytes, aligned buffers, and trees that survive tidying."""

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st

from kqat.base.errors import ExportError
from tflite_export import flatbuffer

_FINISHED = (
    "tflm/hello_world_int8.tflite",
    "tflm/trained_lstm_int8.tflite",
    "mlperf_tiny/ic/pretrainedResnet_quant.tflite",
    "mltk_tinyml/keyword_spotting.tflite",
)
_WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)


def _tensor(
    name: str, shape: Sequence[int], buffer: int = 0, kind: int = schema.TensorType.FLOAT32
) -> flatbuffer.TensorT:
    return schema.TensorT(name=name, shape=shape, type=kind, buffer=buffer)


def _dense(inputs: list[int], outputs: list[int]) -> flatbuffer.OperatorT:
    operator = schema.OperatorT(opcodeIndex=1, inputs=inputs, outputs=outputs)
    operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    operator.builtinOptions = schema.FullyConnectedOptionsT()
    return operator


def _graph(first_weights: int, second_weights: int, bias: int) -> flatbuffer.SubGraphT:
    """x → FULLY_CONNECTED → FULLY_CONNECTED → y, with a dead tensor before and after each."""
    tensors = [
        _tensor("dead_first", [7], buffer=8),
        _tensor("x", [1, 4]),
        _tensor("w1", [4, 4], buffer=first_weights),
        _tensor("dead_middle", [1]),
        _tensor("h", [1, 4], buffer=5),
        _tensor("w2", [4, 4], buffer=second_weights),
        _tensor("b", [4], buffer=bias),
        _tensor("y", [1, 4]),
        _tensor("dead_last", [2]),
    ]
    operators = [_dense([1, 2, -1], [4]), _dense([4, 5, 6], [7])]
    return schema.SubGraphT(tensors=tensors, inputs=[1], outputs=[7], operators=operators)


def _signature(key: str, subgraph: int) -> schema.SignatureDefT:
    return schema.SignatureDefT(
        signatureKey=key,
        subgraphIndex=subgraph,
        inputs=[schema.TensorMapT(name="in", tensorIndex=1)],
        outputs=[schema.TensorMapT(name="out", tensorIndex=7)],
    )


def _tree() -> flatbuffer.ModelT:
    """Two subgraphs that share buffers, with everything in it that `compact` has to remove."""
    weights = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    others = weights.T.copy()
    bias = np.array([1, -2, 3, -4], np.float32)
    data = [None, weights, others, bias, weights.copy(), None, b"1.5.0", b"unused", bytes(28)]
    code = schema.BuiltinOperator
    codes = [code.ADD, code.FULLY_CONNECTED, code.MUL]
    return schema.ModelT(
        version=3,
        operatorCodes=[schema.OperatorCodeT(deprecatedBuiltinCode=c, builtinCode=c) for c in codes],
        subgraphs=[_graph(1, 4, 3), _graph(2, 1, 3)],
        buffers=[schema.BufferT(data=d) for d in data],
        metadata=[schema.MetadataT(name="min_runtime_version", buffer=6)],
        signatureDefs=[_signature("first", 0), _signature("second", 1)],
    )


def _outputs(blob: bytes, signature: str | None = None) -> list[np.ndarray]:
    interpreter = litert.Interpreter(
        model_content=blob, experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF
    )
    rng = np.random.default_rng(1)
    if signature is not None:
        x = rng.normal(size=(1, 4)).astype(np.float32)
        return [interpreter.get_signature_runner(signature)(**{"in": x})["out"]]
    interpreter.allocate_tensors()
    for details in interpreter.get_input_details():
        x = rng.integers(-100, 100, details["shape"]).astype(details["dtype"])
        interpreter.set_tensor(details["index"], x)
    interpreter.invoke()
    return [interpreter.get_tensor(out["index"]) for out in interpreter.get_output_details()]


def _plain(value: Any) -> Any:
    """Any part of a tree as nested lists and dicts, names as bytes."""
    if hasattr(value, "__dict__"):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, np.ndarray | list):
        return [_plain(item) for item in value]
    return value.encode() if isinstance(value, str) else value


def _data_offsets(blob: bytes) -> list[int]:
    start = np.frombuffer(blob, np.uint8).__array_interface__["data"][0]
    data = [buffer.data for buffer in flatbuffer.read(blob).buffers]
    return [d.__array_interface__["data"][0] - start for d in data if d is not None and len(d)]


@pytest.fixture(scope="module")
def small() -> bytes:
    return flatbuffer.write(_tree())


@pytest.fixture(params=_FINISHED)
def finished(request: pytest.FixtureRequest, shared: Path) -> bytes:
    return (shared / "models" / request.param).read_bytes()


def test_write_then_read_gives_the_tree_back(small: bytes) -> None:
    tree, again = _tree(), flatbuffer.read(small)
    for buffer in tree.buffers:
        if buffer.data is not None:
            buffer.data = np.frombuffer(bytes(buffer.data), np.uint8)
    assert _plain(again) == _plain(tree)


def test_absent_vectors_come_back_empty() -> None:
    tree = schema.ModelT(subgraphs=[schema.SubGraphT()])
    model = flatbuffer.read(flatbuffer.write(tree))
    graph = model.subgraphs[0]
    assert [graph.tensors, graph.operators, graph.inputs, model.buffers] == [[], [], [], []]


def test_write_leaves_its_argument_alone() -> None:
    tree = _tree()
    shape = tree.subgraphs[0].tensors[1].shape = np.array([1, 4])
    kept = copy.deepcopy(tree)
    flatbuffer.write(tree)
    flatbuffer.compact(tree)
    assert _plain(tree) == _plain(kept)
    assert tree.subgraphs[0].tensors[1].shape is shape


def test_rewritten_finished_files_compute_the_same(finished: bytes) -> None:
    tree = flatbuffer.read(finished)
    again = flatbuffer.write(tree)
    assert _plain(flatbuffer.read(again)) == _plain(tree)
    np.testing.assert_equal(_outputs(again), _outputs(finished))


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 70), max_size=12),
    name=st.text(max_size=20),
    dtype=st.sampled_from(["i1", "<i4", "<i8", "<f4"]),
)
def test_every_buffer_starts_at_a_multiple_of_16_bytes(
    sizes: list[int], name: str, dtype: str
) -> None:
    tree = _tree()
    tree.description = name
    tree.buffers += [schema.BufferT(data=np.arange(size).astype(dtype)) for size in sizes]
    blob = flatbuffer.write(tree)
    assert [offset % 16 for offset in _data_offsets(blob)] == [0] * (7 + sum(s > 0 for s in sizes))
    read = [b.data.view(dtype).tolist() for b in flatbuffer.read(blob).buffers[9:]]
    assert read == [list(range(size)) for size in sizes]


def test_finished_files_come_out_aligned(finished: bytes) -> None:
    offsets = _data_offsets(flatbuffer.write(flatbuffer.read(finished)))
    assert offsets
    assert not any(offset % 16 for offset in offsets)


def test_int64_arrays_and_lists_are_written_as_the_schema_asks() -> None:
    tree = _tree()
    tree.subgraphs[0].tensors[1].shape = np.array([1, 4])
    tree.subgraphs[0].operators[0].inputs = np.array([1, 2, -1])
    tree.subgraphs[0].tensors[1].quantization = schema.QuantizationParametersT(
        scale=np.array([0.5]), zeroPoint=np.array([3], np.int32)
    )
    graph = flatbuffer.read(flatbuffer.write(tree)).subgraphs[0]
    assert graph.tensors[1].shape.tolist() == [1, 4]
    assert graph.operators[0].inputs.tolist() == [1, 2, -1]
    assert graph.tensors[1].quantization.scale.tolist() == [0.5]
    assert graph.tensors[1].quantization.zeroPoint.tolist() == [3]


@pytest.mark.parametrize("blob", [b"", b"TFL3", b"\x1c\0\0\0TFL2" + bytes(64), b"PK\3\4" * 99])
def test_other_files_are_refused(blob: bytes) -> None:
    with pytest.raises(ExportError, match=r"b'TFL3' in bytes 4 to 7.*Received: \d+ bytes"):
        flatbuffer.read(blob)


def test_every_truncation_is_refused(small: bytes) -> None:
    for size in range(8, len(small)):
        with pytest.raises(ExportError, match="Expected"):
            flatbuffer.read(small[:size])


def test_truncated_finished_files_are_refused(finished: bytes) -> None:
    cuts = random.Random(0).sample(range(8, len(finished)), 100)
    for size in (*cuts, *range(len(finished) - 20, len(finished))):
        with pytest.raises(ExportError, match="Expected a whole TFLite file"):
            flatbuffer.read(finished[:size])


@settings(max_examples=300)
@given(edits=st.dictionaries(st.integers(8, 5000), st.integers(0, 255), min_size=1, max_size=8))
def test_flipped_bytes_parse_or_are_refused(small: bytes, edits: dict[int, int]) -> None:
    blob = bytearray(small)
    for position, value in edits.items():
        blob[8 + position % (len(small) - 8)] = value
    try:
        model = flatbuffer.read(bytes(blob))
    except ExportError:
        return
    assert isinstance(model, flatbuffer.ModelT)


def test_tables_shared_a_thousandfold_are_refused() -> None:
    builder = flatbuffers.Builder(1024)
    one = schema.TensorT(name="t", shape=[1]).Pack(builder)
    schema.SubGraphStartTensorsVector(builder, 1000)
    for _ in range(1000):
        builder.PrependUOffsetTRelative(one)
    tensors = builder.EndVector()
    schema.SubGraphStart(builder)
    schema.SubGraphAddTensors(builder, tensors)
    graph = schema.SubGraphEnd(builder)
    schema.ModelStartSubgraphsVector(builder, 1000)
    for _ in range(1000):
        builder.PrependUOffsetTRelative(graph)
    graphs = builder.EndVector()
    schema.ModelStart(builder)
    schema.ModelAddSubgraphs(builder, graphs)
    builder.Finish(schema.ModelEnd(builder), b"TFL3")
    with pytest.raises(ExportError, match="written once each"):
        flatbuffer.read(bytes(builder.Output()))


def test_weights_outside_the_flatbuffer_are_refused() -> None:
    tree = _tree()
    tree.buffers = [schema.BufferT() for _ in tree.buffers]
    tree.buffers[1].offset, tree.buffers[1].size = 4096, 64
    builder = flatbuffers.Builder(1024)
    builder.Finish(tree.Pack(builder), b"TFL3")
    with pytest.raises(ExportError, match="weights and options in its flatbuffer"):
        flatbuffer.read(bytes(builder.Output()))


@pytest.mark.parametrize(
    ("path", "field", "value", "match"),
    [
        ("subgraphs.1", "outputs", [9], "outputs of subgraph 1.*Received: 9"),
        ("subgraphs.0.tensors.2", "buffer", 9, "buffer of tensor 2, subgraph 0.*Received: 9"),
        ("subgraphs.0.tensors.1", "shape", [-1, 4], "shape of tensor 1.*Received: -1"),
        ("subgraphs.0.operators.1", "opcodeIndex", 3, "code of operator 1.*Received: 3"),
        ("subgraphs.0.operators.0", "inputs", [1, -2], "inputs of operator 0.*Received: -2"),
        ("metadata.0", "buffer", 9, "metadata 'min_runtime_version'.*Received: 9"),
        ("signatureDefs.1", "subgraphIndex", 2, "signature 'second'.*Received: 2"),
        ("signatureDefs.0.inputs.0", "tensorIndex", 9, "signature 'first'.*Received: 9"),
        ("", "subgraphs", [], "at least one subgraph"),
        ("subgraphs.0.tensors.1", "name", 5, "fits the TFLite schema"),
    ],
)
def test_indices_that_point_nowhere_are_refused(
    path: str, field: str, value: Any, match: str
) -> None:
    tree = _tree()
    table = tree
    for step in path.split(".") if path else ():
        table = table[int(step)] if step.isdigit() else getattr(table, step)
    setattr(table, field, value)
    with pytest.raises(ExportError, match=match):
        flatbuffer.write(tree)


def test_compact_keeps_what_is_named() -> None:
    model = flatbuffer.compact(_tree())
    for graph in model.subgraphs:
        assert [flatbuffer.tensor_name(t) for t in graph.tensors] == "x w1 h w2 b y".split()
        assert (graph.inputs, graph.outputs) == ([0], [5])
        assert [o.inputs for o in graph.operators] == [[0, 1, -1], [2, 3, 4]]
        assert [o.outputs for o in graph.operators] == [[2], [5]]
    buffers = [[t.buffer for t in graph.tensors] for graph in model.subgraphs]
    assert buffers == [[0, 1, 0, 1, 2, 0], [0, 3, 0, 1, 2, 0]]
    assert [b.data is None for b in model.buffers] == [True, False, False, False, False]
    assert (model.metadata[0].buffer, model.buffers[4].data) == (4, b"1.5.0")
    assert [flatbuffer.op_name(model, o) for o in graph.operators] == ["FULLY_CONNECTED"] * 2
    assert len(model.operatorCodes) == 1
    maps = [(s.inputs[0].tensorIndex, s.outputs[0].tensorIndex) for s in model.signatureDefs]
    assert maps == [(0, 5), (0, 5)]


@pytest.mark.parametrize("signature", ["first", "second"])
def test_compact_changes_no_value_of_any_subgraph(small: bytes, signature: str) -> None:
    compacted = flatbuffer.write(flatbuffer.compact(_tree()))
    np.testing.assert_equal(_outputs(compacted, signature), _outputs(small, signature))
    assert len(compacted) < len(small)


def test_compact_changes_no_value_of_finished_files(finished: bytes) -> None:
    model = flatbuffer.compact(flatbuffer.read(finished))
    blob = flatbuffer.write(model)
    np.testing.assert_equal(_outputs(blob), _outputs(finished))
    assert _plain(flatbuffer.compact(flatbuffer.read(blob))) == _plain(flatbuffer.read(blob))


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_compact_undoes_any_shuffling_of_buffers_and_codes(seed: int) -> None:
    tree, rng = _tree(), random.Random(seed)
    order = [0, *rng.sample(range(1, 9), 8)]
    tree.buffers = [tree.buffers[old] for old in order]
    for tensor in (t for graph in tree.subgraphs for t in graph.tensors):
        tensor.buffer = order.index(tensor.buffer)
    tree.metadata[0].buffer = order.index(6)
    unused = [schema.OperatorCodeT(builtinCode=rng.randrange(100)) for _ in range(rng.randrange(4))]
    tree.operatorCodes = [*unused, *tree.operatorCodes]
    for operator in (o for graph in tree.subgraphs for o in graph.operators):
        operator.opcodeIndex += len(unused)
    expected = flatbuffer.write(flatbuffer.compact(_tree()))
    assert flatbuffer.write(flatbuffer.compact(tree)) == expected


@pytest.mark.parametrize("name", ["OfflineMemoryAllocation", "COMPRESSION_METADATA"])
def test_compact_refuses_metadata_that_count_tensors(name: str) -> None:
    tree = _tree()
    tree.metadata[0].name = name
    with pytest.raises(ExportError, match=rf"metadata='{name}'"):
        flatbuffer.compact(flatbuffer.read(flatbuffer.write(tree)))


@pytest.mark.parametrize(
    ("type_name", "shape", "data", "expected"),
    [
        ("FLOAT32", [3, 4], _WEIGHTS, _WEIGHTS),
        ("INT8", [2], b"\xff\x7f", np.array([-1, 127], np.int8)),
        ("INT16", [1, 1], np.array([-300], "<i2"), np.array([[-300]], np.int16)),
        ("INT64", [], np.array([-(2**40)], "<i8"), np.array(-(2**40), np.int64)),
        ("BOOL", [2], [1, 0], np.array([True, False])),
        ("INT4", [3], [0x21, 0x0F], np.array([0x21, 0x0F], np.uint8)),
        ("INT2", [5], [0x1B, 0x02], np.array([0x1B, 0x02], np.uint8)),
        ("INT32", [0], b"", np.zeros([0], np.int32)),
        ("INT32", [2], b"", None),
        ("INT32", [2], None, None),
    ],
)
def test_tensor_data(
    type_name: str, shape: list[int], data: Any, expected: np.ndarray | None
) -> None:
    tree = _tree()
    tree.buffers[1].data = data
    kind = getattr(schema.TensorType, type_name)
    tree.subgraphs[0].tensors[2] = _tensor("w", shape, buffer=1, kind=kind)
    model = flatbuffer.read(flatbuffer.write(tree))
    values = flatbuffer.tensor_data(model, model.subgraphs[0].tensors[2])
    if expected is None:
        assert values is None
    else:
        np.testing.assert_array_equal(values, expected, strict=True)


def test_tensor_data_refuses_a_buffer_of_the_wrong_size() -> None:
    tree = _tree()
    tree.subgraphs[0].tensors[2].shape = [4, 5]
    with pytest.raises(ExportError, match=r"80 bytes, dense, for tensor 'w1'.*Received: 64 bytes"):
        flatbuffer.tensor_data(tree, tree.subgraphs[0].tensors[2])


def test_strings_have_no_dtype() -> None:
    tensor = _tensor("words", [1], kind=schema.TensorType.STRING)
    assert not flatbuffer.is_numeric(tensor)
    with pytest.raises(ExportError, match="type=STRING for tensor 'words'"):
        flatbuffer.tensor_dtype(tensor)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (schema.OperatorCodeT(deprecatedBuiltinCode=3), "CONV_2D"),
        (schema.OperatorCodeT(deprecatedBuiltinCode=127, builtinCode=150), "GELU"),
        (schema.OperatorCodeT(builtinCode=32, customCode=b"Mine"), "Mine"),
        (schema.OperatorCodeT(builtinCode=9999), "UNKNOWN_9999"),
    ],
)
def test_op_name(code: schema.OperatorCodeT, name: str) -> None:
    model = schema.ModelT(operatorCodes=[code])
    assert flatbuffer.op_name(model, schema.OperatorT(opcodeIndex=0)) == name
