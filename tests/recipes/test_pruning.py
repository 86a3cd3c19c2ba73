"""Zeros that stay: through pruning, training, QAT and into the file."""

import keras
import numpy as np
import pytest

import kqat
import tflite_export
from recipes import converter, pruning


@pytest.fixture
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 8)),
            keras.layers.Conv2D(32, 3, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.DepthwiseConv2D(3),
            keras.layers.Flatten(),
            keras.layers.Dense(4, activation="softmax"),
        ]
    )


def _samples() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(32, 8, 8, 8)).astype(np.float32), random.integers(0, 4, 32)


def _train(model: keras.Model) -> None:
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    model.fit(*_samples(), verbose=0)


def test_the_smallest_weights_of_large_kernels_go(model: keras.Model) -> None:
    before = [np.array(kernel) for kernel in pruning.kernels(model)]
    depthwise = np.array(model.layers[3].kernel)
    pruning.prune(model, 0.25)
    after = [np.array(kernel) for kernel in pruning.kernels(model)]
    assert [v.size for v in after] == [3 * 3 * 8 * 32, 4 * 4 * 32 * 4]
    for old, new in zip(before, after, strict=True):
        assert (new == 0).mean() == 0.25
        assert np.abs(old[new == 0]).max() <= np.abs(new[new != 0]).min()
        np.testing.assert_array_equal(new[new != 0], old[new != 0])
    np.testing.assert_array_equal(model.layers[3].kernel, depthwise)


def test_zeros_move_unless_they_are_kept(model: keras.Model) -> None:
    pruning.prune(model, 0.5)
    sparse = keras.models.clone_model(model)
    sparse.set_weights(model.get_weights())
    _train(model)
    assert pruning.zero_share(model) < 0.1
    assert not pruning.zeros_are_kept(sparse, model)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["int8", "w4a8"])
def test_kept_zeros_ship(model: keras.Model, policy: str) -> None:
    pruning.prune(model, 0.5)
    pruning.keep_zeros(model)
    _train(model)
    assert pruning.zero_share(model) == 0.5
    assert pruning.zero_share_of_file(converter.float_tflite(model)) == 0.5
    qat = kqat.quantize_model(model, policy, calibration_data=_samples()[0])
    pruning.keep_zeros(qat)
    before = [np.array(kernel) for kernel in pruning.kernels(qat)]
    _train(qat)
    assert pruning.zeros_are_kept(model, qat)
    assert all((b != np.array(k)).any() for b, k in zip(before, pruning.kernels(qat), strict=True))
    # Rounding adds zeros to those that were kept, many on a grid of fifteen levels.
    share = pruning.zero_share_of_file(tflite_export.convert(qat))
    assert 0.5 <= share < (0.52 if policy == "int8" else 0.7)
