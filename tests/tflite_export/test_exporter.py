"""What `convert` promises about a file's inputs, outputs, names and bytes."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema
from keras import layers as L

import kqat
import tflite_export
from kqat.base.errors import ExportError, FreezeError, LoweringError, ModelError, TargetError
from kqat.devices.kernels import KERNELS, LITERT
from kqat.freezing.frozen_model import FrozenModel
from tests.coverage.cases import inputs_of
from tests.tflite_export.small_models import computed, operators, quantized
from tflite_export import exporter, flatbuffer
from tflite_export.flatbuffer.tree import TensorT
from tflite_export.runtimes.execution import run

INPUTS, OUTPUTS = ("zeta", "alpha"), ("year", "class", "age")
IO_TYPES = ("int8", "uint8", "float32")
DTYPES = {"int8": np.int8, "uint8": np.uint8, "float32": np.float32}


@dataclasses.dataclass(frozen=True)
class Net:
    """Two inputs and three outputs, none in alphabetical order, frozen and in float."""

    qat: keras.Model
    frozen: FrozenModel
    x: list[np.ndarray]
    plain: bytes


@pytest.fixture(scope="module")
def net() -> Net:
    keras.utils.set_random_seed(0)
    zeta, alpha = keras.Input((6, 6, 3), name="zeta"), keras.Input((4,), name="alpha")
    image = L.GlobalAveragePooling2D(name="pool")(L.Conv2D(4, 3, name="conv")(zeta))
    both = L.Concatenate(name="both")([image, L.Dense(4, "relu", name="dense")(alpha)])
    outputs = [
        L.Dense(1, name="year")(both),
        L.Dense(3, "softmax", name="class")(both),
        L.Dense(2, name="age")(alpha),
    ]
    model = keras.Model([zeta, alpha], outputs, name="net")
    x = inputs_of(model, 16)
    qat = kqat.quantize_model(model, calibration_data=x)
    frozen = kqat.freeze(qat)
    return Net(qat, frozen, x, tflite_export.convert(frozen))


def ends(blob: bytes) -> tuple[list[TensorT], list[TensorT]]:
    graph = flatbuffer.read(blob).subgraphs[0]
    return [graph.tensors[i] for i in graph.inputs], [graph.tensors[i] for i in graph.outputs]


def on_grid(x: np.ndarray, tensor: TensorT) -> np.ndarray:
    scale, zero = tensor.quantization.scale[0], tensor.quantization.zeroPoint[0]
    return np.clip(np.floor(x / scale + np.float32(0.5)) + zero, -128, 127).astype(np.int8)


def as_type(integers: np.ndarray, io_type: str, tensor: TensorT) -> np.ndarray:
    """The same values as a file takes or gives them; `tensor` has the int8 grid."""
    if io_type == "int8":
        return integers
    if io_type == "uint8":
        return (integers.astype(np.int16) + 128).astype(np.uint8)
    scale, zero = tensor.quantization.scale[0], tensor.quantization.zeroPoint[0]
    return (integers.astype(np.float32) - np.float32(zero)) * scale


@pytest.mark.parametrize(
    ("input_types", "output_types"),
    [
        *(((kind, kind), (kind, kind, kind)) for kind in IO_TYPES),
        (("uint8", "float32"), ("int8", "float32", "uint8")),
    ],
)
def test_inputs_and_outputs_have_the_types_asked_for(
    net: Net, input_types: tuple[str, ...], output_types: tuple[str, ...]
) -> None:
    blob = tflite_export.convert(
        net.frozen,
        inference_input_type=dict(zip(INPUTS, input_types, strict=True)),
        inference_output_type=dict(zip(OUTPUTS, output_types, strict=True)),
    )
    inner, outer = ends(net.plain), ends(blob)
    for kinds, tensors in zip((input_types, output_types), outer, strict=True):
        assert [flatbuffer.tensor_dtype(t) for t in tensors] == [DTYPES[kind] for kind in kinds]
    integers = [on_grid(x, t) for x, t in zip(net.x, inner[0], strict=True)]
    expected = run(net.plain, integers, runtime="litert_reference").outputs
    feeds = [as_type(*row) for row in zip(integers, input_types, inner[0], strict=True)]
    found = run(blob, feeds, runtime="litert_reference").outputs
    for ours, theirs, kind, tensor in zip(found, expected, output_types, inner[1], strict=True):
        np.testing.assert_array_equal(ours, as_type(theirs, kind, tensor))


def test_one_type_serves_all(net: Net) -> None:
    """By name, or as scripts for TensorFlow's converter have it, which ended in a TypeError."""
    blob = tflite_export.convert(net.frozen, inference_input_type=tf.uint8)
    assert [t.type for t in ends(blob)[0]] == [schema.TensorType.UINT8] * 2
    assert [t.type for t in ends(blob)[1]] == [schema.TensorType.INT8] * 3
    for inner, outer in zip(ends(net.plain)[0], ends(blob)[0], strict=True):
        assert outer.quantization.scale[0] == inner.quantization.scale[0]
        assert outer.quantization.zeroPoint[0] == inner.quantization.zeroPoint[0] + 128


