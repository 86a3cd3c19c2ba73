"""QAT models whose weights have steps of every kind: trained, frozen, saved, planned."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kqat
from kqat.grids.spec import QuantSpec
from tests.kqat import reference
from tests.kqat.step_cases import CASES, MEAN_ERROR, METHODS, grid, normal


def network(**conv: Any) -> keras.Model:
    chain = [
        layers.Conv2D(6, 3, use_bias=False, name="conv", **conv),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.GlobalAveragePooling2D(name="pool"),
        layers.Dense(4, name="head"),
    ]
    model = keras.Sequential([keras.Input((8, 8, 3), name="image"), *chain], name="net")
    norm = model.get_layer("norm")
    norm.gamma.assign([1.0, -2.0, 0.5, -0.25, 3.0, 1.5])
    norm.moving_variance.assign([1.0, 2.0, 0.1, 0.5, 3.0, 1.0])
    return model


IMAGES = normal((16, 8, 8, 3))
TARGETS = normal((16, 4), 2)


def config(name: str, bits: int, axis: Any = "channel") -> kqat.QuantizeConfig:
    spec = QuantSpec(bits=bits, symmetric=True, narrow_range=bits > 1, axis=axis)
    return kqat.QuantizeConfig(weights=spec, weight_step=METHODS[name][0])


def trained(policy: Any) -> keras.Model:
    """One epoch of two steps."""
    qat = kqat.quantize_model(network(), policy, calibration_data=IMAGES)
    qat.compile(keras.optimizers.SGD(0.05), "mse")
    qat.fit(IMAGES, TARGETS, batch_size=8, verbose=0)
    return qat


def wrappers(qat: keras.Model) -> dict[str, kqat.QuantizeWrapper]:
    found = (layer for layer in qat.layers if isinstance(layer, kqat.QuantizeWrapper))
    return {wrapper.layer.name: wrapper for wrapper in found}


@pytest.mark.parametrize("axis", ["channel", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "bits"), [(n, w[0]) for n, (_, w) in METHODS.items()])
def test_frozen_integers_are_the_trained_ones(name: str, bits: int, axis: Any) -> None:
    qat = trained(config(name, bits, axis))
    frozen = {weight.name: weight for weight in kqat.freeze(qat).weights}
    for layer, wrapper in wrappers(qat).items():
        weight = frozen[f"{layer}/kernel"]
        scale = np.asarray(wrapper.scale("kernel"))
        steps = np.asarray(wrapper.on_grid("kernel")) / scale
        integers = np.rint(steps)
        np.testing.assert_array_equal(
            integers.astype(np.float32) * scale, wrapper.on_grid("kernel")
        )
        if wrapper.normalization is None or wrapper.folds_before("kernel"):
            np.testing.assert_array_equal(weight.integers, integers)
            np.testing.assert_array_equal(weight.scale, scale)
        else:
            gamma = wrapper.normalization.gamma.numpy()
            np.testing.assert_array_equal(weight.integers, integers * np.sign(gamma))
            assert np.all(weight.scale > 0)
        assert weight.bits == bits


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_compiled_training_has_the_integers_that_freeze(name: str, bits: int) -> None:
    """Sums that a compiled step took in another order might choose another integer."""
    wrapper = kqat.QuantizeWrapper(
        layers.Conv2D(6, 3), {"kernel": grid(bits)}, weight_step=METHODS[name][0]
    )
    wrapper.build((None, 8, 8, 16))
    wrapper.take_over([normal((3, 3, 16, 6)), normal((6,))])
    compiled = tf.function(lambda: (wrapper.on_grid("kernel"), wrapper.scale("kernel")))()
    np.testing.assert_array_equal(compiled[0], wrapper.on_grid("kernel"))
    np.testing.assert_array_equal(compiled[1], wrapper.scale("kernel"))


@pytest.mark.parametrize("axis", ["channel", None])
def test_learned_steps_start_at_the_float_weights_and_move(axis: Any) -> None:
    qat = kqat.quantize_model(network(), config("lsq", 4, axis), calibration_data=IMAGES)
    before = {}
    for layer, wrapper in wrappers(qat).items():
        kernel = wrapper.layer.kernel.numpy()
        if wrapper.folds_before("kernel"):
            kernel = kernel * np.asarray(wrapper.fold_factor("kernel"))
        kept = wrapper.weight_specs["kernel"].axis or ()
        expected = reference.learned_start(kernel, kept, 4)
        before[layer] = wrapper.steps["kernel"].numpy()
        np.testing.assert_allclose(before[layer], expected, rtol=MEAN_ERROR)
        assert any(v is wrapper.steps["kernel"] for v in qat.trainable_variables)
    qat.compile(keras.optimizers.SGD(0.05), "mse")
    qat.fit(IMAGES, TARGETS, verbose=0)
    for layer, wrapper in wrappers(qat).items():
        assert np.any(wrapper.steps["kernel"].numpy() != before[layer])


def test_a_step_below_zero_counts_by_its_magnitude() -> None:
    qat = kqat.quantize_model(network(), "w3a8", calibration_data=IMAGES)
    step = wrappers(qat)["head"].steps["kernel"]
    expected = qat(IMAGES).numpy()
    step.assign(-step)
    np.testing.assert_array_equal(qat(IMAGES), expected)
    assert np.all(np.asarray(wrappers(qat)["head"].scale("kernel")) > 0)


def test_steps_stay_where_training_is_switched_off() -> None:
    qat = kqat.quantize_model(network(), "w2a8", calibration_data=IMAGES)
    wrapper = wrappers(qat)["head"]
    wrapper.trainable = False
    before = wrapper.steps["kernel"].numpy()
    qat.compile("sgd", "mse")
    qat.fit(IMAGES, TARGETS, verbose=0)
    np.testing.assert_array_equal(wrapper.steps["kernel"], before)


@pytest.mark.slow
def test_save_and_load_without_custom_objects(tmp_path: Path) -> None:
    qat = trained({"conv": "w2a8", "depthwise": "binary", "head": config("mse", 3)})
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(loaded(IMAGES), qat(IMAGES))
    for model in (qat, loaded):
        model.fit(IMAGES, TARGETS, verbose=0, shuffle=False)
    for a, b in zip(qat.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(kqat.freeze(qat).weights, kqat.freeze(loaded).weights, strict=True):
        np.testing.assert_array_equal(a.integers, b.integers)
        np.testing.assert_array_equal(a.scale, b.scale)


def test_strip_gives_the_trained_float_weights_back() -> None:
    qat = trained("w2a8")
    kernel = wrappers(qat)["head"].layer.kernel.numpy()
    np.testing.assert_array_equal(kqat.strip(qat).get_layer("head").kernel, kernel)


def test_plan_says_how_steps_are_found_and_stored() -> None:
    policy = {"conv": "ternary", "depthwise": "binary", "head": "w3a8"}
    text = str(kqat.plan(network(), policy))
    for found in (
        "2-bit in int4/ch ternary",
        "1-bit in int4/ch binary",
        "3-bit in int4/ch lsq",
        "int4: packed two a byte where the target has the kernel, else stored as int8",
    ):
        assert found in text
    rows = {
        row["name"]: row for row in json.loads(kqat.plan(network(), policy).to_json())["layers"]
    }
    assert rows["head"]["weight_step"] == {"name": "lsq", "start": "mse"}
    assert rows["pool"]["weight_step"] == {"name": "max_abs"}
    assert "int4" not in str(kqat.plan(network()))
    six = QuantSpec(bits=6, symmetric=True, narrow_range=True)
    text = str(kqat.plan(network(), {"head": kqat.QuantizeConfig(weights=six)}))
    assert "6-bit in int8" in text


@pytest.mark.slow
def test_learned_steps_are_float32_under_mixed_precision() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    qat = kqat.quantize_model(network(), "w2a8", calibration_data=IMAGES)
    for wrapper in wrappers(qat).values():
        assert wrapper.steps["kernel"].dtype == "float32"
        assert np.asarray(wrapper.scale("kernel")).dtype == np.float32
    qat.compile("sgd", "mse")
    qat.fit(IMAGES, TARGETS, verbose=0)
