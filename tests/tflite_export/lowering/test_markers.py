"""Markers: what they encode survives the converter, and they leave no trace but labels."""

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given
from hypothesis import strategies as st

from kqat.base.errors import LoweringError
from kqat.freezing.frozen_model import FrozenModel
from kqat.grids.site import Site
from kqat.parts.markers import Marker
from tests.tflite_export.small_models import operators
from tflite_export import flatbuffer
from tflite_export.flatbuffer.edit import new_operator, operator_code
from tflite_export.flatbuffer.tree import ModelT, OperatorT
from tflite_export.lowering.converter import lower
from tflite_export.lowering.markers import Labels, same_grid, take_markers

SHAPE = (4,)
A = Site("a", np.float32(0.5), -3, 8, SHAPE)
B = Site("b", np.float32(0.25), 7, 8, SHAPE)
A_AGAIN = Site("a_again", A.scale, A.zero_point, 8, SHAPE)
SITES = (A, B, A_AGAIN)


class Marked:
    """A marked float flatbuffer under construction: `x` is tensor 0, floats of shape (1, 4)."""

    def __init__(self) -> None:
        graph = schema.SubGraphT(tensors=[], inputs=[0], outputs=[], operators=[])
        self.model = schema.ModelT(
            version=3, subgraphs=[graph], operatorCodes=[], buffers=[schema.BufferT()]
        )
        self.model.signatureDefs = []
        self.graph = graph
        self.x = self.tensor()

    def tensor(self, shape: tuple[int, ...] = (1, *SHAPE)) -> int:
        name = f"t{len(self.graph.tensors)}"
        tensor = schema.TensorT(name=name, shape=shape, type=schema.TensorType.FLOAT32, buffer=0)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def op(self, name: str, source: int, shape: tuple[int, ...] = (1, *SHAPE)) -> int:
        output = self.tensor(shape)
        self.graph.operators.append(new_operator(self.model, name, [source], [output]))
        return output

    def marker(self, kind: str, index: int, source: int) -> int:
        shape = flatbuffer.tensor_shape(self.graph.tensors[source])
        middle = self.op("QUANTIZE", source, shape)
        params = schema.QuantizationParametersT()
        params.scale = np.array([(index + 1) * Marker.STEP], np.float32)
        params.zeroPoint = np.array([Marker.KINDS[kind]])
        self.graph.tensors[middle].quantization = params
        return self.op("DEQUANTIZE", middle, shape)

    def taken(self, *outputs: int) -> Labels:
        self.graph.outputs = list(outputs)
        maps = [schema.TensorMapT(name=f"output_{i}", tensorIndex=t) for i, t in enumerate(outputs)]
        self.model.signatureDefs = [
            schema.SignatureDefT(signatureKey="serve", inputs=[], outputs=maps)
        ]
        return take_markers(self.model, SITES)

    def operator(self, position: int) -> OperatorT:
        return self.graph.operators[position]


@given(st.sampled_from(sorted(Marker.KINDS)), st.integers(0, 20_000))
def test_kind_and_index_come_back_from_float32(kind: str, index: int) -> None:
    step, zero = (index + 1) * Marker.STEP, Marker.KINDS[kind]
    low, high = np.float32(-zero * step), np.float32((255 - zero) * step)
    assert Marker.read(float((high - low) / np.float32(255)), zero) == (kind, index)


@pytest.mark.parametrize(
    ("kind", "index"), [("site", 0), ("site", 4095), ("table", 77), ("lstm", 3)]
)
def test_kind_and_index_come_back_from_the_converter(kind: str, index: int) -> None:
    x = keras.Input(SHAPE, name="x")
    y = Marker(kind, index, name="marker")(keras.layers.Dense(4, name="dense")(x))
    frozen = FrozenModel(
        model=keras.Model(x, y),
        sites=(),
        weights=(),
        tables=(),
        lstms=(),
        input_names=("x",),
        output_names=("y",),
    )
    model = lower(frozen)
    assert operators(model) == ["FULLY_CONNECTED", "QUANTIZE", "DEQUANTIZE"]
    marked = model.subgraphs[0].tensors[model.subgraphs[0].operators[1].outputs[0]]
    params = marked.quantization
    assert Marker.read(float(params.scale[0]), int(params.zeroPoint[0])) == (kind, index)