@pytest.mark.parametrize("io_type", IO_TYPES)
def test_order_and_names_are_those_of_the_model(net: Net, io_type: str) -> None:
    blob = tflite_export.convert(
        net.frozen, inference_input_type=io_type, inference_output_type=io_type
    )
    model = flatbuffer.read(blob)
    graph, (signature,) = model.subgraphs[0], model.signatureDefs
    for tensors, entries, names, shapes in (
        (graph.inputs, signature.inputs, INPUTS, [(1, 6, 6, 3), (1, 4)]),
        (graph.outputs, signature.outputs, OUTPUTS, [(1, 1), (1, 3), (1, 2)]),
    ):
        assert tuple(flatbuffer.tensor_name(graph.tensors[i]) for i in tensors) == names
        assert [flatbuffer.tensor_shape(graph.tensors[i]) for i in tensors] == shapes
        assert tuple(entry.name.decode() for entry in entries) == names
        assert [entry.tensorIndex for entry in entries] == list(tensors)


def test_the_signature_runs_by_name(net: Net) -> None:
    integers = [on_grid(x, t) for x, t in zip(net.x, ends(net.plain)[0], strict=True)]
    expected = run(net.plain, integers, runtime="litert").outputs
    runner = litert.Interpreter(model_content=net.plain).get_signature_runner("serving_default")
    found = runner(alpha=integers[1][:1], zeta=integers[0][:1])
    assert set(found) == set(OUTPUTS)
    for name, output in zip(OUTPUTS, expected, strict=True):
        np.testing.assert_array_equal(found[name], output[:1])


def test_a_batch_gives_what_its_samples_give_alone(net: Net) -> None:
    blob = tflite_export.convert(net.frozen, batch_size=4)
    assert [flatbuffer.tensor_shape(t) for t in ends(blob)[0]] == [(4, 6, 6, 3), (4, 4)]
    integers = [on_grid(x, t) for x, t in zip(net.x, ends(net.plain)[0], strict=True)]
    alone, batched = (
        run(b, integers, runtime="litert_reference").outputs for b in (net.plain, blob)
    )
    for one, four in zip(alone, batched, strict=True):
        np.testing.assert_array_equal(one, four)


def test_a_second_conversion_gives_identical_bytes(net: Net) -> None:
    assert tflite_export.convert(net.qat) == net.plain
    assert tflite_export.convert(net.qat) == net.plain


def test_conversion_leaves_the_qat_model_alone(net: Net) -> None:
    before = net.qat.get_config(), [np.array(v) for v in net.qat.variables]
    trainable = [layer.trainable for layer in net.qat.layers]
    tflite_export.convert(net.qat, inference_input_type="uint8")
    assert net.qat.get_config() == before[0]
    assert [layer.trainable for layer in net.qat.layers] == trainable
    for old, new in zip(before[1], net.qat.variables, strict=True):
        np.testing.assert_array_equal(old, new)


