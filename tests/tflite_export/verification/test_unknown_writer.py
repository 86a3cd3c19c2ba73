"""Files whose model is not at hand, or that were made to do harm."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers as L

import kqat
import tflite_export
from kqat.base.errors import ExportError, KqatError, ModelError
from tests.tflite_export.small_models import quantized
from tflite_export import exporter, flatbuffer
from tflite_export.flatbuffer.tree import ModelT
from tflite_export.runtimes import execution, feeds
from tflite_export.verification import unknown_writer

LITERT = ("litert_reference", "litert")


@pytest.fixture(scope="module")
def net() -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(0)
    return quantized((6, 6, 2), lambda x: L.Dense(3, name="head")(L.Flatten()(L.Conv2D(4, 3)(x))))


@pytest.fixture(scope="module")
def blob(net: tuple[keras.Model, np.ndarray]) -> bytes:
    return tflite_export.convert(net[0])


def changed(blob: bytes, change: Callable[[ModelT], None]) -> bytes:
    model = flatbuffer.read(blob)
    change(model)
    return flatbuffer.write(model)


def test_a_file_alone_is_verified_as_far_as_it_can_be(blob: bytes) -> None:
    report = tflite_export.verify(None, blob, samples=8)
    assert (report.model_name, report.samples, report.macs) == ("kqat", 8, 4 * 4 * 4 * 18 + 64 * 3)
    assert "no lockstep" in report.notes[0]
    assert [part.problem for part in report.runtimes] == [None] * 3
    first, *others = report.runtimes
    # One rounding of XNNPACK's per layer, and two layers.
    assert first.outputs == () and all(part.outputs[0].max_steps <= 2 for part in others)
    assert others[1].arena_bytes == report.arena_bytes
    assert [layer.operator for layer in report.layers] == [
        o.name for o in tflite_export.inspect(blob).operators
    ]
    assert {layer.sqnr_db for layer in report.layers} == {None}
    text, page = str(report), report.to_html()
    assert "litert_reference: ran it" in text and "Grid used" not in page


@pytest.mark.parametrize("kind", [np.float32, np.int8])
def test_data_may_be_floats_or_the_files_own(
    net: tuple[keras.Model, np.ndarray], blob: bytes, kind: type
) -> None:
    x = feeds.as_type(net[1], flatbuffer.read(blob).subgraphs[0].tensors[0])
    report = tflite_export.verify(None, blob, net[1] if kind is np.float32 else x, samples=5)
    same = tflite_export.verify(None, blob, {"x": net[1]}, samples=5)
    assert report == same and report.samples == 5
    with pytest.raises(ExportError, match=r"inputs \['x'\]\. Received: \['y'\]"):
        tflite_export.verify(None, blob, {"y": net[1]})
    with pytest.raises(ExportError, match=r"one array for each input \['x'\]\. Received: 2"):
        tflite_export.verify(None, blob, [net[1], net[1]])


def test_a_file_of_another_model_is_told(net: tuple[keras.Model, np.ndarray]) -> None:
    other, x = quantized((5,), L.Dense(2))
    report = tflite_export.verify(net[0], tflite_export.convert(other), x, samples=4)
    assert re.search(r"not made of 'net', whose inputs have shapes \[\(6, 6, 2\)\]", str(report))
    assert all(part.sites == () for part in report.runtimes)


def test_a_crash_is_a_finding(blob: bytes) -> None:
    def hollow(model: ModelT) -> None:
        operator = model.subgraphs[0].operators[0]
        operator.inputs = [operator.inputs[0], -1, -1]

    report = tflite_export.verify(None, changed(blob, hollow), samples=1)
    assert all(part.problem is not None for part in report.runtimes)


def test_an_endless_file_is_given_up(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unknown_writer, "TIMEOUT_SECONDS", 0.01)
    report = tflite_export.verify(None, blob, runtimes=LITERT, samples=1)
    assert all("it may never end" in str(part.problem) for part in report.runtimes)


def test_outputs_without_a_batch_are_compared() -> None:
    """LiteRT's samples were joined along their first axis, TFLite Micro's were not."""
    whole = tf.function(lambda x: tf.reduce_max(x, axis=0) * 2.0)
    spec = whole.get_concrete_function(tf.TensorSpec((1, 4), tf.float32))
    blob = tf.lite.TFLiteConverter.from_concrete_functions([spec], whole).convert()
    report = tflite_export.verify(None, blob, samples=3)
    assert [part.problem for part in report.runtimes] == [None] * 3
    assert all(part.outputs[0].equal_fraction == 1 for part in report.runtimes[1:])


def test_outputs_that_are_no_numbers_are_compared() -> None:
    """The logarithm of a negative input: NaN on both sides is no difference, on one side it is."""
    tree = flatbuffer.read(tflite_export.convert(quantized((4,), L.Dense(4))[0]))
    tree.subgraphs[0].tensors[tree.subgraphs[0].outputs[0]].quantization = None
    a, b = np.array([[np.nan, np.inf, 1.0]]), np.array([[np.nan, np.inf, np.nan]])
    assert unknown_writer.agreement_of_runtimes(tree, [a], [a])[0].max_steps == 0
    assert unknown_writer.agreement_of_runtimes(tree, [a], [b])[0].max_steps == 2**31 - 1


@pytest.mark.parametrize("part", ["scale", "zeroPoint"])
def test_a_grid_of_a_damaged_file_is_told(
    net: tuple[keras.Model, np.ndarray], blob: bytes, part: str
) -> None:
    """A zero point that is missing ended in an IndexError, a scale of NaN in a ValueError."""

    def damaged(model: ModelT) -> None:
        graph = model.subgraphs[0]
        grid = graph.tensors[graph.outputs[0]].quantization
        setattr(grid, part, [float("nan")] if part == "scale" else [])

    report = tflite_export.verify(
        net[0], changed(blob, damaged), net[1], samples=1, runtimes=["litert_reference"]
    )
    # The runtime refuses the file, or the report names the value that has no lockstep.
    (found,) = report.runtimes
    assert found.problem is not None or found.unmatched == ("head",)


def test_resources_start_anew_at_every_sample() -> None:
    """LiteRT's child kept them, and TFLite Micro did not."""
    count = tf.Variable(tf.zeros((1, 4)))
    module = tf.Module()
    module.count = count
    module.step = tf.function(lambda x: count.assign_add(x) + 0.0)
    spec = module.step.get_concrete_function(tf.TensorSpec((1, 4), tf.float32))
    blob = tf.lite.TFLiteConverter.from_concrete_functions([spec], module).convert()
    x = np.ones((3, 4), np.float32)
    found = execution.run_litert_apart(
        blob, [x], runtime="litert_reference", timeout_seconds=60, memory_bytes=8 << 30
    )
    np.testing.assert_array_equal(
        found[0], execution.run(blob, [x], runtime="litert_reference").outputs[0]
    )


