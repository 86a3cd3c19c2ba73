"""Operators that repeat another one are gone, and no others; each integer stays what it was."""

import copy
from typing import Any

import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers as L

import kqat
import tflite_export
from tests.tflite_export.integer_pass.test_drop_reshapes import same_without
from tests.tflite_export.small_models import operators, quantized
from tflite_export import flatbuffer
from tflite_export.flatbuffer import OperatorT
from tflite_export.flatbuffer.edit import add_tensor, operator_code
from tflite_export.integer_pass.draft import Draft
from tflite_export.integer_pass.equal_operators import join_equals


def repeated(x: Any) -> Any:
    """Two branches that compute the same, one of another factor, and one of another input."""
    ways = [L.Rescaling(f)(L.Activation("sigmoid")(x)) for f in (0.5, 0.5, 0.25)]
    return L.Concatenate()([*ways, L.Rescaling(0.5)(L.Activation("tanh")(x))])


@pytest.mark.slow
def test_a_repetition_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    qat, x = quantized((4, 6), repeated)
    without, whole = same_without(join_equals, qat, x[:8], 1, monkeypatch)
    counts = [operators(flatbuffer.read(blob)).count("MUL") for blob in (without, whole)]
    assert counts == [3, 4]


@pytest.fixture(scope="module")
def converted() -> tuple[kqat.FrozenModel, bytes]:
    """A frozen model of one Dense, and its file."""
    frozen = kqat.freeze(quantized((6,), L.Dense(3))[0])
    return frozen, tflite_export.convert(frozen)


def with_two(converted: tuple[kqat.FrozenModel, bytes]) -> tuple[Draft, OperatorT, OperatorT]:
    """A draft of the file whose last operator is there twice, and the two."""
    frozen, blob = converted
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    one = graph.operators[-1]
    other, result = copy.copy(one), copy.copy(graph.tensors[int(one.outputs[0])])
    graph.tensors.append(result)
    other.outputs = [len(graph.tensors) - 1]
    graph.operators.append(other)
    return Draft(model, frozen, frozenset()), one, other


@pytest.mark.parametrize(
    "what", ["equal", "options", "grid", "constant", "output", "state", "custom"]
)
def test_what_differs_in_anything_stays(
    what: str, converted: tuple[kqat.FrozenModel, bytes]
) -> None:
    draft, one, other = with_two(converted)
    model, graph = draft.model, draft.graph
    if what == "options":
        other.builtinOptions = copy.copy(one.builtinOptions)
        other.builtinOptions.keepNumDims = not one.builtinOptions.keepNumDims
    elif what == "grid":
        graph.tensors[other.outputs[0]].quantization = None
    elif what == "constant":
        weights = graph.tensors[int(one.inputs[1])]
        data = flatbuffer.tensor_data(model, weights)
        assert data is not None
        kind, grid = weights.type, weights.quantization
        place = add_tensor(model, weights.shape, kind, grid=grid, data=-data)
        other.inputs = [other.inputs[0], place, *other.inputs[2:]]
    elif what == "output":
        graph.outputs = [*graph.outputs, *other.outputs]
    elif what == "state":
        graph.tensors[int(one.inputs[0])].isVariable = True
    elif what == "custom":
        code = operator_code(model, schema.BuiltinOperator.CUSTOM, 1, b"mine")
        one.opcodeIndex = other.opcodeIndex = code
    before = len(graph.operators)
    join_equals(draft)
    assert len(graph.operators) == before - (what == "equal")
