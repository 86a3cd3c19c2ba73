"""RESHAPEs that change nothing for who reads them are gone, and no others."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from tests.newer_keras import needs_tensorflow
from tests.tflite_export.small_models import computed, operators, quantized
from tflite_export import flatbuffer
from tflite_export.flatbuffer.edit import new_operator
from tflite_export.integer_pass import pipeline
from tflite_export.integer_pass.carry_reshapes import carry_reshapes
from tflite_export.integer_pass.draft import Draft
from tflite_export.integer_pass.drop_reshapes import (
    drop_flattening,
    join_reshapes,
    keep_axes,
)
from tflite_export.runtimes.execution import RUNTIMES, run

IMAGE = (4, 4, 6)


def flattened(x: Any) -> Any:
    """Another last axis: 96 numbers of 4 x 4 x 6."""
    return L.Dense(5)(L.Flatten(name="flat")(L.MaxPooling2D(2, 1, "same", name="pool")(x)))


def pooled(x: Any) -> Any:
    """The same last axis, and two readers."""
    x = L.Flatten(name="flat")(L.AveragePooling2D(4, name="pool")(x))
    return L.Concatenate()([L.Dense(5)(x), L.Dense(3, use_bias=False)(x)])


def reshaped(x: Any) -> Any:
    """Two in a row."""
    return L.Dense(5)(L.Reshape((96,))(L.Reshape((16, 6), name="rows")(L.ReLU(name="relu")(x))))


def rows(x: Any) -> Any:
    """Rows that are no samples: each batch has sixteen."""
    return L.Dense(5)(L.Reshape((16, 6), name="rows")(L.ReLU(name="relu")(x)))


@pytest.mark.parametrize(
    ("call", "policy", "batch_size"),
    [
        (flattened, "int8", 1),
        pytest.param(rows, "int8", 2, marks=pytest.mark.slow),
        pytest.param(pooled, "int8", 2, marks=pytest.mark.slow),
        pytest.param(reshaped, "int8", 1, marks=pytest.mark.slow),
        pytest.param(flattened, "int16x8", 2, marks=pytest.mark.slow),
        pytest.param(flattened, "w4a8", 1, marks=pytest.mark.slow),
        pytest.param(rows, "int16x8", 1, marks=pytest.mark.slow),
    ],
)
def test_every_runtime_computes_the_same_without(
    call: Callable[[Any], Any], policy: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if batch_size > 1:
        needs_tensorflow("2.21", "a batch of more than one with as many RESHAPEs")
    qat, x = quantized(IMAGE, call, policy)
    without, whole = same_without(drop_flattening, qat, x[:8], batch_size, monkeypatch)
    assert "RESHAPE" in before_dense(whole) and "RESHAPE" not in before_dense(without)


def same_without(
    dropping: Any, qat: Any, x: np.ndarray, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[bytes, bytes]:
    """A model's file, and that in which a pass drops no RESHAPE.

    They compute the same integers on every runtime, and the first is the frozen model.
    """
    frozen = kqat.freeze(qat)
    without = tflite_export.convert(frozen, batch_size=batch_size)
    others = tuple(step for step in pipeline.PASSES if step.run is not dropping)
    assert len(others) == len(pipeline.PASSES) - 1
    monkeypatch.setattr(pipeline, "PASSES", others)
    whole = tflite_export.convert(frozen, batch_size=batch_size)
    dtype = np.dtype(tflite_export.inspect(whole).inputs[0].dtype)
    feed = [np.random.default_rng(0).integers(-128, 128, x.shape).astype(dtype)]
    for runtime in RUNTIMES:
        ours, reference = (run(blob, feed, runtime=runtime).outputs for blob in (without, whole))
        np.testing.assert_array_equal(ours[0], reference[0])
    report = tflite_export.verify(frozen, without, x, samples=len(x), runtimes=RUNTIMES)
    for part in report.runtimes:
        assert part.problem is None and part.unmatched == () and part.max_steps <= 1
    return without, whole


@pytest.mark.parametrize(("last", "dropped"), [(6, 2), (None, 2)], ids=["products", "softmax"])
def test_rows_keep_their_axes_behind_functions_of_each_number(
    last: int | None, dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between the layers of an expert, which are joined with those of others."""

    def call(x: Any) -> Any:
        parts = [L.Dense(6, activation=function)(x) for function in ("gelu", "softplus")]
        return L.Concatenate()([L.Dense(last)(y) if last else L.Softmax()(y) for y in parts])

    qat, x = quantized((16, 6), call, "int8")
    blobs = same_without(keep_axes, qat, x[:8], 1, monkeypatch)
    counts = [operators(flatbuffer.read(blob)).count("RESHAPE") for blob in blobs]
    assert counts[1] - counts[0] == dropped


