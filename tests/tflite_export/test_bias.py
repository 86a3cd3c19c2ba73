"""The bias that a QAT layer adds is the one in the file: its values are those of XNNPACK."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers as L

import kqat
import tflite_export

NOISY = keras.initializers.RandomNormal(stddev=0.5, seed=0)
PER_TENSOR = kqat.QuantizeConfig(
    weights=kqat.QuantSpec(bits=8, symmetric=True, narrow_range=True, axis=None)
)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)


def moved(model: keras.Model) -> keras.Model:
    """`model` with statistics, factors of both signs and offsets in its normalizations."""
    draw = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            n = layer.gamma.shape[0]
            gamma = draw.uniform(0.5, 1.5, n) * np.where(draw.random(n) < 0.3, -1, 1)
            gamma[0] = 0.0
            offsets = draw.normal(size=(2, n))
            variance = draw.uniform(0.05, 0.3, n)
            layer.set_weights([gamma, *offsets[not layer.center :], variance])
    return model


def differing(qat: keras.Model, x: np.ndarray) -> float:
    """The share of outputs of the QAT model that are not the file's on XNNPACK."""
    lite = Interpreter(model_content=tflite_export.convert(qat), num_threads=1)
    run = lite.get_signature_runner()
    ((feed_name, feed),) = run.get_input_details().items()
    ((name, end),) = run.get_output_details().items()
    (scale, zero), (out_scale, out_zero) = feed["quantization"], end["quantization"]
    integers = np.clip(np.rint(x / np.float32(scale)) + zero, -128, 127).astype(np.int8)
    found = np.concatenate([run(**{feed_name: row[None]})[name] for row in integers])
    expected = np.rint(qat.predict(x, verbose=0) / out_scale) + out_zero
    return float(np.mean(expected != found))


