"""Every value has the grid that training gave it, also where the converter merges layers."""

import keras
import numpy as np
from keras import layers

import kqat
import tflite_export


def test_layers_with_equal_weights_keep_their_grids() -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 6), name="x")
    # As keys and values of an untrained attention: the converter computes one product for both.
    first, second = (layers.Dense(8, use_bias=False, name=name) for name in ("first", "second"))
    keys, values = (layers.Reshape((4, 2, 4))(layer(x)) for layer in (first, second))
    model = keras.Model(x, [layers.ReLU()(keys), layers.Permute((2, 1, 3), name="moved")(values)])
    second.kernel.assign(first.kernel)
    narrow = kqat.QuantizeConfig(activation_range=kqat.Percentile(95.0))
    rows = np.random.default_rng(0).normal(size=(64, 4, 6)).astype(np.float32)
    qat = kqat.quantize_model(model, {"second": narrow}, calibration_data=rows)
    report = tflite_export.verify(qat, tflite_export.convert(qat), rows, samples=2)
    assert report.operators["FULLY_CONNECTED"] == 1
    assert all(part.max_steps <= 1 for part in report.runtimes)