def test_a_file_without_inputs_is_refused(blob: bytes) -> None:
    alone = changed(blob, lambda model: setattr(model.subgraphs[0], "inputs", []))
    with pytest.raises(ExportError, match="a file that has inputs"):
        tflite_export.verify(None, alone, samples=1)


def test_memory_is_bounded(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def vast(model: ModelT) -> None:
        model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]].shape = [1, 2**20, 2**20, 2]

    with pytest.raises(ExportError, match=r"at most 1,073,741,824 bytes of them\. Received: shape"):
        tflite_export.verify(None, changed(blob, vast), samples=1)


def test_a_child_s_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may ask for any memory while it runs: this one pads its input to 108 MB."""
    blob = tflite_export.convert(quantized((8, 8, 3), L.ZeroPadding2D(1))[0])

    def wider(model: ModelT) -> None:
        graph = model.subgraphs[0]
        paddings = graph.tensors[graph.operators[0].inputs[1]]
        values = np.array([[0, 0], [3000, 3000], [3000, 3000], [0, 0]], np.int32)
        buffer = schema.BufferT()
        buffer.data = values.astype(flatbuffer.tensor_dtype(paddings)).tobytes()
        model.buffers[paddings.buffer] = buffer

    monkeypatch.setattr(unknown_writer, "MEMORY_BYTES", 64 << 20)
    for file, runs in ((blob, True), (changed(blob, wider), False)):
        report = tflite_export.verify(None, file, runtimes=LITERT[:1], samples=1)
        assert (report.on(LITERT[0]).problem is None) == runs


def runs_or_is_refused(damaged: bytes) -> None:
    """`verify` and `to_c` may refuse the bytes by an error of ours; nothing else may happen."""
    try:
        tflite_export.verify(None, damaged, runtimes=["litert_reference"], samples=1)
    except KqatError:
        return


@given(st.data())
@settings(max_examples=60)
def test_damaged_bytes_are_read_or_refused(blob: bytes, data: st.DataObject) -> None:
    damaged = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 8))):
        bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
        damaged[bit // 8] ^= 1 << bit % 8
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        found = tflite_export.inspect(bytes(damaged[:cut] if cut % 2 else damaged))
    except KqatError:
        return
    assert found.macs >= 0


@pytest.mark.slow
@given(st.data())
@settings(max_examples=80)
def test_damaged_files_cannot_take_the_caller_along(blob: bytes, data: st.DataObject) -> None:
    damaged = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 6))):
        bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
        damaged[bit // 8] ^= 1 << bit % 8
    runs_or_is_refused(bytes(damaged))


def test_vast_models_are_refused_before_anything(
    net: tuple[keras.Model, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("the converter was called")

    monkeypatch.setattr(exporter, "lower", never)
    monkeypatch.setattr(exporter, "LARGEST_BYTES", 1000)
    with pytest.raises(ExportError, match=r"below 1,000 bytes.*Received: 1,084 bytes in model 'ne"):
        tflite_export.convert(net[0])


def test_empty_values_are_refused() -> None:
    x = keras.Input((4, 0), name="x")
    with pytest.raises(ModelError, match=r"elements in model 'none'.*layer 'head'"):
        kqat.plan(keras.Model(x, L.Dense(2, name="head")(x), name="none"))
    y = keras.Input((4, 3), name="y")
    with pytest.raises(ModelError, match=r"elements in model 'part'.*layer '\w+' from and to shap"):
        kqat.plan(keras.Model(y, L.Flatten()(y[:, 2:2]), name="part"))


@pytest.mark.slow
def test_tflite_micro_is_given_up_too(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tflite_micro")
    monkeypatch.setattr(unknown_writer, "TIMEOUT_SECONDS", 0.01)
    report = tflite_export.verify(None, blob, runtimes=["tflite_micro"], samples=1)
    assert "within 0.01 s" in str(report.on("tflite_micro").problem)
    assert not report.on("tflite_micro").is_right


def test_runtimes_share_the_time(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def note(*args: Any) -> Any:
        given.append(args[-1])
        return [np.zeros((1, 3), np.int8)], None

    monkeypatch.setattr(unknown_writer, "_run", note)
    monkeypatch.setattr(unknown_writer, "TIMEOUT_SECONDS", 90.0)
    tflite_export.verify(None, blob, runtimes=(*LITERT, "tflite_micro"), samples=1)
    assert [round(seconds) for seconds in given] == [30, 45, 90]