def test_a_pair_becomes_a_label() -> None:
    net = Marked()
    x = net.marker("site", 0, net.x)
    y = net.op("RELU", x)
    labels = net.taken(net.marker("site", 1, y))
    assert operators(net.model) == ["RELU"]
    assert list(net.operator(0).inputs) == [net.x]
    assert labels.sites == {net.x: A, y: B}
    assert labels.named == {net.x: [A], y: [B]}
    assert labels.floats == set()
    assert list(net.graph.outputs) == [y]
    assert net.model.signatureDefs[0].outputs[0].tensorIndex == y


def test_a_second_grid_on_one_value_is_a_requantization() -> None:
    net = Marked()
    once = net.marker("site", 0, net.x)
    twice = net.marker("site", 1, once)
    labels = net.taken(net.op("RELU", twice))
    assert operators(net.model) == ["QUANTIZE", "RELU"]
    assert list(net.operator(0).inputs) == [net.x]
    result = int(net.operator(0).outputs[0])
    assert list(net.operator(1).inputs) == [result]
    assert labels.sites == {net.x: A, result: B}


def test_the_same_grid_again_is_nothing_but_a_name() -> None:
    net = Marked()
    twice = net.marker("site", 2, net.marker("site", 0, net.x))
    labels = net.taken(net.op("RELU", twice))
    assert operators(net.model) == ["RELU"]
    assert labels.sites == {net.x: A}
    assert labels.named == {net.x: [A, A_AGAIN]}


def test_a_fence_behind_an_integer_is_a_dequantize() -> None:
    net = Marked()
    fence = net.marker("fence", 0, net.marker("site", 0, net.x))
    labels = net.taken(net.op("EXP", fence))
    assert operators(net.model) == ["DEQUANTIZE", "EXP"]
    assert list(net.operator(0).inputs) == [net.x]
    assert labels.sites == {net.x: A}
    assert labels.floats == {int(net.operator(0).outputs[0])}


def test_a_fence_behind_a_float_is_the_quantize_of_the_next_marker() -> None:
    net = Marked()
    y = net.op("EXP", net.x)
    marked = net.marker("site", 1, net.marker("fence", 0, y))
    labels = net.taken(net.op("RELU", marked))
    assert operators(net.model) == ["EXP", "QUANTIZE", "RELU"]
    assert list(net.operator(1).inputs) == [y]
    assert labels.floats == {y}
    assert labels.sites == {int(net.operator(1).outputs[0]): B}


def test_a_marker_that_the_converter_copied_is_dropped() -> None:
    """It hands pairs on across moves and reductions: a second tensor, or one of another size."""
    net = Marked()
    x = net.marker("site", 0, net.x)
    moved = net.marker("site", 0, net.op("RESHAPE", x, (4, 1)))
    reduced = net.marker("site", 1, net.op("MEAN", moved, (1, 1)))
    labels = net.taken(net.op("RELU", reduced, (1, 1)))
    assert operators(net.model) == ["RESHAPE", "MEAN", "RELU"]
    assert labels.sites == {net.x: A}


def test_a_table_marker_is_a_placeholder() -> None:
    net = Marked()
    y = net.marker("table", 5, net.marker("site", 0, net.x))
    labels = net.taken(net.marker("site", 1, y))
    (placeholder, index), *rest = labels.tables
    assert (index, rest) == (5, [])
    assert placeholder is net.operator(0)
    assert operators(net.model) == ["GATHER"]
    assert labels.sites == {net.x: A, int(placeholder.outputs[0]): B}


def test_quantization_that_is_no_marker_stays() -> None:
    net = Marked()
    y = net.op("DEQUANTIZE", net.x)
    net.taken(y)
    assert operators(net.model) == ["DEQUANTIZE"]


def test_an_unknown_marker_is_refused() -> None:
    net = Marked()
    y = net.marker("site", len(SITES), net.x)
    with pytest.raises(LoweringError, match=r"a marker below 3\. Received: 3"):
        net.taken(y)


def test_grids_are_the_same_whatever_their_names() -> None:
    assert same_grid(A, A_AGAIN)
    for other in (B, Site("a", A.scale, -2, 8, SHAPE), Site("a", A.scale, -3, 4, SHAPE)):
        assert not same_grid(A, other)


def test_operator_codes_are_shared_by_version() -> None:
    model: ModelT = schema.ModelT(operatorCodes=[])
    big = schema.BuiltinOperator.BROADCAST_TO  # does not fit the deprecated field's one byte
    assert [operator_code(model, big, v) for v in (1, 2, 1)] == [0, 1, 0]
    code = model.operatorCodes[0]
    assert (code.builtinCode, code.deprecatedBuiltinCode, code.version) == (big, 127, 1)
