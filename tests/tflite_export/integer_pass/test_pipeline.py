"""The integer pass: what was trained is what ships, and what it cannot place it refuses."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers as L

import kqat
import tflite_export
from kqat.base.errors import LoweringError
from kqat.freezing.frozen_model import FrozenModel
from kqat.grids.site import Site
from kqat.parts.markers import Marker
from tests.tflite_export.small_models import computed, constants, operators, quantized
from tflite_export import flatbuffer
from tflite_export.flatbuffer.tree import ModelT
from tflite_export.integer_pass import pipeline
from tflite_export.integer_pass.draft import Fact, Pass
from tflite_export.kernels.op_table import OP_TABLE

IMAGE = (8, 8, 3)


def frozen_and_file(
    shape: tuple[int, ...], call: Callable[[Any], Any], policy: Any = "int8"
) -> tuple[FrozenModel, ModelT]:
    frozen = kqat.freeze(quantized(shape, call, policy)[0])
    return frozen, flatbuffer.read(tflite_export.convert(frozen))


def grid(tensor: flatbuffer.TensorT) -> tuple[np.float32, int]:
    return tensor.quantization.scale[0], int(tensor.quantization.zeroPoint[0])


def small(x: Any) -> Any:
    x = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(4, 3, name="conv")(x)))
    x = L.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    return L.Dense(5, name="dense")(L.Flatten(name="flatten")(x))


def test_scales_and_zero_points_are_those_of_the_sites() -> None:
    frozen, model = frozen_and_file(IMAGE, small)
    tensors = computed(model)
    # FULLY_CONNECTED flattens its input itself.
    sites = [site for site in frozen.sites if site.name != "flatten"]
    assert set(tensors) == {site.name for site in sites}
    for site in sites:
        assert grid(tensors[site.name]) == (site.scale, site.zero_point)
        assert tensors[site.name].type == schema.TensorType.INT8


def test_weights_are_the_integers_of_training() -> None:
    qat, _ = quantized(IMAGE, small)
    model = flatbuffer.read(tflite_export.convert(qat))
    wrapper = qat.get_layer("quant_depthwise")
    (tensor, data), _ = constants(model, operators(model).index("DEPTHWISE_CONV_2D"))
    scale = np.asarray(wrapper.scale("kernel"))
    # The kernel in training is integers times scale; one multiplication of float32 apart.
    integers = np.rint(np.asarray(wrapper.rounded("kernel")) / scale)
    np.testing.assert_array_equal(data.reshape(integers.shape), integers)
    np.testing.assert_array_equal(tensor.quantization.scale, scale.reshape(-1))
    assert tensor.quantization.quantizedDimension == 3
    assert not np.any(tensor.quantization.zeroPoint)


def test_biases_have_the_product_of_scales() -> None:
    frozen, model = frozen_and_file(IMAGE, small)
    (weights, _), (bias, data) = constants(model, operators(model).index("FULLY_CONNECTED"))
    source = next(site for site in frozen.sites if site.name == "flatten")
    product = np.float64(source.scale) * np.asarray(weights.quantization.scale, np.float64)
    np.testing.assert_array_equal(bias.quantization.scale, product.astype(np.float32))
    assert data.dtype == np.int32


def test_versions_are_those_of_the_int8_kernels() -> None:
    """As in TensorFlow's `lite/tools/versioning/op_version.cc`."""
    _, model = frozen_and_file(IMAGE, small)
    versions = [model.operatorCodes[op.opcodeIndex].version for op in model.subgraphs[0].operators]
    assert dict(zip(operators(model), versions, strict=True)) == {
        "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4
    }  # fmt: skip


def dense(x: Any) -> Any:
    return L.Dense(4)(x)


def transposed(x: Any) -> Any:
    return L.Conv2DTranspose(4, 3)(x)