def small(seed: int) -> keras.Model:
    x = keras.Input((6, 6, 2), name="image")
    y = L.BatchNormalization(name="norm")(L.Conv2D(3, 3, use_bias=False, name="conv")(x))
    y = L.Dense(2, name="dense")(L.Flatten(name="flat")(L.ReLU(name="relu")(y)))
    model = keras.Model(x, y, name="small")
    random = np.random.default_rng(seed)
    model.set_weights([random.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    data = random.normal(size=(8, 6, 6, 2)).astype(np.float32)
    return kqat.quantize_model(model, calibration_data=data)


def test_a_conversion_sees_weights_and_ranges_as_they_are_now() -> None:
    qat, other = small(1), small(2)
    first, second = tflite_export.convert(qat), tflite_export.convert(other)
    before = [w.copy() for w in qat.get_weights()]
    qat.set_weights(other.get_weights())
    assert tflite_export.convert(qat) == second != first
    qat.set_weights(before)
    assert tflite_export.convert(qat) == first


def test_two_models_are_converted_at_once_as_one_after_the_other() -> None:
    models = [small(1), small(2)]
    alone = [tflite_export.convert(qat) for qat in models]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(tflite_export.convert, models)) == alone


def test_tensors_bear_the_names_of_layers(net: Net) -> None:
    names = {"zeta", "alpha", "conv", "pool", "dense_relu", "both", "year", "class", "age"}
    assert set(computed(flatbuffer.read(net.plain))) == names


def test_the_file_says_who_made_it_and_nothing_untrue(net: Net) -> None:
    model = flatbuffer.read(net.plain)
    assert model.description == b"kqat"
    assert [entry.name for entry in model.metadata] == [b"min_runtime_version"]
    assert len(model.subgraphs) == 1


def test_files_are_saved_as_they_are(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "net.tflite"
    tflite_export.save(net.plain, path)
    assert path.read_bytes() == net.plain
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inference_input_type": "int4"}, r"inference_input_type to be one of.*'int4' for 'zeta'"),
        ({"inference_output_type": {"age": "int8"}}, r"for \['year', 'class', 'age'\].*\['age'\]"),
        ({"inference_input_type": dict.fromkeys("ab", "int8")}, r"for \['zeta', 'alpha'\]"),
        ({"inference_input_type": tf.string}, r"to be one of.*'string' for 'zeta'"),
        ({"inference_output_type": ["int8"]}, r"to be one of.*\['int8'\] for 'year'"),
        ({"batch_size": 0}, r"at least 1\. Received: 0"),
        ({"batch_size": True}, r"at least 1\. Received: True"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(net: Net, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        tflite_export.convert(net.frozen, **options)


@pytest.mark.parametrize(
    ("policy", "argument"),
    [({"stem": None}, "inference_input_type"), ({"head": None}, "inference_output_type")],
)
def test_a_float_end_stays_float(policy: dict[str, None], argument: str) -> None:
    def call(x: Any) -> Any:
        return L.Dense(2, name="head")(L.Dense(4, name="middle")(L.Dense(4, name="stem")(x)))

    qat, _ = quantized((8,), call, policy)
    options: dict[str, Any] = {argument: "int8"}
    with pytest.raises(ExportError, match=f"as the plan leaves.*{argument}='float32'"):
        tflite_export.convert(qat, **options)
    model = flatbuffer.read(tflite_export.convert(qat))
    assert sorted(operators(model))[-1] == ("QUANTIZE" if "stem" in policy else "FULLY_CONNECTED")


def test_only_qat_models_with_ranges_convert() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(2)], name="plain")
    with pytest.raises(ModelError, match=r"a QAT model\. Received: 'plain', which is float"):
        tflite_export.convert(model)
    with pytest.warns(kqat.RangeWarning, match="No calibration data"):
        qat = kqat.quantize_model(model)
    with pytest.raises(FreezeError, match="which has seen none"):
        tflite_export.convert(qat)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_inputs_of_half_precision_ship(dtype: str) -> None:
    """A site takes float32 alone: conversion ended in a TypeError, after training."""
    x = keras.Input((6,), name="x", dtype=dtype)
    qat = kqat.quantize_model(
        keras.Model(x, L.Dense(3, name="y")(x)),
        calibration_data=np.random.default_rng(0).integers(-9, 9, (64, 6)),
    )
    blob = tflite_export.convert(qat)
    data = np.random.default_rng(1).integers(-9, 9, (64, 6)).astype(np.float32)
    found = tflite_export.verify(qat, blob, data, runtimes=["litert_reference"])
    assert found.runtimes[0].is_right and found.runtimes[0].outputs[0].max_steps <= 1


def test_targets_are_checked_before_anything_is_converted(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("the converter was called")

    monkeypatch.setattr(exporter, "lower", never)
    with pytest.raises(TargetError, match=r"the targets \['cmsis_nn', .*Received: 'toaster'"):
        tflite_export.convert(net.frozen, target="toaster")
    monkeypatch.setitem(KERNELS, "MEAN", LITERT)
    with pytest.raises(TargetError, match=r"'tflite_micro'.*Received: layer 'pool' needs MEAN"):
        tflite_export.convert(net.frozen, target="tflite_micro")


def test_a_failure_of_the_converter_is_reported(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def unhappy(self: Any) -> bytes:
        raise RuntimeError("unhappy")

    monkeypatch.setattr(tf.compat.v1.lite.TFLiteConverter, "convert", unhappy)
    with pytest.raises(LoweringError, match=r"'net' to convert\. Received from.*unhappy"):
        tflite_export.convert(net.frozen)


def test_a_file_that_does_not_load_is_never_returned(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_types(model: flatbuffer.ModelT) -> None:
        for tensor in model.subgraphs[0].tensors:
            tensor.type = schema.TensorType.INT16

    monkeypatch.setattr(exporter, "share_constants", without_types)
    with pytest.raises(ExportError, match=r"LiteRT to load the file of 'net'.*a fault of kqat"):
        tflite_export.convert(net.frozen)


def test_no_saved_model_is_written(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a SavedModel was written")

    monkeypatch.setattr(tf.saved_model, "save", never)
    monkeypatch.setattr(keras.export.ExportArchive, "write_out", never)
    assert tflite_export.convert(net.frozen) == net.plain


def test_a_multiplier_that_no_kernel_has_is_refused_by_name() -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, L.Dense(2, name="faint")(inputs))
    qat = kqat.quantize_model(model, calibration_data=inputs_of(model, 16))
    faint = [la for la in qat.layers if isinstance(la, kqat.ActivationQuantizer)][-1]
    faint.site_low.assign([0.0])
    faint.site_high.assign([1e-6])
    with pytest.warns(kqat.CalibrationWarning, match="'faint' spanned"):
        frozen = kqat.freeze(qat)
    with pytest.raises(
        ExportError, match=r"less than 256 steps of the output 'faint'.*leave it float"
    ):
        tflite_export.convert(frozen)
