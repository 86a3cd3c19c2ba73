"""Encoded weights: what the kernels read is what was trained, in fewer bytes."""

import itertools
from typing import Any

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers

import kqat
import tflite_export
from kqat.base.errors import ExportError, TargetError
from kqat.devices.targets import TARGETS
from tests.tflite_export.decoding import decode
from tests.tflite_export.small_models import operators, quantized
from tflite_export import flatbuffer
from tflite_export.flatbuffer.inspection import DECODE
from tflite_export.kernels.weight_layout import quantization
from tflite_export.runtimes.execution import run, supports
from tflite_export.weight_storage import encodings as codec
from tflite_export.weight_storage import huffman

needs_micro = pytest.mark.skipif(not supports("tflite_micro"), reason="needs the extra tflm")
RNG = np.random.default_rng(0)

# Kinds of weights -> how they are drawn.
WEIGHTS: dict[str, Any] = {
    "int8": lambda shape: np.clip(np.rint(RNG.normal(0, 30, shape)), -127, 127),
    "half pruned": lambda shape: WEIGHTS["int8"](shape) * RNG.integers(0, 2, shape),
    "4 bits": lambda shape: np.clip(np.rint(RNG.normal(0, 2.5, shape)), -7, 7),
    "ternary": lambda shape: RNG.choice([-1, 0, 1], shape, p=[0.15, 0.7, 0.15]),
    "binary": lambda shape: RNG.choice([-1, 1], shape),
    "one value": lambda shape: np.full(shape, -3),
    # A few values that are common and many that are not: long codes.
    "skewed": lambda shape: np.clip(np.rint(2 * RNG.standard_cauchy(shape)), -127, 127),
    # 16 values in each channel, others in each.
    "own tables": lambda shape: (
        np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) * 16
        + RNG.integers(-128, -112, shape)
    ),
}
SHAPES: list[tuple[tuple[int, ...], int | None]] = [
    ((7, 3, 3, 9), 0),
    ((1, 3, 3, 37), 3),
    ((6, 35), None),
]


def encodings(integers: np.ndarray, axis: int | None) -> list[codec.Encoding]:
    found = [codec.smallest(integers, axis, [method]) for method in codec.METHODS]
    return [encoding for encoding in found if encoding is not None]


@given(st.data())
def test_what_is_encoded_is_decoded(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=6))
    axis = data.draw(st.sampled_from([None, 0, len(shape) - 1]))
    low = data.draw(st.integers(-128, 127))
    elements = st.integers(low, min(127, low + data.draw(st.integers(0, 255))))
    integers = data.draw(hnp.arrays(np.int8, shape, elements=elements))
    for encoding in encodings(integers, axis):
        found = decode(encoding.data, encoding.ancillary, shape, axis)
        np.testing.assert_array_equal(found, integers)


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=40), st.integers(6, 15))
def test_codes_are_short_and_none_begins_another(counts: list[int], limit: int) -> None:
    lengths = huffman.code_lengths(counts, limit)
    assert max(lengths) <= limit
    assert sum(2.0**-length for length in lengths) == 1.0  # Kraft's equality: no code is free.
    if limit == 15 and len(counts) <= 12:
        share = np.asarray(counts) / sum(counts)
        mean = float(np.dot(share, lengths))
        entropy = float(-np.dot(share, np.log2(share)))
        assert entropy - 1e-9 <= mean <= entropy + 1


def test_the_longest_codes_have_tables_of_their_own() -> None:
    integers = WEIGHTS["skewed"]((40, 100)).astype(np.int8)
    code = huffman.best_code(integers)
    assert code is not None
    assert code.root_bits < max(map(len, code.codes.values()))
    assert len(code.tables) > 2**code.root_bits


