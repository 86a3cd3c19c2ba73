"""Statistics of BatchNormalization from data: plain means, and nothing else changes."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat.base.errors import ModelError
from tests.kqat.training.schedules.models import X, fit, network, quantized, wrapper


@pytest.mark.slow
def test_statistics_are_the_means_over_all_batches() -> None:
    qat = quantized()
    fit(qat)
    before = {v.path: v.numpy() for v in qat.variables}
    kqat.reestimate_batchnorm(qat, X)
    after = {v.path: v.numpy() for v in qat.variables}
    moved = {path.split("/")[-1] for path in before if np.any(before[path] != after[path])}
    assert moved == {"moving_mean", "moving_variance"}
    one = wrapper(qat, "hidden")
    quantizer = next(la for la in qat.layers if isinstance(la, kqat.ActivationQuantizer))
    values = np.asarray(quantizer(X)) @ np.asarray(one.on_grid("kernel"))
    batches = values.reshape(2, 32, -1)
    assert one.normalization is not None
    np.testing.assert_allclose(
        one.normalization.moving_mean, batches.mean(1).mean(0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(one.normalization.moving_variance, batches.var(1).mean(0), rtol=1e-3)
    assert one.normalization.momentum == 0.8 and not one.freeze_statistics


def test_frozen_and_dropped_layers_are_left_as_they_are() -> None:
    """The same statistics with Dropout between, and where they were frozen before."""
    x = keras.Input((6,))
    y = layers.Dropout(0.5)(layers.Dense(8, use_bias=False, name="hidden")(x))
    model = keras.Model(x, layers.ReLU()(layers.BatchNormalization(name="norm")(y)))
    found = []
    for frozen in (False, True):
        qat = kqat.quantize_model(model, calibration_data=X)
        one = wrapper(qat, "hidden")
        assert len(one.between) == 1
        one.freeze_statistics = frozen
        kqat.reestimate_batchnorm(qat, X)
        assert one.freeze_statistics is frozen and len(one.between) == 1
        assert one.normalization is not None
        found.append(np.asarray(one.normalization.moving_variance))
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "callback",
    [lambda: kqat.FreezeBatchNorm(0), kqat.StochasticRounding, lambda: kqat.QuantizeAfter(99)],
    ids=["frozen", "random", "delayed"],
)
def test_what_callbacks_of_the_last_fit_left_does_not_matter(callback: Any) -> None:
    """A frozen flag would keep the statistics, and noise or floats would shift them."""
    qat = quantized()
    fit(qat, callback())
    fresh = keras.models.clone_model(qat)
    fresh.set_weights(qat.get_weights())
    found = []
    for model in (qat, fresh):
        wrapper(model, "hidden").freeze_statistics = False
        kqat.reestimate_batchnorm(model, X)
        norm = wrapper(model, "hidden").normalization
        assert norm is not None
        found.append(np.stack([norm.moving_mean, norm.moving_variance]))
    np.testing.assert_array_equal(*found)


def test_noise_in_the_place_of_rounding_does_not_reach_the_statistics() -> None:
    found = []
    for gradient in ("noise", "identity"):
        keras.utils.set_random_seed(0)
        qat = quantized(kqat.QuantizeConfig(weight_gradient=gradient))
        kqat.reestimate_batchnorm(qat, X)
        norm = wrapper(qat, "hidden").normalization
        assert norm is not None
        found.append(np.asarray(norm.moving_variance))
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_the_callback_does_it_at_the_end_of_fit() -> None:
    qat = quantized()
    fit(qat, kqat.ReestimateBatchNorm(X))
    one = wrapper(qat, "hidden")
    assert one.normalization is not None
    after = np.asarray(one.normalization.moving_mean)
    kqat.reestimate_batchnorm(qat, X)
    np.testing.assert_array_equal(one.normalization.moving_mean, after)


def test_nothing_to_estimate_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Expected a QAT model. Received: 'net', which"):
        kqat.reestimate_batchnorm(network(), X)
    x = keras.Input((6,))
    qat = kqat.quantize_model(keras.Model(x, layers.Dense(2)(x), name="bare"), calibration_data=X)
    with pytest.raises(ModelError, match=r"Expected a BatchNormalization layer in 'bare'. "):
        kqat.reestimate_batchnorm(qat, X)