def test_rows_that_are_outputs_keep_their_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's converter makes two operators of two `Dense`; here RESHAPEs stood behind."""

    def call(x: Any) -> Any:
        hidden = L.Dense(6, name="hidden")(x)
        return [L.Dense(3, name="first")(hidden), L.Dense(4, activation="relu")(hidden)]

    qat, x = quantized((16, 6), call, "int8")
    without, _ = same_without(keep_axes, qat, x[:8], 1, monkeypatch)
    assert operators(flatbuffer.read(without)) == ["FULLY_CONNECTED"] * 3
    assert all(part.unmatched == () for part in tflite_export.verify(qat, without, x).runtimes)


def before_dense(blob: bytes) -> set[str]:
    """The operators that compute what FULLY_CONNECTED reads."""
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    read = {int(op.inputs[0]) for op in graph.operators if named(model, op) == "FULLY_CONNECTED"}
    return {named(model, op) for op in graph.operators if int(op.outputs[0]) in read}


def named(model: flatbuffer.ModelT, operator: flatbuffer.OperatorT) -> str:
    return flatbuffer.op_name(model, operator)


def with_dense_at_the_end() -> tuple[Any, flatbuffer.ModelT, flatbuffer.OperatorT, int]:
    """The frozen model, its file, the last FULLY_CONNECTED and the tensor that it flattens."""
    frozen = kqat.freeze(quantized(IMAGE, flattened)[0])
    model = flatbuffer.read(tflite_export.convert(frozen))
    dense = model.subgraphs[0].operators[-1]
    return frozen, model, dense, int(dense.inputs[0])


@pytest.mark.parametrize("reader", ["RELU", "output", "keep_num_dims", "weights", "vector"])
def test_a_reshape_that_is_needed_stays(reader: str) -> None:
    frozen, model, dense, source = with_dense_at_the_end()
    graph = model.subgraphs[0]
    value = tensor(model, (1, 96))
    graph.operators.insert(-1, new_operator(model, "RESHAPE", [source], [value]))
    dense.inputs = [value, *dense.inputs[1:]]
    if reader == "RELU":
        other = tensor(model, (1, 96))
        graph.operators.append(new_operator(model, "RELU", [value], [other]))
    elif reader == "output":
        graph.outputs = [*graph.outputs, value]
    elif reader == "keep_num_dims":
        dense.builtinOptions.keepNumDims = True
    elif reader == "weights":
        dense.inputs = [value, value, -1]
    else:
        graph.tensors[source].shape = np.asarray([96], np.int32)
    before = operators(model)
    drop_flattening(Draft(model, frozen, frozenset()))
    assert operators(model) == before


def tensor(model: flatbuffer.ModelT, shape: tuple[int, ...]) -> int:
    new = schema.TensorT()
    new.name, new.shape, new.buffer = b"new", np.asarray(shape, np.int32), 0
    new.type = schema.TensorType.INT8
    model.subgraphs[0].tensors.append(new)
    return len(model.subgraphs[0].tensors) - 1


def test_a_site_that_lost_its_tensor_counts_as_compared_with_the_one_before() -> None:
    qat, x = quantized(IMAGE, flattened)
    blob = tflite_export.convert(qat)
    assert "flat" not in computed(flatbuffer.read(blob))
    (part,) = tflite_export.verify(qat, blob, x, runtimes=["litert_reference"]).runtimes
    assert part.unmatched == ()
    assert {site.name for site in part.sites} == {"x", "pool", "dense"}