def decoding_file(cases: list[tuple[np.ndarray, int | None, codec.Encoding]]) -> bytes:
    """One DECODE for each case; what they write are the outputs."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.subgraphs, model.buffers = 3, [graph], [schema.BufferT()]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
    code.customCode, code.version = DECODE.encode(), 1
    model.operatorCodes = [code]
    graph.tensors, graph.operators, graph.outputs = [], [], []

    def tensor(shape: tuple[int, ...], kind: int, data: bytes | None = None) -> int:
        made = schema.TensorT()
        made.shape, made.type, made.buffer = list(shape), kind, 0
        if data is not None:
            model.buffers.append(schema.BufferT(data=np.frombuffer(data, np.uint8)))
            made.buffer = len(model.buffers) - 1
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    graph.inputs = [tensor((1, 1), schema.TensorType.INT8)]
    for integers, axis, encoding in cases:
        operator = schema.OperatorT()
        operator.inputs = [
            tensor((len(part),), schema.TensorType.UINT8, part)
            for part in (encoding.data, encoding.ancillary)
        ]
        output = tensor(integers.shape, schema.TensorType.INT8)
        channels = 1 if axis is None else integers.shape[axis]
        graph.tensors[output].quantization = quantization(np.ones(channels), [0], axis or 0)
        operator.outputs = [output]
        graph.operators.append(operator)
        graph.outputs.append(output)
    return flatbuffer.write(model)


@needs_micro
def test_tflite_micro_decodes_as_the_reference_does() -> None:
    cases = [
        (integers, axis, encoding)
        for draw in WEIGHTS.values()
        for shape, axis in SHAPES
        for integers in [draw(shape).astype(np.int8)]
        for encoding in encodings(integers, axis)
    ]
    assert {encoding.method for *_, encoding in cases} == set(codec.METHODS)
    found = run(decoding_file(cases), [np.zeros((1, 1), np.int8)], runtime="tflite_micro").outputs
    for (integers, axis, encoding), array in zip(cases, found, strict=True):
        expected = decode(encoding.data, encoding.ancillary, integers.shape, axis)
        np.testing.assert_array_equal(array.reshape(integers.shape), expected)
        np.testing.assert_array_equal(expected, integers)


def cnn(pruned: bool) -> keras.Model:
    """Layers of each operator with weights; `Dense` reads one kernel twice."""
    shared = layers.Dense(48, activation="relu", name="twice")
    x = image = keras.Input((8, 8, 24), name="image")
    x = layers.ReLU()(layers.Conv2D(48, 3, name="conv", bias_initializer="ones")(x))
    x = layers.DepthwiseConv2D(5, name="depthwise", padding="same")(x)
    x = layers.Conv2DTranspose(48, 3, strides=2, name="transposed")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(4, name="head")(shared(shared(x))), name="cnn")
    if pruned:
        for weight in model.trainable_weights:
            if len(weight.shape) > 1:
                kept = np.random.default_rng(1).random(weight.shape) > 0.8
                weight.assign(np.asarray(weight) * kept)
    return model


# Policy -> the encodings that "lookup" and "smallest" take of it. Of four bits only the transposed
# convolution, which TFLite Micro has no packed kernel of, gains by indices.
POLICIES = {
    "int8": ({"prune"}, {"prune"}),
    "w4a8": ({"lookup"}, {"huffman"}),
    "w3a8": ({"lookup"}, {"huffman"}),
    "w2a8": ({"lookup"}, {"huffman"}),
    "ternary": ({"lookup"}, {"huffman"}),
    "binary": ({"lookup"}, {"lookup"}),
}
FAST = (("ternary", "smallest"),)
CASES = [
    pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
    for case in itertools.product(POLICIES, ("lookup", "smallest"))
]


@pytest.fixture(scope="module")
def frozen_models() -> dict[str, tuple[kqat.FrozenModel, np.ndarray, bytes]]:
    return {}


def shipped(policy: str, cache: dict[str, Any]) -> tuple[kqat.FrozenModel, np.ndarray, bytes]:
    """The frozen model of a policy, inputs, and its file without compression."""
    if policy not in cache:
        keras.utils.set_random_seed(0)
        x = np.random.default_rng(0).normal(size=(8, 8, 8, 24)).astype(np.float32)
        model = cnn(pruned=policy == "int8")
        frozen = kqat.freeze(kqat.quantize_model(model, policy, calibration_data=x))
        cache[policy] = frozen, x, tflite_export.convert(frozen, target="tflite_micro")
    return cache[policy]


def methods_in(blob: bytes) -> set[str]:
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    decoders = [op for op in graph.operators if flatbuffer.op_name(model, op) == DECODE]
    kinds = [
        model.buffers[graph.tensors[i].buffer].data[0] for op in decoders for i in op.inputs[1::2]
    ]
    return {("lookup", "huffman", "prune")[kind] for kind in kinds}


@needs_micro
@pytest.mark.parametrize(("policy", "compress"), CASES)
def test_kernels_read_the_trained_integers(
    policy: str, compress: str, frozen_models: dict[str, Any]
) -> None:
    frozen, x, plain = shipped(policy, frozen_models)
    blob = tflite_export.convert(frozen, target="tflite_micro", compress=compress)
    assert len(blob) < len(plain)
    assert methods_in(blob) == POLICIES[policy][compress == "smallest"]
    tensors = flatbuffer.read(blob).subgraphs[0].tensors
    feed = np.zeros((1, 8, 8, 24), np.int8)
    found = run(blob, [feed], runtime="tflite_micro", tensors="all").tensors
    trained = {weight.name: weight.integers for weight in frozen.weights}
    decoded = {
        flatbuffer.tensor_name(tensors[index]): array
        for index, array in found.items()
        if flatbuffer.tensor_name(tensors[index]) in trained
    }
    assert decoded
    for name, array in decoded.items():
        ours = trained[name]
        if name.startswith("transposed"):  # Keras has (height, width, out, in), the file out first.
            ours = np.moveaxis(ours, 2, 0)
        elif not name.startswith("depthwise"):
            ours = np.moveaxis(ours, -1, 0)
        np.testing.assert_array_equal(array.reshape(-1), ours.reshape(-1), err_msg=name)
    report = tflite_export.verify(frozen, blob, x, runtimes=["tflite_micro"])
    (part,) = report.runtimes
    # One step: kernels round twice where float arithmetic rounds once.
    assert (part.problem, part.max_steps <= 1, part.unmatched) == (None, True, ())
    assert report.is_full_integer
    assert any("decoded at each invocation" in note for note in report.notes)


def test_what_would_grow_stays_as_it_is() -> None:
    qat, _ = quantized((4, 4, 2), lambda x: layers.Conv2D(3, 3)(x), policy="ternary")
    plain = tflite_export.convert(qat, target="cmsis_nn")
    blob = tflite_export.convert(qat, target="cmsis_nn", compress="smallest")
    assert DECODE not in operators(flatbuffer.read(blob))
    assert len(blob) <= len(plain)


@needs_micro
def test_c_registers_the_decoder(frozen_models: dict[str, Any], tmp_path: Any) -> None:
    frozen, *_ = shipped("ternary", frozen_models)
    blob = tflite_export.convert(frozen, target="tflite_micro", compress="lookup")
    written = tflite_export.to_c(blob, tmp_path)
    assert DECODE in written.operators
    assert "AddDecode()" in (tmp_path / "model_ops.h").read_text()
    inspection = tflite_export.inspect(blob)
    # What is encoded counts where it is read, once.
    assert [op.constant_bytes for op in inspection.operators if op.name == DECODE] == [0] * len(
        inspection.decoded
    )
    conv = next(op for op in inspection.operators if op.name == "CONV_2D")
    assert 9 * 24 * 48 * 2 // 8 < conv.constant_bytes < 9 * 24 * 48 * 2 // 8 + 300


@pytest.mark.parametrize(
    "target", [None, *(n for n, t in TARGETS.items() if not t.decodes_weights)]
)
def test_only_tflite_micro_decodes(target: str | None) -> None:
    qat, _ = quantized((4,), layers.Dense(2))
    with pytest.raises(TargetError, match="only TFLite Micro has the operator TFLM_DECODE"):
        tflite_export.convert(qat, target=target, compress="lookup")


def test_an_unknown_way_is_refused() -> None:
    qat, _ = quantized((4,), layers.Dense(2))
    with pytest.raises(ExportError, match=r"one of \['lookup', 'smallest'\].*Received: 'zip'"):
        tflite_export.convert(qat, target="tflite_micro", compress="zip")
