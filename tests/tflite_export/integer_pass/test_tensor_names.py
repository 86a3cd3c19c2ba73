"""Tensors are named after their sites, also where the converter joins RESHAPEs and TRANSPOSEs."""

import keras
import numpy as np
from keras import layers

import kqat
import tflite_export

ROWS = np.random.default_rng(0).normal(size=(8, 16, 4)).astype(np.float32)


def test_a_site_behind_a_transposition_is_not_the_tensor_before_it() -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((16, 4), name="x")
    # As windows are put together again: what stands before has the shape of what comes behind.
    y = layers.Dense(4, name="dense")(layers.Reshape((4, 4, 4))(x))
    y = layers.Permute((2, 1, 3))(layers.Reshape((4, 4, 4), name="split")(y))
    y = layers.Reshape((16, 4), name="last")(layers.Reshape((2, 8, 4), name="joined")(y))
    model = keras.Model(x, layers.Add(name="sum")([x, y]))
    qat = kqat.quantize_model(model, calibration_data=ROWS)
    report = tflite_export.verify(qat, tflite_export.convert(qat), ROWS)
    for part in report.runtimes:
        assert part.max_steps <= 1
        assert not part.unmatched


def test_two_transpositions_that_the_file_has_as_one_name_no_tensor_between_them() -> None:
    """As heads of keys: there are as many of them as steps, so that a shape says nothing."""
    keras.utils.set_random_seed(0)
    x = keras.Input((16, 4), name="x")
    heads = layers.Reshape((4, 4, 4), name="heads")(layers.Dense(4, name="dense")(x))
    query = layers.Permute((2, 1, 3), name="query")(heads)
    keys = layers.Permute((2, 1, 3), name="keys")(layers.Reshape((4, 4, 4), name="of_keys")(x))
    keys = layers.Permute((1, 3, 2), name="turned")(keys)
    model = keras.Model(x, keras.ops.matmul(query, keys))
    qat = kqat.quantize_model(model, calibration_data=ROWS)
    report = tflite_export.verify(qat, tflite_export.convert(qat), ROWS)
    for part in report.runtimes:
        assert part.problem is None and part.max_steps <= 1


def test_a_move_that_the_model_has_twice_and_the_file_once() -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((16, 4), name="x")
    first = [layers.Dense(3, name=f"head_{i}")(x[:, 0]) for i in range(2)]
    pooled = [layers.Dense(2, name=f"pool_{i}")(layers.MaxPooling1D(4)(x)) for i in range(2)]
    turned = [layers.Permute((2, 1), name=f"turn_{i}")(x[:, :4]) for i in range(2)]
    model = keras.Model(x, [*first, *pooled, keras.ops.matmul(*turned)])
    qat = kqat.quantize_model(model, calibration_data=ROWS)
    report = tflite_export.verify(qat, tflite_export.convert(qat), ROWS)
    for part in report.runtimes:
        assert part.problem is None and part.max_steps <= 1


def test_a_transposition_that_the_converter_takes_before_a_table() -> None:
    """It stands behind the function in the model; as many steps as channels hide its move."""
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 4), name="x")
    y = layers.Activation("gelu", name="gelu")(layers.Dense(4, name="dense")(x))
    model = keras.Model(x, layers.Dense(3, name="last")(layers.Permute((2, 1), name="turned")(y)))
    data = ROWS[:, :4]
    qat = kqat.quantize_model(model, calibration_data=data)
    blob = tflite_export.convert(qat)
    (part,) = tflite_export.verify(qat, blob, data, runtimes=["litert_reference"]).runtimes
    assert part.max_steps <= 1 and part.unmatched == ()
    assert {site.name: site.operator for site in part.sites}["dense"] == "FULLY_CONNECTED"