def test_a_site_whose_integers_are_nowhere_in_their_order_is_missed() -> None:
    def call(x: Any) -> Any:
        x = L.Permute((2, 1, 3), name="permute")(L.ReLU(name="relu")(x))
        return L.Dense(5, name="dense")(L.Flatten(name="flat")(x))

    qat, x = quantized(IMAGE, call)
    model = flatbuffer.read(tflite_export.convert(qat))
    relu, transpose, dense = model.subgraphs[0].operators
    dense.inputs = [relu.outputs[0], *dense.inputs[1:]]
    model.subgraphs[0].operators.remove(transpose)
    blob = flatbuffer.write(flatbuffer.compact(model))
    (part,) = tflite_export.verify(qat, blob, x, runtimes=["litert_reference"]).runtimes
    assert part.unmatched == ("permute", "flat")
    assert part.max_steps > 1


def dense(x: Any) -> Any:
    """Rows of three axes in, and out."""
    return L.Dense(5, name="dense")(L.ReLU(name="relu")(x))


def expanded(x: Any) -> Any:
    """Back to five axes, behind a `Dense` whose activation is part of it; then other readers."""
    x = L.ReLU()(L.Reshape((2, 2, 4, 6), name="grown")(x))
    x = L.Dense(8, activation="relu", name="wide")(x)
    return L.Concatenate()([L.Dense(6, name="dense")(x), x])


