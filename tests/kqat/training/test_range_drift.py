"""What training did to ranges is told where a file is made of them."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import kqat

X = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)


def quantized() -> keras.Model:
    keras.utils.set_random_seed(0)
    parts = [keras.Input((6,)), layers.Dense(8, "relu", name="wide"), layers.Dense(3, name="head")]
    return kqat.quantize_model(keras.Sequential(parts, name="net"), calibration_data=X)


@pytest.mark.parametrize("factor", [0.02, 50.0])
def test_ranges_that_left_calibration_are_named(factor: float) -> None:
    qat = quantized()
    quantizers = [la for la in qat.layers if isinstance(la, kqat.ActivationQuantizer)]
    assert [la.label for la in quantizers][-1] == "head"
    for variable in (quantizers[-1].site_low, quantizers[-1].site_high):
        variable.assign(factor * variable)
    with pytest.warns(kqat.CalibrationWarning, match=r"of 'net' .*'head' spanned .*calibrate"):
        kqat.freeze(qat)
    kqat.calibrate(qat, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", kqat.CalibrationWarning)
        kqat.freeze(qat)


def test_ranges_of_recurrences_are_watched_too() -> None:
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(32, 4, 3)).astype(np.float32)
    rnn = layers.SimpleRNN(4, activation=None, name="rnn")
    model = keras.Sequential([keras.Input((4, 3)), rnn])
    qat = kqat.quantize_model(model, calibration_data=x)
    (recurrence,) = [la for la in qat.layers if isinstance(la, kqat.training.QuantizedRecurrence)]
    (state,) = set(recurrence.state_quantizers())
    state.site_high.assign(20.0 * state.site_high)
    with pytest.warns(kqat.CalibrationWarning, match="far away"):
        kqat.freeze(qat)


@pytest.mark.filterwarnings("ignore:No calibration data")
def test_training_without_calibration_is_no_drift() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    qat = kqat.quantize_model(model)
    qat(X, training=True)
    qat(1000.0 * X, training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", kqat.CalibrationWarning)
        kqat.freeze(qat)


NOISE = [layers.Dropout(0.8), layers.SpatialDropout1D(0.8), layers.GaussianDropout(0.8)]


@pytest.mark.parametrize("noise", NOISE, ids=lambda layer: layer.name)
def test_ranges_that_were_trained_behind_noise_are_named(noise: layers.Layer) -> None:
    """Whatever the weights became, noise hides it; without training there is nothing to tell."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 4, 6)).astype(np.float32)
    parts = [keras.Input((4, 6)), layers.Dense(8, "relu"), noise, layers.Dense(3, name="head")]
    qat = kqat.quantize_model(keras.Sequential(parts, name="net"), calibration_data=x)

    def frozen_quietly() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", kqat.CalibrationWarning)
            kqat.freeze(qat)

    frozen_quietly()
    qat(x[:8], training=True)
    with pytest.warns(kqat.CalibrationWarning, match=r"in 'net': .*'head' [\d.]+ times .*fit"):
        kqat.freeze(qat)
    kqat.calibrate(qat, x)
    frozen_quietly()