CASES: dict[str, tuple[tuple[int, ...], Callable[[], list[Any]], Any]] = {
    "depthwise and normalization": (
        (8, 8, 6),
        lambda: [L.DepthwiseConv2D(3, use_bias=False), L.BatchNormalization(), L.ReLU(6.0)],
        "int8",
    ),
    "per tensor and normalization": (
        (8, 8, 6),
        lambda: [L.Conv2D(6, 3, bias_initializer=NOISY), L.BatchNormalization(), L.ReLU()],
        PER_TENSOR,
    ),
    "normalization alone": (
        (8, 8, 6),
        lambda: [L.Conv2D(6, 3, activation="relu"), L.BatchNormalization()],
        "int8",
    ),
    "dense behind what moves": (
        (8, 8, 6),
        lambda: [L.MaxPooling2D(), L.Flatten(), L.Dense(5, bias_initializer=NOISY)],
        "int8",
    ),
    "transposed": (
        (4, 4, 6),
        lambda: [L.Conv2DTranspose(5, 3, use_bias=False), L.BatchNormalization()],
        "int8",
    ),
    "no weights": (
        (8, 8, 6),
        lambda: [L.Conv2D(6, 3, kernel_initializer="zeros", bias_initializer=NOISY)],
        "int8",
    ),
    "a bias far beyond its weights": (
        (8, 8, 6),
        lambda: [L.Conv2D(6, 3, bias_initializer=keras.initializers.Constant(1e6))],
        "int8",
    ),
    "rescaling": ((8, 8, 6), lambda: [L.Rescaling(0.37, 0.61)], "int8"),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_file(name: str) -> None:
    keras.utils.set_random_seed(0)
    shape, parts, policy = CASES[name]
    model = moved(keras.Sequential([keras.Input(shape), *parts()]))
    x = images(*shape)
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    # But for ties of float32 sums: 1 value in 20,000.
    assert differing(qat, x) < 5e-5


def shared() -> keras.Model:
    """A convolution with a bias, called on values of two grids."""
    keras.utils.set_random_seed(0)
    inputs, conv = keras.Input((8, 8, 4), name="x"), L.Conv2D(4, 3, bias_initializer=NOISY)
    small = L.Rescaling(0.05)(inputs)
    return keras.Model(inputs, L.Concatenate()([conv(inputs), conv(small)]))


def test_a_shared_layer_rounds_its_bias_for_each_of_its_inputs() -> None:
    x = images(8, 8, 4)
    qat = kqat.quantize_model(shared(), calibration_data=x)
    assert differing(qat, x) < 5e-5


@pytest.mark.slow
def test_a_saved_model_and_a_clone_find_the_grids_again(tmp_path: Path) -> None:
    x = images(8, 8, 4)
    qat = kqat.quantize_model(shared(), calibration_data=x)
    path = tmp_path / "qat.keras"
    qat.save(path)
    clone = keras.models.clone_model(qat)
    clone.set_weights(qat.get_weights())
    expected = qat.predict(x, verbose=0)
    for copy in (keras.models.load_model(path), clone):
        assert len(copy.weights) == len(qat.weights)
        np.testing.assert_array_equal(copy.predict(x, verbose=0), expected)
        assert differing(copy, x) < 5e-5


def test_the_bias_is_trained_straight_through_with_frozen_statistics() -> None:
    keras.utils.set_random_seed(0)
    parts = [L.Conv2D(3, 3, use_bias=False), L.BatchNormalization(), L.ReLU()]
    model = moved(keras.Sequential([keras.Input((8, 8, 4)), *parts]))
    qat = kqat.quantize_model(model, calibration_data=images(8, 8, 4))
    (wrapper,) = [layer for layer in qat.layers if isinstance(layer, kqat.QuantizeWrapper)]
    wrapper.freeze_statistics = True
    before = [np.array(v) for v in qat.trainable_variables]
    qat.compile("sgd", "mse")
    qat.fit(images(8, 8, 4), np.ones((32, 6, 6, 3)), verbose=0)
    for old, variable in zip(before, qat.trainable_variables, strict=True):
        assert np.any(old != np.asarray(variable)), variable.path


def test_the_file_holds_the_bias_that_was_trained() -> None:
    x = images(8, 8, 4)
    model = keras.Sequential([keras.Input((8, 8, 4)), L.Conv2D(3, 3, bias_initializer=NOISY)])
    qat = kqat.quantize_model(model, calibration_data=x)
    (wrapper,) = [layer for layer in qat.layers if isinstance(layer, kqat.QuantizeWrapper)]
    frozen = kqat.freeze(qat)
    (conv,) = [layer for layer in frozen.model.layers if isinstance(layer, L.Conv2D)]
    np.testing.assert_array_equal(conv.bias, wrapper.bias_on_grid())
    step = float(frozen.sites[0].scale) * frozen.weights[0].scale.reshape(-1).astype(np.float64)
    steps = np.asarray(conv.bias, np.float64) / step
    np.testing.assert_allclose(steps, np.rint(steps), rtol=1e-6)
    assert np.any(np.asarray(conv.bias) != np.asarray(wrapper.layer.bias))


@pytest.mark.parametrize("method", [kqat.MaxAbs(), kqat.LearnedStep(), kqat.Ternary()], ids=repr)
def test_the_bias_of_a_channel_without_weights_is_not_rounded(method: Any) -> None:
    """It has no scale of its own: that of one that was never seen would be a coarse grid."""
    model = keras.Sequential([keras.Input((8, 8, 4)), L.Conv2D(3, 3, bias_initializer=NOISY)])
    (conv,) = model.layers
    kernel = np.array(conv.kernel)
    kernel[..., 1] = 0.0
    conv.kernel.assign(kernel)
    spec = kqat.QuantSpec(
        bits=2 if isinstance(method, kqat.Ternary) else 8,
        symmetric=True, narrow_range=True, axis="channel",
    )  # fmt: skip
    config = kqat.QuantizeConfig(weights=spec, weight_step=method)
    qat = kqat.quantize_model(model, config, calibration_data=images(8, 8, 4))
    (wrapper,) = [layer for layer in qat.layers if isinstance(layer, kqat.QuantizeWrapper)]
    exact = wrapper.bias_on_grid() == np.asarray(conv.bias)
    np.testing.assert_array_equal(exact, [False, True, False])


BATCH_STATISTICS: dict[str, Callable[[], list[Any]]] = {
    "fused kernel": lambda: [L.Conv2D(3, 3, bias_initializer=NOISY), L.BatchNormalization()],
    "per tensor": lambda: [L.Conv2D(3, 3, use_bias=False), L.BatchNormalization()],
    "vectors": lambda: [L.Flatten(), L.Dense(3, bias_initializer=NOISY), L.BatchNormalization()],
    "without an offset": lambda: [L.Conv2D(3, 3), L.BatchNormalization(center=False)],
    "dropout between": lambda: [L.Conv2D(3, 3), L.Dropout(0.5, seed=1), L.BatchNormalization()],
    "alone": lambda: [L.BatchNormalization()],
}


@pytest.mark.parametrize("name", BATCH_STATISTICS)
def test_with_batch_statistics_the_error_of_the_bias_that_ships_is_added(name: str) -> None:
    """So the step sees it, though the bias of these statistics never ships."""
    keras.utils.set_random_seed(0)
    # Wide inputs: steps that float32 tells apart.
    x = 100.0 * images(8, 8, 3)
    model = moved(keras.Sequential([keras.Input((8, 8, 3)), *BATCH_STATISTICS[name]()]))
    policy = PER_TENSOR if name == "per tensor" else "int8"
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    wrapper = next(layer for layer in qat.layers if isinstance(layer, kqat.QuantizeWrapper))
    source = qat.layers[1].name
    given = np.asarray(qat.layers[1](x)).reshape(-1, *wrapper.input.shape[1:])
    weights = wrapper.get_weights()

    def outputs(**kwargs: Any) -> np.ndarray:
        wrapper.set_weights(weights)  # Statistics move, and the seed of Dropout.
        y = np.asarray(wrapper(given, training=True, **kwargs), np.float64)
        return y.reshape(-1, y.shape[-1])

    error = (outputs(input_quantizer=source) - outputs()).mean(axis=0)
    wrapper.set_weights(weights)
    norm = wrapper.normalization or wrapper.layer
    factor = 1.0 / np.sqrt(np.float64(norm.moving_variance) + norm.epsilon)
    factor = factor * np.float64(norm.gamma)
    bias = getattr(wrapper.layer, "bias", None)
    start = 0.0 if bias is None else np.float64(bias)
    offset = (start - np.float64(norm.moving_mean)) * factor
    offset += np.float64(norm.beta) if norm.center else 0.0
    # The means that calibration moved are moved with both.
    offset += 0.0 if wrapper.correction is None else np.float64(wrapper.correction)
    expected = np.float64(wrapper.bias_on_grid()) - offset
    assert np.max(np.abs(expected)) > 1e-4
    np.testing.assert_allclose(error, expected, atol=1e-5)


RECURRENT: dict[str, tuple[Callable[[], Any], Any]] = {
    "state": (lambda: L.GRU(4, bias_initializer=NOISY), "int8"),
    "sequence": (
        lambda: L.LSTM(4, bias_initializer=NOISY),
        {L.LSTM: kqat.QuantizeConfig(recurrence="fused")},
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_biases_inside_recurrences_are_on_their_grids(name: str, training: bool) -> None:
    """By what the layers inside see of their biases, in inference and in a training step."""
    keras.utils.set_random_seed(0)
    make, policy = RECURRENT[name]
    x = 50.0 * np.random.default_rng(0).normal(size=(32, 3, 5)).astype(np.float32)
    model = keras.Sequential([keras.Input((3, 5)), make()])
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    (recurrence,) = [la for la in qat.layers if isinstance(la, kqat.training.QuantizedRecurrence)]
    sources = {
        "state": recurrence.state_quantizers()[0],
        "sequence": next(la for la in qat.layers if isinstance(la, kqat.ActivationQuantizer)),
    }
    checked = 0
    seen: dict[str, np.ndarray] = {}
    for wrapper in recurrence.parts.wrappers:
        # A fused LSTM's state has two calls: with what is rounded inside, and without.
        for method in ("call", "rounded"):
            if hasattr(wrapper.layer, method):
                setattr(wrapper.layer, method, noting(wrapper.layer, method, seen))
    scale = float(sources[name].scale())
    recurrence(given_to(recurrence, qat, x), training=training)
    for wrapper in recurrence.parts.wrappers:
        for weight in wrapper.weight_specs:
            bias = getattr(wrapper.layer, weight.removesuffix("kernel") + "bias", None)
            if bias is None or not weight.endswith("kernel"):
                continue
            step = scale * np.asarray(wrapper.scale(weight), np.float64).reshape(-1)
            steps = seen[bias.path] / step
            np.testing.assert_allclose(steps, np.rint(steps), rtol=1e-6, atol=1e-4)
            assert np.any(seen[bias.path] != np.asarray(bias))
            checked += 1
    assert checked >= 1


def noting(layer: Any, method: str, seen: dict[str, np.ndarray]) -> Callable[..., Any]:
    """A method of a layer that also notes the values of the layer's variables by their paths."""
    call = getattr(layer, method)

    def noted(*args: Any, **kwargs: Any) -> Any:
        for v in layer.trainable_variables:
            seen[v.path] = np.array(keras.ops.convert_to_numpy(v.value))
        return call(*args, **kwargs)

    return noted


def given_to(layer: Any, model: keras.Model, x: np.ndarray) -> list[Any]:
    """What a layer of `model` is called with, for the inputs `x`."""
    tensors = keras.Model(model.input, keras.tree.flatten(layer.input))(x)
    return [np.asarray(t) for t in keras.tree.flatten(tensors)]
