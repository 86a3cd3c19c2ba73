"""Sums that broadcast compute the same for every batch size."""

import keras
import numpy as np
from keras import layers as L

import kqat


def test_a_batch_of_as_many_samples_as_channels_is_like_any_other() -> None:
    """Keras's `Add` would take the one number of each sample for a bias."""
    x = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    image = keras.Input((6,))
    wide, narrow = L.Dense(6)(image), L.Dense(1)(image)
    model = keras.Model(image, [L.Add()([wide, narrow]), L.Add()([narrow, wide])])
    qat = kqat.quantize_model(model, calibration_data=x[:5])
    for whole, part in zip(qat(x, training=False), qat(x[:5], training=False), strict=True):
        # Products of other shapes may round the last bit in another way: a step or two of 0.02.
        np.testing.assert_allclose(whole[:5], part, atol=0.05)
