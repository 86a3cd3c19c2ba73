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


def test_a_float_table_of_rows_ships_as_floats() -> None:
    """Its GATHER reads integers without a scale: only what stands behind tells that it is float."""
    ids = keras.Input((3,), dtype="int32", name="ids")
    rows = keras.layers.Embedding(9, 4, name="rows")(ids)
    mean = keras.layers.GlobalAveragePooling1D(name="mean")(rows)
    model = keras.Model(ids, keras.layers.Dense(2)(mean))
    data = np.random.default_rng(0).integers(0, 9, (64, 3)).astype(np.int32)
    qat = kqat.quantize_model(model, {"rows": None, "mean": None}, calibration_data=data)
    blob = tflite_export.convert(qat)
    counts = tflite_export.inspect(blob).counts()
    assert (counts["GATHER"], counts["MEAN"], counts["QUANTIZE"]) == (1, 1, 1)
    (part,) = tflite_export.verify(qat, blob, data, runtimes=["litert"]).runtimes
    assert part.problem is None and part.max_steps <= 1
