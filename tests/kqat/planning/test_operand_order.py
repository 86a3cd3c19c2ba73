"""Sums that broadcast compute the same for every batch size."""

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
from kqat.base import UnsupportedLayerError


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


@pytest.mark.parametrize("shape", [(6, 6), (6, 1)])
def test_what_keras_adds_along_another_axis_is_refused_with_the_order_that_is_right(
    shape: tuple[int, ...],
) -> None:
    """It was refused as nothing that the user could know of."""
    x, row = keras.Input(shape), np.arange(6, dtype=np.float32)
    added = row if shape == (6, 1) else row[:, None]
    with pytest.raises(UnsupportedLayerError, match=r"a bias of the ch.*keras\.ops\.add\(y, x"):
        kqat.plan(keras.Model(x, ops.add(x, added)))
    kqat.plan(keras.Model(x, ops.add(added, x)))
