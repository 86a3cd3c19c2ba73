"""Models whose layers have tfmot `QuantizeConfig`s: planned, trained, shipped, beside tf_keras."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kqat
import tflite_export
from kqat.base.errors import PolicyError
from kqat.graph.tracer import trace
from kqat.grids import arithmetic
from kqat.tfmot.translation import INPUT_CONFIG, translate_policy
from kqat.training.activation_quantizer import ActivationQuantizer
from tests.kqat.tfmot.configs import (
    AnyKernel,
    Config,
    DefaultDenseQuantizeConfig,
    ModifiedDenseQuantizeConfig,
    average,
    fixed,
    tf_keras,
    tfmot,
    weight,
)
from tflite_export import flatbuffer

ROOT = Path(__file__).parents[3]
IMAGES = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype(np.float32)
VECTORS = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
ZEROS = np.zeros((64, 3), np.float32)
KERNEL = Config({"kernel": weight()})
RANGE = Config(output=(average(),))
CONV = Config({"kernel": weight(per_axis=True)}, output=(average(),))


def chain(*parts: Any, shape: tuple[int, ...] = (8, 8, 3)) -> keras.Model:
    return keras.Sequential([keras.Input(shape, name="x"), *parts])


def cnn() -> keras.Model:
    """Convolution, BatchNormalization and ReLU in one kernel; two dense layers; softmax."""
    return chain(
        layers.Conv2D(4, 3, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.MaxPooling2D(name="pool"),
        layers.Flatten(name="flat"),
        layers.Dropout(0.1, name="drop"),
        layers.Dense(4, activation="relu", name="hidden"),
        layers.Dense(3, activation="softmax", name="head"),
    )


def ranges(plan: kqat.Plan) -> dict[str, Any]:
    return {group.name.removesuffix("_quantizer"): group.range_method for group in plan.groups}


def kernels(blob: bytes) -> list[np.ndarray]:
    """The integers of the weights of the dense layers, in order."""
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    stored = [
        flatbuffer.tensor_data(model, graph.tensors[operator.inputs[1]])
        for operator in graph.operators
        if flatbuffer.op_name(model, operator) == "FULLY_CONNECTED"
    ]
    return [unpacked(data) if data.dtype == np.uint8 else data for data in stored]


def unpacked(data: np.ndarray) -> np.ndarray:
    """Four-bit integers, two a byte and the first in the low half, as int8."""
    halves = np.stack([data & 0x0F, data >> 4], axis=-1).reshape(-1).astype(np.int8)
    return np.where(halves > 7, halves - 16, halves)


def test_the_guide_from_annotation_to_file() -> None:
    annotate = kqat.quantize_annotate_layer
    model = chain(
        annotate(layers.Dense(6, activation="relu", name="hidden"), ModifiedDenseQuantizeConfig()),
        annotate(layers.Dense(3, activation="softmax", name="head"), DefaultDenseQuantizeConfig()),
        shape=(8,),
    )
    qat = kqat.quantize_apply(model, calibration_data=VECTORS)
    qat.compile("adam", "mse")
    before = qat.get_layer("quant_hidden").layer.kernel.numpy()
    qat.fit(VECTORS, ZEROS, epochs=2, verbose=0)
    assert np.any(qat.get_layer("quant_hidden").layer.kernel.numpy() != before)
    blob = tflite_export.convert(qat)
    hidden, head = kernels(blob)
    assert np.abs(hidden).max() == 7
    assert np.abs(head).max() == 127
    report = tflite_export.verify(qat, blob, VECTORS, runtimes=("litert_reference",))
    # DESIGN: an operator fed the very integers of the file differs by one step at most.
    assert report.runtimes[0].max_steps <= 1


def test_a_default_speaks_about_every_layer() -> None:
    plan = kqat.plan(cnn(), AnyKernel(output=(average(),)))
    assert plan.float_layers() == ()
    assert {layer.name for layer in plan.layers if layer.weights} == {"conv", "hidden", "head"}
    observed = dict.fromkeys(("x", "relu", "hidden_relu", "head"), kqat.MovingAverage(0.999))
    assert ranges(plan) == {**observed, "head_softmax": kqat.Fixed(0.0, 255 / 256)}


def test_a_default_is_not_asked_about_layers_without_an_operator() -> None:
    model = chain(layers.Dense(4), layers.Dropout(0.1), layers.Dense(3), shape=(8,))
    assert kqat.plan(model, DefaultDenseQuantizeConfig()).float_layers() == ()


def test_weights_without_a_quantizer_stay_float_whatever_follows() -> None:
    model = chain(layers.Dense(4, name="d"), layers.ReLU(name="relu"), shape=(8,))
    plan = kqat.plan(model, {"d": Config(), "relu": RANGE})
    assert plan.float_layers() == ("d",)
    # A sum has no weights: it joins the kernel that the quantized ReLU ends.
    x = keras.Input((8,), name="x")
    model = keras.Model(x, layers.ReLU(name="relu")(layers.Add(name="sum")([x, x])))
    assert kqat.plan(model, {"sum": Config(), "relu": RANGE}).float_layers() == ()


def test_a_kernel_of_several_layers_needs_one_quantizer_at_its_end() -> None:
    model = cnn()
    policy = {"conv": KERNEL, "norm": Config(), "relu": RANGE}
    plan = kqat.plan(model, policy)
    assert ranges(plan)["relu"] == kqat.MovingAverage(0.999)
    roles = {layer.name: layer.role for layer in plan.layers}
    assert (roles["conv"], roles["norm"], roles["relu"]) == ("integer", "folded", "clamp")
    with pytest.raises(PolicyError, match="quantizer for the output of layer 'conv'"):
        kqat.plan(model, policy | {"relu": None})
    with pytest.raises(PolicyError, match=r"output of layer 'conv'.* the next layer comes"):
        kqat.plan(model, policy | {"conv": Config({"kernel": weight()}, output=(fixed(0, 1),))})


@pytest.mark.parametrize("shared", ["norm", "conv"])
def test_layers_called_twice_do_not_fuse(shared: str) -> None:
    x = keras.Input((8, 8, 3), name="x")
    norm = layers.BatchNormalization(name="norm")
    conv, other = layers.Conv2D(3, 1, name="conv"), layers.Conv2D(3, 1, name="other")
    y = norm(conv(x))
    y = norm(other(y)) if shared == "norm" else conv(y)
    model = keras.Model(x, layers.ReLU(name="relu")(y))
    with pytest.raises(PolicyError, match=r"quantizer for the output of layer '(conv|other)'"):
        kqat.plan(model, {"conv": KERNEL, "other": KERNEL, "norm": RANGE})


def test_operations_have_outputs_like_layers() -> None:
    x = keras.Input((8,), name="x")
    y = layers.Dense(8, name="d")(x)
    model = keras.Model(x, keras.ops.relu(x + y))
    plan = kqat.plan(model, AnyKernel(output=(average(),)))
    assert plan.float_layers() == ()
    assert ranges(plan)["relu"] == kqat.MovingAverage(0.999)
    assert kqat.plan(model, Config()).float_layers() == ("d", "add", "relu")
    with pytest.raises(PolicyError, match=r"layer 'add' of type Add: another layer comes"):
        kqat.plan(model, {"d": CONV, "add": Config(output=(fixed(0, 1),))})
    with pytest.raises(PolicyError, match=r"layer 'relu' of type Relu has in Keras 3: neither"):
        kqat.plan(model, DefaultDenseQuantizeConfig())


def test_first_match_decides() -> None:
    four = Config({"kernel": weight(num_bits=4)}, output=(average(),))
    eight = Config({"kernel": weight()}, output=(average(),))
    own = kqat.QuantizeConfig(weights=kqat.QuantSpec(bits=5, symmetric=True))
    rules = (("x", "int8"), ("head", four), (layers.Dense, own), ("h*", eight), (layers.GRU, four))
    graph = trace(cnn())
    policy = translate_policy(kqat.QuantizePolicy(rules=rules), graph)
    by_name = {node.name: policy.match(node.name, node.layer) for node in graph.nodes}
    assert policy.rules[by_name["head"]][1].weights["kernel"].bits == 4
    assert policy.rules[by_name["hidden"]][1] is own
    assert by_name["conv"] is None
    assert policy.default == kqat.QuantizeConfig()
    plan = kqat.plan(cnn(), kqat.QuantizePolicy(rules=rules))
    assert plan.unused_rules == ("h*", str(layers.GRU))


def test_a_policy_without_tfmot_stays_itself() -> None:
    assert translate_policy(policy := kqat.QuantizePolicy(), trace(cnn())) is policy


def test_model_inputs_have_a_quantizer_of_their_own() -> None:
    config = Config({"kernel": weight()}, output=(fixed(-1, 1),))
    model = chain(layers.Dense(3, name="first"), layers.Dense(3, name="second"), shape=(8,))
    assert ranges(kqat.plan(model, config))["x"] == INPUT_CONFIG.activation_range
    # A rule of ours for the input still counts.
    mine = kqat.QuantizeConfig(activation_range=kqat.Fixed(-3.0, 3.0))
    assert ranges(kqat.plan(model, {"x": mine, "*": config}))["x"] == kqat.Fixed(-3.0, 3.0)


def test_a_given_range_behind_a_float_layer_is_refused() -> None:
    model = chain(layers.Dense(3, name="first"), layers.Dense(3, name="second"), shape=(8,))
    config = Config({"kernel": weight()}, output=(fixed(-1, 1),))
    with pytest.raises(PolicyError, match=r"output of layer 'second'.* of the float layer 'first'"):
        kqat.plan(model, {"first": None, "second": config})


def test_a_shared_scale_takes_no_second_quantizer() -> None:
    model = chain(layers.Conv2D(3, 3, name="conv"), layers.MaxPooling2D(name="pool"))
    policy = {"conv": CONV, "pool": RANGE}
    assert set(ranges(kqat.plan(model, policy))) == {"x", "conv"}
    with pytest.raises(PolicyError, match=r"quantizer of layer 'conv' for the output of .*'pool'"):
        kqat.plan(model, policy | {"pool": Config(output=(fixed(0, 1),))})
    # The same range twice is no contradiction.
    narrow = Config({"kernel": weight()}, output=(fixed(0, 1),))
    plan = kqat.plan(model, {"conv": narrow, "pool": Config(output=(fixed(0, 1),))})
    assert ranges(plan)["conv"] == kqat.Fixed(0.0, 1.0)


def test_a_given_range_is_shipped() -> None:
    config = Config({"kernel": weight()}, output=(fixed(-1, 2),))
    model = chain(layers.Dense(3, activation="relu", name="d"), shape=(8,))
    qat = kqat.quantize_model(model, config, calibration_data=VECTORS)
    outputs = qat.predict(VECTORS, verbose=0)
    step = np.float32(3 / 255)
    # The nudged end of the grid: [-1, 2] has its zero at step 85.
    assert outputs.min() == 0.0
    assert outputs.max() == pytest.approx(170 * step, rel=1e-6)
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, VECTORS, runtimes=("litert_reference",))
    assert report.runtimes[0].max_steps <= 1


@pytest.mark.parametrize("clamp", [None, "relu", "relu6"])
@pytest.mark.parametrize("low", [-4.0, -0.5])
def test_a_symmetric_range_has_its_zero_at_zero(clamp: str | None, low: float) -> None:
    spec = kqat.QuantSpec(symmetric=True)
    quantizer = ActivationQuantizer(spec, kqat.MinMax(), clamp=clamp)
    x = np.linspace(low, 2.0, 1001, dtype=np.float32)
    rounded = np.asarray(quantizer(x, training=True))
    scale, zero_point = arithmetic.nudge(*map(np.float32, quantizer.range()), spec)
    assert zero_point == 0
    wanted = np.clip(x, 0 if clamp else -np.inf, 6 if clamp == "relu6" else np.inf)
    # Half a step, and the float rounding of a division and a product.
    assert np.abs(rounded - wanted).max() <= scale * 0.5001
    assert np.asarray(quantizer(x)).tolist() == rounded.tolist()


def test_a_given_symmetric_range_has_its_zero_at_zero() -> None:
    quantizer = ActivationQuantizer(kqat.QuantSpec(symmetric=True), kqat.Fixed(-1.0, 6.0))
    assert quantizer.range() == pytest.approx((-6 * 128 / 127, 6.0), rel=1e-7)


def test_symmetric_activations_are_shipped_with_zero_point_zero() -> None:
    config = AnyKernel(output=(average(symmetric=True),))
    qat = kqat.quantize_model(cnn(), config, calibration_data=IMAGES)
    sites = {site.name: site.zero_point for site in kqat.freeze(qat).sites}
    # The config speaks of outputs; the input keeps the default grid.
    assert {name for name, zero in sites.items() if zero} - {"x"} == {"head_softmax"}
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, IMAGES, runtimes=("litert_reference",))
    assert report.runtimes[0].max_steps <= 1


@pytest.mark.slow
def test_the_same_object_serves_tfmot_on_tf_keras() -> None:
    config, targets = ModifiedDenseQuantizeConfig(), np.zeros((64, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tf_keras uses what TensorFlow and NumPy deprecate.
        layer = tf_keras.layers.Dense(6, activation="relu", name="hidden")
        layer = tfmot.quantization.keras.quantize_annotate_layer(layer, config)
        theirs = tf_keras.Sequential([tf_keras.layers.Input((8,)), layer])
        with tfmot.quantization.keras.quantize_scope({type(config).__name__: type(config)}):
            theirs = tfmot.quantization.keras.quantize_apply(theirs)
        theirs.compile("sgd", "mse")
        theirs.fit(VECTORS, targets, verbose=0)
    layer = layers.Dense(6, activation="relu", name="hidden")
    ours = chain(kqat.quantize_annotate_layer(layer, config), shape=(8,))
    ours = kqat.quantize_apply(ours, calibration_data=VECTORS)
    ours.compile("sgd", "mse")
    ours.fit(VECTORS, targets, verbose=0)
    for model in (theirs, ours):
        assert model.get_layer("quant_hidden").layer.name == "hidden"
    assert np.abs(kernels(tflite_export.convert(ours))[0]).max() == 7


@pytest.mark.parametrize("bits", [4, 8])
def test_tfmot_rounds_weights_to_the_same_integers(bits: int) -> None:
    kernel = tf.constant(np.random.default_rng(bits).normal(size=(8, 6)), tf.float32)
    state = {"min_var": tf.Variable(0.0), "max_var": tf.Variable(0.0)}
    theirs = weight(num_bits=bits)(kernel, True, state)
    spec = kqat.QuantSpec(bits=bits, symmetric=True, narrow_range=True)
    scale = arithmetic.weight_scale(kernel, spec)
    mine = arithmetic.fake_quantize_weight(kernel, scale, spec)
    assert np.rint(theirs / scale).tolist() == np.rint(mine / scale).tolist()


@pytest.mark.slow
def test_tfmot_is_not_imported_with_kqat() -> None:
    code = "import sys, kqat; print({'tf_keras', 'tensorflow_model_optimization'} & {*sys.modules})"
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, cwd=ROOT, text=True).strip() == "set()"


def test_widths_go_on_through_layers_without_a_quantizer() -> None:
    wide = Config({"kernel": weight()}, output=(average(num_bits=16, symmetric=True),))
    x = keras.Input((4, 4, 2))
    y = layers.ReLU()(layers.Conv2D(2, 1, name="first")(x))
    model = keras.Model(x, layers.Dense(2, name="last")(layers.Flatten()(y)))
    relu = Config(output=(average(num_bits=16, symmetric=True),))
    inside = Config({"kernel": weight()})
    policy = {"first": inside, "re_lu*": relu, "flatten*": Config(), "last": wide}
    decided = kqat.plan(model, policy)
    assert {layer.bits for layer in decided.layers} == {16}
    assert {group.spec.bits for group in decided.groups} == {16}