@pytest.mark.parametrize(
    ("clamp", "shape", "producer", "operator"),
    [
        ("relu", (8,), dense, "FULLY_CONNECTED"),
        ("relu6", (8,), dense, "FULLY_CONNECTED"),
        ("relu", IMAGE, transposed, "TRANSPOSE_CONV"),
        ("relu6", IMAGE, transposed, "TRANSPOSE_CONV"),
    ],
)
def test_clamps_fuse_into_the_producer(
    clamp: str, shape: tuple[int, ...], producer: Callable[[Any], Any], operator: str
) -> None:
    _, model = frozen_and_file(shape, lambda x: L.Activation(clamp)(producer(x)))
    assert operators(model) == [operator]
    options = model.subgraphs[0].operators[0].builtinOptions
    kind = getattr(schema.ActivationFunctionType, clamp.upper())
    assert options.fusedActivationFunction == kind


@pytest.mark.parametrize("clamp", ["relu", "relu6"])
def test_a_clamp_alone_ships_as_relu(clamp: str) -> None:
    """TFLite Micro's RELU6 does not rescale; RELU clamps to the output's range, which ends at 6."""
    _, model = frozen_and_file((8,), lambda x: L.Activation(clamp)(x))
    assert operators(model) == ["RELU"]


def test_moves_before_and_after_a_marker_have_its_grid() -> None:
    """The converter may carry a marker across Flatten, to either side of it."""

    def call(x: Any) -> Any:
        x = L.ReLU(name="relu")(L.Flatten(name="flat")(x))
        return L.Reshape((3, 2))(L.Dense(6, name="dense")(x))

    _, model = frozen_and_file((4, 2), call)
    tensors = computed(model)
    assert operators(model) == ["RESHAPE", "RELU", "FULLY_CONNECTED", "RESHAPE"]
    graph = model.subgraphs[0]
    flat = graph.tensors[graph.operators[0].outputs[0]]
    assert grid(tensors["x"]) == grid(flat)
    assert grid(tensors["dense"]) == grid(tensors["reshape"]) != grid(tensors["x"])


def test_a_layer_that_is_called_twice_has_one_weight_and_two_biases() -> None:
    def call(x: Any) -> Any:
        dense = L.Dense(8, name="dense")
        return dense(L.ReLU()(dense(x)))

    _, model = frozen_and_file((8,), call)
    assert operators(model) == ["FULLY_CONNECTED", "FULLY_CONNECTED"]
    (first, _), (first_bias, _) = constants(model, 0)
    (second, _), (second_bias, _) = constants(model, 1)
    assert first.buffer == second.buffer
    np.testing.assert_array_equal(first.quantization.scale, second.quantization.scale)
    assert not np.array_equal(first_bias.quantization.scale, second_bias.quantization.scale)


def test_a_float_island_stays_as_the_converter_made_it() -> None:
    def call(x: Any) -> Any:
        x = L.Conv2D(4, 3, name="stem")(x)
        return L.Conv2D(4, 1, name="head")(L.Conv2D(4, 3, name="middle")(x))

    _, model = frozen_and_file(IMAGE, call, {"middle": None})
    assert operators(model) == ["CONV_2D", "DEQUANTIZE", "CONV_2D", "QUANTIZE", "CONV_2D"]
    assert [data.dtype for _, data in constants(model, 2)] == [np.float32, np.float32]
    assert [data.dtype for _, data in constants(model, 4)] == [np.int8, np.int32]


def test_a_dead_channel_ships() -> None:
    """Gamma is zero, so the channel is its bias alone, whatever the weights were."""
    qat, x = quantized(IMAGE, lambda x: L.BatchNormalization()(L.Conv2D(4, 3)(x)))
    wrapper = next(la for la in qat.layers if isinstance(la, kqat.QuantizeWrapper))
    norm: Any = wrapper.normalization
    norm.gamma.assign([0.0, 1.0, -1.0, 1e-30])
    norm.beta.assign([0.5, 0.5, 0.5, 0.5])
    report = tflite_export.verify(qat, tflite_export.convert(qat), x)
    assert max(part.max_steps for part in report.runtimes) <= 1


# What a frozen model may be that the pass cannot make integers of.


def sigmoid(x: Any) -> Any:
    return L.Activation("sigmoid", name="gate")(L.MaxPooling2D(name="pool")(x))


def frozen_small(**changes: Any) -> FrozenModel:
    return dataclasses.replace(kqat.freeze(quantized(IMAGE, small)[0]), **changes)


