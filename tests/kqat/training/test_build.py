"""From plan to QAT model: names, weights, quantizers, boundaries, and training as the float model.

Weights that lie on their grid already are not moved by rounding, and a quantizer that has seen
nothing lets values pass: such a QAT model must compute and train exactly as the float model.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat import ActivationQuantizer, PrecisionBoundary, QuantizeConfig, QuantizeWrapper, QuantSpec
from kqat.graph.tracer import trace
from kqat.planning.planner import make_plan
from kqat.training import batchnorm
from kqat.training.build import all_layers, is_quantized, wrap

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 6, 6, 3)).astype(np.float32)


def on_grid(model: keras.Model) -> keras.Model:
    """`model` with weights of at most 127 steps of 1/128; every channel has one of 127."""
    for variable in model.weights:
        steps = RNG.integers(-127, 128, variable.shape)
        if "kernel" in variable.path:
            steps[0] = 127
        if "variance" in variable.path:
            steps = np.abs(steps) + 1
        variable.assign(steps / 128)
    return model


def model_of(build: Callable[[Any], Any], name: str = "model") -> keras.Model:
    x = keras.Input((6, 6, 3), name="image")
    return keras.Model(x, build(x), name=name)


def conv(name: str, filters: int = 4, **options: Any) -> layers.Layer:
    return layers.Conv2D(filters, 3, padding="same", name=name, **options)


def norm(name: str = "norm") -> layers.Layer:
    return layers.BatchNormalization(name=name, momentum=0.5)


def network(x: Any) -> Any:
    """Folded and lone BatchNormalization, merged and lone clamps, a residual."""
    y = layers.ReLU(name="relu")(norm("norm1")(conv("conv1", 8, use_bias=False)(x)))
    z = norm("norm2")(layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y))
    y = layers.ReLU(6.0, name="relu6")(layers.Add(name="add")([y, z]))
    y = norm("norm3")(layers.MaxPooling2D(2, name="pool")(y))
    y = layers.GlobalAveragePooling2D(name="mean")(layers.ReLU(name="lone")(y))
    return layers.Dense(3, activation="relu", name="head")(layers.Dropout(0.0, name="drop")(y))


def unseen(model: keras.Model, policy: Any = "int8") -> keras.Model:
    return wrap(make_plan(trace(model), kqat.QuantizePolicy.of(policy), model.name))


def layer_names(model: keras.Model, kind: type[Any] = layers.Layer) -> list[str]:
    return [layer.name for layer in model.layers if isinstance(layer, kind)]


def test_layers_are_named_for_the_users() -> None:
    qat = unseen(model_of(network))
    assert layer_names(qat, QuantizeWrapper) == [
        "quant_conv1",
        "quant_depthwise",
        "quant_norm3",
        "quant_head",
    ]
    assert layer_names(qat, ActivationQuantizer) == [
        "image_quantizer",
        "relu_quantizer",
        "norm2_quantizer",
        "relu6_quantizer",
        "lone_quantizer",
        "mean_quantizer",
        "head_relu_quantizer",
    ]
    assert (qat.name, qat.output_names) == ("model", ["head"])
    assert qat.get_layer("quant_conv1").layer.name == "conv1"
    assert qat.get_layer("quant_conv1").normalization.name == "norm1"


def test_weights_are_copies() -> None:
    model = model_of(network)
    qat = unseen(model)
    inner = [
        part.get_weights()
        for layer in qat.layers
        if isinstance(layer, QuantizeWrapper)
        for part in (layer.layer, layer.normalization)
        if part is not None
    ]
    expected = [layer.get_weights() for layer in model.layers if layer.weights]
    np.testing.assert_equal(inner, expected)
    assert {id(v) for v in qat.variables} & {id(v) for v in model.variables} == set()


def test_what_is_not_trained_stays_untrained() -> None:
    model = model_of(network)
    model.get_layer("conv1").trainable = False
    model.get_layer("norm1").trainable = False
    qat = unseen(model)
    assert len(qat.trainable_variables) == len(model.trainable_variables)
    assert not qat.get_layer("quant_conv1").normalization.trainable


def test_what_was_frozen_thaws_layer_by_layer() -> None:
    """With its learned steps; Keras ignores a flag that is set to what it is."""
    model = model_of(network)
    model.get_layer("conv1").trainable = model.get_layer("norm1").trainable = False
    qat = unseen(model, "w4a8")
    assert not [v.path for v in qat.trainable_variables if "conv1" in v.path or "norm1" in v.path]
    for layer in qat.layers:
        layer.trainable = True
    thawed = {v.path.split("/")[-1] for v in qat.get_layer("quant_conv1").trainable_variables}
    assert thawed == {"kernel_step", "kernel", "gamma", "beta"}


def test_weights_on_the_grid_change_nothing() -> None:
    model = on_grid(model_of(network))
    qat = unseen(model)
    # A folded normalization multiplies the weights, not the sums: some float32 roundings.
    np.testing.assert_allclose(qat(IMAGES), model(IMAGES), rtol=1e-6, atol=1e-6)


def test_structures_and_names_of_inputs_and_outputs_stay() -> None:
    inputs = {name: keras.Input((4,), name=name) for name in ("b", "a")}
    total = layers.Add(name="sum")(list(inputs.values()))
    outputs = {
        "y": layers.Dense(2, name="one")(total),
        "x": total,
        "w": layers.ReLU(name="two")(total),
    }
    qat = unseen(keras.Model(inputs, outputs))
    result = qat({"a": np.ones((2, 4)), "b": np.ones((2, 4))})
    assert {key: value.shape[1] for key, value in result.items()} == {"y": 2, "x": 4, "w": 4}
    assert trace(qat).input_names == ("a", "b")
    assert qat.output_names == ["two", "sum", "one"]


def test_a_nested_model_comes_out_flat_with_paths() -> None:
    inner = model_of(lambda x: norm("norm")(conv("conv", 3)(x)), "inner")
    qat = unseen(model_of(lambda x: inner(inner(x))))
    # One set of weights serves both calls, the normalization behind each folded in.
    assert layer_names(qat, QuantizeWrapper) == ["quant_inner_conv"]
    assert qat.output_names == ["inner"]


def test_names_make_way_for_the_users() -> None:
    def build(x: Any) -> Any:
        y = conv("conv")(x)
        for name in ("quant_conv", "conv_quantizer", "precision_boundary"):
            y = layers.MaxPooling2D(2, 1, "same", name=name)(y)
        return conv("relu_unrounded")(layers.ReLU(name="relu")(y))

    model = on_grid(model_of(build))
    qat = unseen(model, {"precision_boundary": None})
    assert len(set(layer_names(qat))) == len(qat.layers)
    # A folded normalization multiplies the weights, not the sums: some float32 roundings.
    np.testing.assert_allclose(qat(IMAGES), model(IMAGES), rtol=1e-6, atol=1e-6)


def test_both_sides_of_an_island_are_marked_and_each_form_is_made_once() -> None:
    def build(x: Any) -> Any:
        y = conv("a")(x)
        island = [layers.Activation("relu", name=f"float{i}")(y) for i in (1, 2)]
        return [conv("b")(island[0]), conv("c")(island[0]), layers.Add(name="sum")([*island, y])]

    qat = unseen(model_of(build), {"float*": None})
    # One where the integers of `a` become floats, for both readers, and one behind each float.
    assert len(layer_names(qat, PrecisionBoundary)) == 3
    graph = trace(qat)
    names = [node.name for node in graph.nodes]
    rounded = [n for n in names if n.startswith("float1_quantizer")]
    assert len(rounded) == 1


def test_a_rounded_input_is_rounded_for_its_float_readers_too() -> None:
    def build(x: Any) -> Any:
        return [conv("a")(x), conv("b")(x)]

    graph = trace(unseen(model_of(build), {"b": None}))
    producers = graph.producers()
    by_name = {node.name: node for node in graph.nodes}
    boundary = producers[by_name["b_unrounded"].inputs[0]]
    assert isinstance(boundary.layer, PrecisionBoundary)
    assert producers[boundary.inputs[0]].name == "image_quantizer"


def test_layers_of_inner_models_are_found() -> None:
    model = model_of(lambda x: conv("conv")(x))
    qat = unseen(model)
    outer = model_of(lambda x: layers.Flatten(name="flat")(qat(x)))
    assert [layer.name for layer in all_layers(outer)] == [
        "image", "image", "image_quantizer", "quant_conv", "conv_quantizer", "conv", "flat",
    ]  # fmt: skip
    assert is_quantized(qat)
    assert is_quantized(outer)
    assert not is_quantized(model)


def hold_quantizers(qat: keras.Model) -> None:
    for layer in qat.layers:
        if isinstance(layer, ActivationQuantizer):
            layer.trainable = False


def one_step(model: keras.Model) -> dict[str, np.ndarray]:
    """Trains on one batch; weights without what calibration finds, by layer and variable."""
    # Two graphs are compiled apart, to sums in another order; eager code is not.
    model.compile(keras.optimizers.SGD(0.25), "mse", run_eagerly=True)
    model.train_on_batch(IMAGES, np.eye(3, dtype=np.float32)[np.arange(8) % 3])
    return weights_by_name(model)


def weights_by_name(model: keras.Model) -> dict[str, np.ndarray]:
    return {
        "/".join(v.path.split("/")[-2:]): v.numpy()
        for v in model.weights
        if "_quantizer/" not in v.path and not v.path.endswith(("/correction", "/corrected"))
    }


@pytest.mark.parametrize("frozen", ["", "norm1"])
def test_one_training_step_is_the_float_models(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, biases, gamma and beta, and the moving statistics, which have momentum 0.5 here."""
    # The fused kernel adds up in another order; `test_batchnorm` looks at it.
    monkeypatch.setattr(batchnorm, "LEAST_EPSILON", 1.0)
    model = on_grid(model_of(network))
    if frozen:
        model.get_layer(frozen).trainable = False
    qat = unseen(model)
    hold_quantizers(qat)
    before = weights_by_name(model)
    expected, found = one_step(model), one_step(qat)
    np.testing.assert_equal(found, expected)
    moved = {name for name, value in found.items() if not np.array_equal(value, before[name])}
    # A bias before BatchNormalization has no gradient.
    assert set(found) - moved <= {"depthwise/bias", *(n for n in found if frozen and frozen in n)}
    assert ("norm1/moving_mean" in moved) == (not frozen)