@pytest.mark.parametrize(
    ("call", "policy", "batch_size"),
    [
        (dense, "int8", 2),
        pytest.param(expanded, "int8", 1, marks=pytest.mark.slow),
        pytest.param(expanded, "int16x8", 2, marks=pytest.mark.slow),
        pytest.param(dense, "w4a8", 1, marks=pytest.mark.slow),
        pytest.param(expanded, "w4a8", 2, marks=pytest.mark.slow),
    ],
)
def test_rows_keep_their_axes_on_every_runtime(
    call: Callable[[Any], Any], policy: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if batch_size > 1:
        needs_tensorflow("2.21", "a batch of more than one with as many RESHAPEs")
    qat, x = quantized(IMAGE, call, policy)
    without, whole = same_without(keep_axes, qat, x[:8], batch_size, monkeypatch)
    products = operators(flatbuffer.read(without)).count("FULLY_CONNECTED")
    reshapes = [operators(flatbuffer.read(blob)).count("RESHAPE") for blob in (whole, without)]
    assert products and reshapes[0] - reshapes[1] == products


def excited(x: Any) -> Any:
    """Squeeze and excite, as in EfficientNet, and means of rows."""
    x = L.ReLU(name="relu")(x)
    means = L.Reshape((1, 1, 6))(L.GlobalAveragePooling2D(name="means")(x))
    rows = ops.expand_dims(ops.mean(x, axis=2), 2)
    return L.Multiply()([x, L.Conv2D(6, 1, activation="sigmoid")(means)]) + rows


@pytest.mark.parametrize(
    ("policy", "batch_size"), [("int8", 1), pytest.param("int16x8", 2, marks=pytest.mark.slow)]
)
def test_reductions_keep_their_axes_on_every_runtime(
    policy: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if batch_size > 1:
        needs_tensorflow("2.21", "a batch of more than one with as many RESHAPEs")
    qat, x = quantized(IMAGE, excited, policy)
    blobs = same_without(keep_axes, qat, x[:8], batch_size, monkeypatch)
    found = [operators(flatbuffer.read(blob)).count("RESHAPE") for blob in blobs]
    assert found == [0, 2]


@pytest.mark.parametrize("reason", ["other shape", "other axes", "axes of a tensor"])
def test_a_reshape_that_gives_a_mean_other_axes_stays(reason: str) -> None:
    frozen = kqat.freeze(quantized(IMAGE, excited)[0])
    model = flatbuffer.read(tflite_export.convert(frozen))
    graph = model.subgraphs[0]
    mean = next(operator for operator in graph.operators if named(model, operator) == "MEAN")
    (result,) = mean.outputs
    flat = tensor(model, (1, 6))
    mean.outputs, mean.builtinOptions.keepDims = [flat], False
    reshape = new_operator(model, "RESHAPE", [flat], [result])
    graph.operators.insert(graph.operators.index(mean) + 1, reshape)
    if reason == "other shape":
        graph.tensors[result].shape = np.asarray([1, 1, 6, 1], np.int32)
    elif reason == "other axes":
        graph.tensors[int(mean.inputs[0])].shape = np.asarray([1, 6, 4, 4], np.int32)
    else:
        mean.inputs = [mean.inputs[0], tensor(model, (2,))]
    before = operators(model)
    keep_axes(Draft(model, frozen, frozenset()))
    assert operators(model) == before


@pytest.mark.parametrize("reason", ["other shape", "other reader", "output", "columns"])
def test_a_reshape_that_gives_other_axes_stays(reason: str) -> None:
    frozen = kqat.freeze(quantized(IMAGE, dense)[0])
    model = flatbuffer.read(tflite_export.convert(frozen))
    graph = model.subgraphs[0]
    product = graph.operators[-1]
    result = int(product.outputs[0])
    flat = tensor(model, (16, 5))
    product.outputs, product.builtinOptions.keepNumDims = [flat], False
    graph.operators.append(new_operator(model, "RESHAPE", [flat], [result]))
    if reason == "other shape":
        graph.tensors[result].shape = np.asarray([1, 2, 8, 5], np.int32)
    elif reason == "other reader":
        positive = tensor(model, (16, 5))
        graph.operators.append(new_operator(model, "RELU", [flat], [positive]))
        graph.outputs = [*graph.outputs, positive]
    elif reason == "output":
        graph.outputs = [*graph.outputs, flat]
    else:
        graph.tensors[int(product.inputs[0])].shape = np.asarray([1, 4, 2, 12], np.int32)
    before = operators(model)
    keep_axes(Draft(model, frozen, frozenset()))
    assert operators(model) == before


STEPS = (12, 4)


def stacked(x: Any) -> Any:
    """Three convolutions of rows, the second of which is read twice, and an output inside."""
    x = L.Conv1D(6, 3, padding="same", activation="relu", name="first")(x)
    y = L.Conv1D(6, 3, padding="same", name="second")(x)
    return L.Add(name="sum")([L.Conv1D(6, 3, padding="same", name="third")(y), y])


def separated(x: Any) -> Any:
    x = L.SeparableConv1D(6, 3, padding="same", activation="relu")(x)
    return L.SeparableConv1D(6, 3)(L.MaxPooling1D(2)(x))


@pytest.mark.parametrize(
    ("call", "policy", "batch_size", "without", "whole"),
    [
        (stacked, "int8", 1, 3, 6),
        pytest.param(separated, "int8", 1, 2, 10, marks=pytest.mark.slow),
        pytest.param(separated, "w4a8", 1, 2, 10, marks=pytest.mark.slow),
        pytest.param(stacked, "int16x8", 2, 3, 6, marks=pytest.mark.slow),
    ],
)
def test_reshapes_in_a_row_are_one_or_none(
    call: Callable[[Any], Any],
    policy: str,
    batch_size: int,
    without: int,
    whole: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if batch_size > 1:
        needs_tensorflow("2.21", "a batch of more than one with as many RESHAPEs")
    others = tuple(step for step in pipeline.PASSES if step.run is not carry_reshapes)
    monkeypatch.setattr(pipeline, "PASSES", others)  # It joins RESHAPEs, too.
    qat, x = quantized(STEPS, call, policy)
    blobs = same_without(join_reshapes, qat, x[:8], batch_size, monkeypatch)
    found = [operators(flatbuffer.read(blob)).count("RESHAPE") for blob in blobs]
    assert found == [without, whole]


@pytest.mark.parametrize("reason", ["output", "read by another"])
def test_of_two_reshapes_what_else_reads_stays(reason: str) -> None:
    frozen, model, dense, source = with_dense_at_the_end()
    graph = model.subgraphs[0]
    shape = flatbuffer.tensor_shape(graph.tensors[source])
    flat, back = tensor(model, (1, 96)), tensor(model, shape)
    graph.operators.insert(-1, new_operator(model, "RESHAPE", [source], [flat]))
    graph.operators.insert(-1, new_operator(model, "RESHAPE", [flat], [back]))
    dense.inputs = [back, *dense.inputs[1:]]
    if reason == "output":
        graph.outputs = [*graph.outputs, flat, back]
    else:
        other = new_operator(model, "RELU", [flat], [tensor(model, (1, 96))])
        graph.operators.append(other)
    draft = Draft(model, frozen, frozenset())
    join_reshapes(draft)
    if reason == "output":  # Each output is a tensor of its own.
        assert operators(model).count("RESHAPE") == 2
    else:
        assert operators(model).count("RESHAPE") == 1
        assert int(dense.inputs[0]) == source
