"""The correction of means that calibration finds beside the ranges."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.training.algorithms import correct_biases, gptq
from kqat.training.weight_wrapper import QuantizeWrapper, uncorrected


def images(count: int, seed: int = 0) -> np.ndarray:
    """Far from zero in the mean, as many sensors' values are, and of unlike brightness."""
    draw = np.random.default_rng(seed)
    brightness = draw.uniform(0.3, 1.7, (count, 1, 1, 1))
    return (draw.uniform(0.5, 1.5, (count, 8, 8, 3)) * brightness).astype(np.float32)


def convolutions() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, bias_initializer="normal")(x)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    return keras.Model(inputs, layers.Dense(4)(x), name="convolutions")


def dense() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = layers.Dense(16, activation="relu")(layers.Flatten()(inputs))
    return keras.Model(inputs, layers.Dense(4)(x), name="dense")


def einsum() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = layers.Reshape((8, 24))(inputs)
    x = layers.EinsumDense("bsf,fhd->bshd", (None, 2, 4), bias_axes="hd")(x)
    x = layers.ReLU()(x)
    x = layers.EinsumDense("bshd,hdf->bsf", (None, 4), bias_axes="f")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(x), name="einsum")


BUILDERS = (convolutions, dense, einsum)
Builder = Callable[[], keras.Model]


def made(build: Builder) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = build()
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(0.5 * np.ones(layer.moving_mean.shape))
    return model


def corrections(qat: keras.Model) -> list[np.ndarray]:
    wrappers = [layer for layer in qat.layers if isinstance(layer, QuantizeWrapper)]
    return [np.asarray(w.correction) for w in wrappers if w.correction is not None]


def mean_error(model: keras.Model, qat: keras.Model, x: np.ndarray) -> float:
    """The mean error of the outputs, over what a step of the output's grid is."""
    error = (np.asarray(qat(x)) - np.asarray(model(x))).mean(axis=0)
    last = [la for la in qat.layers if isinstance(la, kqat.ActivationQuantizer)][-1]
    return float(np.abs(error).max()) / float(last.scale())


@pytest.mark.parametrize("policy", ["int8", "w4a8"])
@pytest.mark.parametrize("build", BUILDERS)
def test_outputs_have_the_means_of_the_float_model(build: Builder, policy: str) -> None:
    model, x = made(build), images(64)
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    # The rounding of the outputs themselves is left.
    assert mean_error(model, qat, x) < 0.5
    found = corrections(qat)
    assert len(found) == len(
        [la for la in model.layers if la.name.count("dense") or "conv" in la.name]
    )
    # So it was no accident.
    with uncorrected(layer for layer in qat.layers if isinstance(layer, QuantizeWrapper)):
        assert mean_error(model, qat, x) > 0.5 or policy == "int8"


@pytest.mark.parametrize("build", BUILDERS)
def test_corrections_do_not_depend_on_order_or_batches(build: Builder) -> None:
    model, x = made(build), images(150)
    order = np.random.default_rng(1).permutation(len(x))
    portions = [x[order][start : start + 7] for start in range(0, len(x), 7)]
    one, other = (kqat.quantize_model(model, calibration_data=d) for d in (x, iter(portions)))
    for a, b in zip(corrections(one), corrections(other), strict=True):
        assert np.any(a)
        np.testing.assert_array_equal(a, b)


def test_the_float_model_comes_back_as_it_was() -> None:
    model = made(convolutions)
    qat = kqat.quantize_model(model, calibration_data=images(40))
    again = kqat.strip(qat)
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("build", BUILDERS)
def test_calibrating_again_corrects_anew(build: Builder) -> None:
    model, x = made(build), images(64)
    once = kqat.quantize_model(model, calibration_data=x)
    twice = kqat.quantize_model(model, calibration_data=3 * x)
    kqat.calibrate(twice, x)
    for one, other in zip(corrections(once), corrections(twice), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("build", (convolutions, dense))
def test_a_trained_model_keeps_its_correction(build: Builder) -> None:
    """Its biases were trained beside it: the means of its float weights are no aim any more."""
    model, x = made(build), images(64)
    qat = kqat.quantize_model(model, "w4a8", calibration_data=x)
    before = corrections(qat)
    qat.compile(keras.optimizers.SGD(0.01), "mse")
    qat.fit(x, np.ones((64, 4)), verbose=0)
    kqat.calibrate(qat, images(64, seed=1))
    for one, other in zip(before, corrections(qat), strict=True):
        np.testing.assert_array_equal(one, other)


def test_saved_models_hold_the_correction_and_older_files_none(tmp_path: Path) -> None:
    model, x = made(dense), images(64)
    qat = kqat.quantize_model(model, calibration_data=x)
    qat.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), qat(x))
    wrapper = next(layer for layer in loaded.layers if isinstance(layer, QuantizeWrapper))
    assert wrapper.is_as_corrected
    wrapper.load_own_variables({})
    assert not wrapper.is_corrected
    assert not np.any(wrapper.correction)


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS)
def test_the_file_has_the_corrected_biases(build: Builder) -> None:
    model, x = made(build), images(64)
    qat = kqat.quantize_model(model, "w4a8", calibration_data=x)
    report = tflite_export.verify(qat, tflite_export.convert(qat), x, runtimes=("litert",))
    assert report.runtimes[0].max_steps <= 1


@pytest.mark.parametrize("algorithm", [gptq, correct_biases])
@pytest.mark.parametrize("build", (convolutions, dense))
def test_algorithms_leave_no_mean_error(build: Builder, algorithm: Any) -> None:
    """Neither doubled nor forgotten: `correct_biases` corrects the biases themselves."""
    model, x = made(build), images(64)
    qat = kqat.quantize_model(model, "w4a8", calibration_data=x)
    assert mean_error(model, algorithm(qat, x), x) < 0.5