def test_a_per_tensor_fold_is_rounded_as_it_ships() -> None:
    """The output is that of the folded weights on one grid for all channels."""
    spec = QuantSpec(bits=8, symmetric=True, narrow_range=True)
    model = on_grid(model_of(lambda x: norm()(conv("conv", 3, use_bias=False)(x))))
    gamma, variance, zeros = np.array([0.5, -2.0, 1.0]), np.array([1.0, 4.0, 0.25]), np.zeros(3)
    model.get_layer("norm").set_weights([gamma, zeros, zeros, variance])
    kernel = model.get_layer("conv").kernel.numpy() * gamma / np.sqrt(variance + 1e-3)
    step = np.abs(kernel).max() / 127
    folded = (np.rint(kernel / step) * step).astype(np.float32)
    expected = keras.ops.conv(IMAGES, folded, padding="same")
    found = unseen(model, QuantizeConfig(weights=spec))(IMAGES)
    # Sums of 27 float32 products in another order; one step of the weights is 0.016.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize", [keras.layers.UpSampling2D(2), keras.layers.Resizing(9, 9)])
def test_a_call_without_training_infers_behind_layers_that_train_by_default(resize: Any) -> None:
    """Keras's Resizing, as which UpSampling2D ships, has `training=True` for a default."""
    qat = unseen(model_of(lambda x: norm()(conv("conv", 3)(resize(x)))))
    again = keras.Model.from_config(qat.get_config())
    again.set_weights(qat.get_weights())
    for model in (qat, again):
        before = weights_by_name(model)
        found = model(IMAGES)
        np.testing.assert_equal(weights_by_name(model), before)
        np.testing.assert_array_equal(found, model(IMAGES, training=False))
        assert np.any(found != model(IMAGES, training=True))