def with_scale(name: str, scale: float) -> FrozenModel:
    frozen = kqat.freeze(quantized(IMAGE, sigmoid)[0])
    sites = tuple(
        dataclasses.replace(site, scale=np.float32(scale)) if site.name == name else site
        for site in frozen.sites
    )
    return dataclasses.replace(frozen, sites=sites)


def test_weights_that_were_never_frozen_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"the frozen model's weights.*which the converter"):
        tflite_export.convert(frozen_small(weights=()))


def test_a_pool_with_two_scales_is_refused() -> None:
    with pytest.raises(LoweringError, match="one scale around MAX_POOL_2D"):
        tflite_export.convert(with_scale("pool", 0.5))


def test_a_kernel_with_a_scale_of_its_own_is_refused_another() -> None:
    with pytest.raises(LoweringError, match=r"from LOGISTIC\. Received: .*'gate'"):
        tflite_export.convert(with_scale("gate", 0.5))


def test_an_operator_without_a_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OP_TABLE, "DEPTHWISE_CONV_2D")
    with pytest.raises(LoweringError, match=r"DEPTHWISE_CONV_2D, which writes '.*add a row"):
        tflite_export.convert(frozen_small())


def test_a_value_without_a_marker_is_refused() -> None:
    x = keras.Input((4,), name="x")
    hidden = L.Dense(4, name="hidden")(Marker("site", 0, name="in")(x))
    y = Marker("site", 1, name="out")(L.Dense(4, name="last")(hidden))
    site = Site("x", np.float32(0.1), 0, 8, (4,))
    frozen = FrozenModel(
        model=keras.Model(x, y),
        sites=(site, dataclasses.replace(site, name="last")),
        weights=(),
        tables=(),
        lstms=(),
        input_names=("x",),
        output_names=("last",),
    )
    with pytest.raises(LoweringError, match=r"a marked tensor\. Received: .*hidden.*without a"):
        tflite_export.convert(frozen)


# The order of the passes.


def unmet(passes: Sequence[Pass]) -> list[str]:
    """The passes that need what does not hold where they stand, and what that is."""
    holds = set(pipeline.START)
    found = []
    for step in passes:
        found += [f"{step.name} needs {fact.name}" for fact in step.needs - holds]
        holds = (holds - step.ends) | step.leaves
    return found + [f"nothing leaves {fact.name}" for fact in pipeline.GOAL - holds]


def test_each_pass_finds_what_it_needs() -> None:
    assert unmet(pipeline.PASSES) == []
    # Each leaves something, and no two the same.
    left = [fact for step in pipeline.PASSES for fact in step.leaves]
    assert all(step.leaves for step in pipeline.PASSES)
    assert sorted(left, key=list(Fact).index) == [f for f in Fact if f not in pipeline.START]


@pytest.mark.parametrize("position", range(len(pipeline.PASSES)))
def test_a_pass_that_is_left_out_is_missed(position: int) -> None:
    passes = [*pipeline.PASSES]
    del passes[position]
    assert unmet(passes)


def test_passes_that_change_places_are_noticed() -> None:
    passes = [*pipeline.PASSES]
    names = [step.name for step in passes]
    types, constants = names.index("convert tensors"), names.index("quantize constants")
    passes.insert(constants, passes.pop(types))
    assert "quantize constants needs FLOAT_TENSORS" in unmet(passes)


def test_a_selection_of_sixteen_bits_ships_as_the_operator_that_has_a_kernel() -> None:
    """The converter writes SELECT, whose only kernel of ours is SELECT_V2's."""
    a, b = keras.Input((6, 4), name="a"), keras.Input((6, 4), name="b")
    model = keras.Model([a, b], keras.ops.where(keras.ops.greater(a, b), a, b))
    x = [np.random.default_rng(i).normal(size=(64, 6, 4)).astype(np.float32) for i in range(2)]
    qat = kqat.quantize_model(model, {"greater*": "int8", "*": "int16x8"}, calibration_data=x)
    blob = tflite_export.convert(qat)
    operators = {operator.name for operator in tflite_export.inspect(blob).operators}
    assert "SELECT_V2" in operators and "SELECT" not in operators
    report = tflite_export.verify(qat, blob, x, samples=8, runtimes=["litert"])
    assert report.on("litert").exact.differing == 0
