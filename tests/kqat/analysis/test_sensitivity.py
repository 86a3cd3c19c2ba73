"""What each layer costs at fewer bits: against models that are quantized so, and by hand."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kqat
from kqat.grids import LearnedStep, MaxAbs


def network() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    keras.utils.set_random_seed(0)
    chain = [
        layers.Conv2D(6, 3, use_bias=False, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.GlobalAveragePooling2D(name="pool"),
        layers.Dense(4, name="head"),
    ]
    model = keras.Sequential([keras.Input((8, 8, 2), name="image"), *chain])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8, 8, 2)).astype(np.float32)
    return model, x, rng.integers(0, 4, 64)


def test_the_noise_of_a_layer_is_that_of_a_model_with_its_weights_rounded() -> None:
    model, x, _ = network()
    found = kqat.sensitivity(model, x, choices=("int8", "w3a8"))
    assert (found.layers, found.choices) == (("conv", "head"), ("int8", "w3a8"))
    assert found.weights == {"conv": 6 * 9 * 2, "head": 24}
    want = model(x).numpy()
    for name, choice, bits, method in (
        ("conv", "w3a8", 3, LearnedStep()),
        ("head", "int8", 8, MaxAbs()),
    ):
        rounded = keras.models.clone_model(model)
        rounded.set_weights(model.get_weights())
        kernel = rounded.get_layer(name).kernel
        axis = len(kernel.shape) - 1
        spec = kqat.QuantSpec(bits=bits, symmetric=True, narrow_range=True, axis=axis)
        step = method.step(kernel.value, spec)
        kernel.assign(method.fake_quantize(kernel.value, step, spec))
        by_hand = np.mean((want - rounded(x).numpy()) ** 2) / np.mean(want**2)
        assert found.cost(name, choice) == pytest.approx(by_hand, rel=1e-3)
    assert "conv" in str(found) and "w3a8" in str(found)


@pytest.mark.slow
def test_the_loss_and_its_hessian_agree_where_errors_are_small() -> None:
    model, x, y = network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # At a minimum of the loss its change has no part that the Hessian does not see.
    model.compile(keras.optimizers.Adam(0.02), loss)
    model.fit(x, y, epochs=1, verbose=0)
    options: dict[str, Any] = {"choices": ("int8", "w4a8"), "loss": loss}
    change = kqat.sensitivity(model, (x, y), measure="loss", **options)
    curved = kqat.sensitivity(model, (x, y), measure="hessian", **options)
    step = LearnedStep()
    kernel = model.get_layer("head").kernel
    spec = kqat.QuantSpec(bits=4, symmetric=True, narrow_range=True, axis=1)
    rounded = step.fake_quantize(kernel.value, step.step(kernel.value, spec), spec)
    before = float(loss(y, model(x)))
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            inner.watch(kernel.value)
            found = loss(y, model(x, training=False))
        gradient = inner.gradient(found, kernel.value)
    hessian = outer.jacobian(gradient, kernel.value).numpy().reshape(24, 24)
    lost = np.asarray(rounded) - np.asarray(kernel)
    by_hand = 0.5 * np.trace(hessian) / 24 * np.sum(lost**2)
    # Random vectors give the trace to about a tenth.
    assert curved.cost("head", "w4a8") == pytest.approx(by_hand, rel=0.3)
    kernel.assign(rounded)
    assert change.cost("head", "w4a8") == pytest.approx(float(loss(y, model(x))) - before, abs=1e-5)


def test_what_is_asked_for_in_vain_is_refused() -> None:
    model, x, _ = network()
    with pytest.raises(kqat.PolicyError, match="Expected measure to be one of"):
        kqat.sensitivity(model, x, measure="psnr")
    with pytest.raises(kqat.PolicyError, match="Expected a loss for"):
        kqat.sensitivity(model, x, measure="loss")
    with pytest.raises(kqat.PolicyError, match="and none for 'sqnr'"):
        kqat.sensitivity(model, x, loss="mse")
    with pytest.raises(kqat.PolicyError, match="at least two presets"):
        kqat.sensitivity(model, x, choices=("int8",))
    with pytest.raises(kqat.PolicyError, match="one of the presets"):
        kqat.sensitivity(model, x, choices=("int8", "w5a8"))
    with pytest.raises(kqat.CalibrationError, match=r"a tuple \(inputs, targets\)"):
        kqat.sensitivity(model, x, measure="loss", loss="mse")
    with pytest.raises(kqat.PolicyError, match="leaves all of them float"):
        kqat.sensitivity(model, x, policy={"conv": None, "head": None})
