"""Activations of 16 bits: kernels of each runtime, tables, and files in which widths meet."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from benchmarks.op_probe import APPROXIMATE
from kqat.devices.kernels import INT16, TABLE_OPS, WIDE_TABLE_OPS
from tests.coverage.cases import Case, functional, inputs_of
from tests.tflite_export.small_models import computed, constants, operators, quantized
from tflite_export import flatbuffer
from tflite_export.kernels.op_table import OP_TABLE
from tflite_export.kernels.weight_layout import Weights, fit_bias

IMAGE, VECTOR, SEQUENCE = (6, 6, 4), (17,), (5, 8)


def _with_conv(merge: type[keras.layers.Layer]) -> Callable[[Any], Any]:
    return lambda x: merge()([x, L.Conv2D(4, 1)(x)])


# Operator -> a model that holds it: the shape of its input, and what it computes. Those of
# `benchmarks/op_probe.py` run every row of the table; these are of more than one operator, or are
# used below.
MODELS: dict[str, tuple[tuple[int, ...], Any]] = {
    "CONV_2D": (IMAGE, lambda x: L.Conv2D(5, 3)(x)),
    "DEPTHWISE_CONV_2D": (IMAGE, lambda x: L.DepthwiseConv2D(3)(x)),
    "FULLY_CONNECTED": (VECTOR, lambda x: L.Dense(5)(x)),
    "SUB": (IMAGE, _with_conv(L.Subtract)),
    "MUL": (IMAGE, lambda x: L.Rescaling(-0.3)(_with_conv(L.Multiply)(x))),
    "RELU6": (IMAGE, lambda x: L.ReLU(6.0)(x)),
    "BATCH_MATMUL": (SEQUENCE, lambda x: L.MultiHeadAttention(2, 4)(x, x)),
}
FAST = ("CONV_2D", "SUB")

# Lockstep finds one step at most. Kernels that rescale an int64 sum do it by a number of 15 bits,
# which at the end of the grid is off by up to one step; float32 arithmetic on 24 bits adds less
# than a tenth. Some kernels approximate.
STEPS = {operator: steps for (operator, _), steps in APPROXIMATE.items()}


def test_every_row_is_in_the_op_table() -> None:
    assert set(INT16) <= set(OP_TABLE)


@pytest.mark.parametrize(
    "operator", [pytest.param(o, marks=[] if o in FAST else pytest.mark.slow) for o in MODELS]
)
def test_kernels_of_each_runtime(operator: str) -> None:
    qat, x = quantized(*MODELS[operator], "int16x8")
    blob = tflite_export.convert(qat)
    model = flatbuffer.read(blob)
    shipped = OP_TABLE[operator].ships_as or operator
    assert shipped in operators(model)
    report = tflite_export.verify(qat, blob, x, runtimes=tflite_export.RUNTIMES)
    ran = {part.runtime for part in report.runtimes if part.problem is None}
    assert ran == INT16[operator].runtimes
    for part in report.runtimes:
        for site in part.sites:
            assert site.max_steps <= STEPS.get(site.operator, 1), (part.runtime, site)
    for name, tensor in computed(model).items():
        assert flatbuffer.tensor_dtype(tensor) == np.int16, name
        assert list(tensor.quantization.zeroPoint) == [0]


@pytest.mark.parametrize("operator", ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"])
def test_weights_are_int8_and_the_bias_int64(operator: str) -> None:
    qat, _ = quantized(*MODELS[operator], "int16x8")
    model = flatbuffer.read(tflite_export.convert(qat))
    (weights, integers), (bias, sums) = constants(model, 0)
    assert (integers.dtype, sums.dtype) == (np.int8, np.int64)
    scale = computed(model)["x"].quantization.scale[0]
    product = np.float64(scale) * weights.quantization.scale
    np.testing.assert_array_equal(bias.quantization.scale, np.float32(product))
    (wrapper,) = (layer for layer in qat.layers if isinstance(layer, kqat.QuantizeWrapper))
    trained = np.float64(wrapper.bias_on_grid())
    np.testing.assert_array_equal(sums, np.rint(trained / product))
    # Training divides in float32, which may fall on the other side of a half.
    exact = np.float64(wrapper.layer.bias) + np.float64(wrapper.correction)
    assert np.abs(sums - exact / product).max() < 0.51


def test_a_bias_beyond_48_bits_coarsens_the_weights() -> None:
    weights = Weights(np.array([[100], [100]], np.int8), np.float32([1e-12, 1e-3]), 0)
    fitted, bias = fit_bias(weights, np.float32([1.0, 1.0]), np.float32(1e-4), 16)
    assert bias.integers[1] == 10**7
    # The enlarged scale is a float32, whose 24 bits leave 2**46 about 2**22 away.
    assert abs(int(bias.integers[0]) - 2**46) <= 2**22
    assert fitted.scale[1] == weights.scale[1]
    narrow, _ = fit_bias(weights, np.float32([1.0, 1.0]), np.float32(1e-4))
    assert narrow.scale[0] > fitted.scale[0] > weights.scale[0]


def test_the_bias_of_a_dead_channel_is_not_multiplied_by_zero() -> None:
    """No kernel has a multiplier below 2**-32, nor a bias behind such a one."""
    weights = Weights(np.array([[0], [100]], np.int8), np.float32([2.0**-40, 1e-3]), 0)
    given, output = np.float32(1e-4), np.float32(2e-4)
    fitted, bias = fit_bias(weights, np.float32([1.0, 1.0]), given, 16, output)
    assert bias.scale[0] >= output * 2.0**-32
    np.testing.assert_allclose(bias.integers * bias.scale.astype(np.float64), 1.0, rtol=1e-6)
    assert fitted.scale[1] == weights.scale[1] and not np.any(fitted.integers[0])


def _network() -> keras.Model:
    def call(x: Any) -> Any:
        x = L.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
        x = L.ReLU(name="stem_relu")(L.BatchNormalization(name="stem_bn")(x))
        y = L.Conv2D(8, 3, padding="same", activation="relu", name="block_1")(x)
        x = L.Add(name="add")([x, y])
        x = L.DepthwiseConv2D(3, padding="same", name="block_2_depthwise")(x)
        x = L.Conv2D(12, 1, name="block_2_pointwise")(L.ReLU(6.0, name="block_2_relu")(x))
        x = L.GlobalAveragePooling2D(name="mean")(L.MaxPooling2D(name="pool")(x))
        return L.Dense(5, name="head")(x)

    return functional((12, 12, 3), call)


def _mlp() -> keras.Model:
    def call(x: Any) -> Any:
        x = L.Dense(64, activation="relu")(x)
        x = L.Dense(32, activation="relu6")(x)
        return L.Dense(5, activation="sigmoid")(x)

    return functional((100,), call)


MIXED = {"stem*": "int8", "block_2*": "w4a8", "head": "int16x8", "block_1": None}


@pytest.mark.parametrize(
    ("build", "policy", "types", "quantizes"),
    [
        (_network, "int16x8", {"int8", "int16", "int32", "int64"}, 0),
        pytest.param(_mlp, "int16x8", {"int8", "int16", "int64"}, 0, marks=pytest.mark.slow),
        pytest.param(
            _network,
            {"block_1": "int16x8"},
            {"int8", "int16", "int32", "int64"},
            2,
            marks=pytest.mark.slow,
        ),
        # Four-bit weights come packed, as uint8. One QUANTIZE more, behind the float layer.
        (_network, MIXED, {"int8", "int16", "int32", "int64", "uint8", "float32"}, 2),
    ],
    ids=["cnn", "mlp", "island", "mixed"],
)
def test_lockstep(build: Any, policy: Any, types: set[str], quantizes: int) -> None:
    model = Case(name="net", build=build, ops={}).model()  # with biases
    x = inputs_of(model, 32)
    plan = kqat.plan(model, policy)
    planned = [layer.kind for layer in plan.layers].count("Requantize") + len(plan.float_layers())
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, x)
    found = [(p.problem, p.max_steps, p.unmatched) for p in report.runtimes]
    # One step, for the reasons beside `STEPS`.
    assert found == [(None, 1, ())] * 3
    assert report.operators.get("QUANTIZE", 0) == planned == quantizes
    assert report.float_operators == (3 if plan.float_layers() else 0)
    tensors = flatbuffer.read(blob).subgraphs[0].tensors
    assert {str(flatbuffer.tensor_dtype(tensor)) for tensor in tensors} == types


@pytest.mark.parametrize("io_type", [None, "int16", "float32"])
def test_inputs_and_outputs(io_type: str | None) -> None:
    qat, x = quantized(*MODELS["FULLY_CONNECTED"], "int16x8")
    blob = tflite_export.convert(qat, inference_input_type=io_type, inference_output_type=io_type)
    graph = flatbuffer.read(blob).subgraphs[0]
    ends = [flatbuffer.tensor_dtype(graph.tensors[t]) for t in (*graph.inputs, *graph.outputs)]
    assert ends == [np.dtype(io_type or "int16")] * 2
    report = tflite_export.verify(qat, blob, x)
    assert [(part.problem, part.max_steps <= 1) for part in report.runtimes] == [(None, True)] * 3


@pytest.mark.parametrize(
    ("policy", "io_type", "own"), [("int16x8", "int8", "int16"), ("int16x8", "uint8", "int16"),
                                   ("int8", "int16", "int8")],
)  # fmt: skip
def test_a_width_that_the_plan_does_not_give_is_refused(
    policy: str, io_type: str, own: str
) -> None:
    qat, _ = quantized(*MODELS["FULLY_CONNECTED"], policy)
    message = f"input 'x' to have the width .*, {own}. Received: .*'{io_type}'. Use '{own}'"
    with pytest.raises(kqat.ExportError, match=message):
        tflite_export.convert(qat, inference_input_type=io_type)


def test_a_target_without_the_kernel_names_the_layer() -> None:
    qat, _ = quantized(IMAGE, lambda x: L.Dense(2)(L.GlobalMaxPooling2D(name="peak")(x)), "int16x8")
    with pytest.raises(kqat.TargetError, match="'peak' needs REDUCE_MAX"):
        tflite_export.convert(qat, target="tflite_micro")
    assert tflite_export.convert(qat, target="litert")


@pytest.mark.parametrize("operator", ["CONV_2D", "FULLY_CONNECTED", "DEPTHWISE_CONV_2D"])
def test_four_bits_are_packed_under_sixteen_where_the_runtime_can(operator: str) -> None:
    weights = kqat.QuantSpec(bits=4, symmetric=True, narrow_range=True, axis="channel")
    wide = kqat.QuantSpec(bits=16, symmetric=True)
    config = kqat.QuantizeConfig(weights=weights, activation=wide)
    qat, x = quantized(*MODELS[operator], config)
    integers = constants(flatbuffer.read(tflite_export.convert(qat)), 0)[0][1]
    assert integers.dtype == np.int8  # TFLite Micro has no such kernel.
    assert np.abs(integers).max() == 7
    blob = tflite_export.convert(qat, target="litert")
    packed = tflite_export.inspect(blob).operators[0].weight_dtype == "int4"
    assert packed == ("litert" in INT16[operator].packed)
    (part,) = tflite_export.verify(qat, blob, x, runtimes=["litert"], samples=16).runtimes
    assert (part.problem, part.max_steps <= 1) == (None, True)


FUNCTIONS = {
    "mish": "mish", "elu": "elu", "hard_silu": "hard_silu", "gelu": "gelu", "exp": "exponential",
    # A jump, which one piece holds as exceptions.
    "jump": lambda x: keras.ops.where(x > 0.3, 1.0, 0.1 * x),
}  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [pytest.param(f, marks=[] if f == "jump" else pytest.mark.slow) for f in FUNCTIONS],
)
def test_a_function_without_a_kernel_ships_as_pieces(function: str) -> None:
    x = np.linspace(-6.0, 6.0, 2**16, dtype=np.float32).reshape(-1, 64)
    model = functional((64,), L.Activation(FUNCTIONS[function], name="odd"))
    qat = kqat.quantize_model(model, "int16x8", calibration_data=x)
    blob = tflite_export.convert(qat)
    found = operators(flatbuffer.read(blob))
    # Three bytes of a base and two of a slope; with exceptions, one of their row and two of each.
    assert set(found) == set(WIDE_TABLE_OPS)
    assert found.count("GATHER") == 5 + 3 * (function == "jump")
    report = tflite_export.verify(qat, blob, x, runtimes=tflite_export.RUNTIMES, samples=1024)
    assert report.is_full_integer
    for part in report.runtimes:
        (site,) = (site for site in part.sites if site.name == "odd")
        # The integers are the same on every runtime, and at most one step from the function.
        # The pieces of the jump, which is straight but for it, happen to meet every value.
        steps = 0 if function == "jump" else 1
        assert (part.problem, part.max_steps, part.unmatched) == (None, steps, ()), part.runtime
        # Values half-way between two steps are told apart: either is right. Measured: 0 to 0.008.
        assert (site.differing - site.ties) / site.elements < 0.02
        assert (site.differing > 0) == (function != "jump")
    exact = tflite_export.convert(qat, target="litert")
    assert operators(flatbuffer.read(exact)) == list(TABLE_OPS)
    (part,) = tflite_export.verify(qat, exact, x, runtimes=["litert"], samples=1024).runtimes
    assert part.max_steps == 0 and len(exact) > 2 * 2**16 > 10 * len(blob)


def test_a_layer_normalization_of_sixteen_bits() -> None:
    qat, x = quantized(SEQUENCE, lambda x: L.LayerNormalization()(x), "int16x8")
    report = tflite_export.verify(qat, tflite_export.convert(qat), x)
    assert report.is_full_integer
    assert [(part.problem, part.max_steps) for part in report.runtimes] == [(None, 1)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("layer", [L.GRU, L.LSTM])
def test_a_recurrence_of_sixteen_bits(layer: type[keras.layers.Layer]) -> None:
    qat, x = quantized(SEQUENCE, lambda x: layer(4, return_sequences=True)(x), "int16x8")
    report = tflite_export.verify(qat, tflite_export.convert(qat), x)
    assert report.is_full_integer
    for part in report.runtimes:
        assert part.problem is None
        for site in part.sites:
            assert site.max_steps <= STEPS.get(site.operator, 1), (part.runtime, site)
