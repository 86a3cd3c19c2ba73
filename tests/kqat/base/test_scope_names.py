"""Names that TensorFlow takes for scopes, and models whose inputs have others."""

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.base import ModelError, is_scope_name, scope_name


def test_scope_names_keep_what_tensorflow_takes() -> None:
    for name in ("conv2d_1", "a.b-c>d", "block/conv", "_x"):
        assert is_scope_name(name)
        assert scope_name(name) == name
    for name, expected in (("my input", "my_input"), ("x:0", "x_0"), ("é", "_")):
        assert not is_scope_name(name)
        assert scope_name(name) == expected


def test_inputs_may_have_any_name() -> None:
    """Keras makes no scope of them; 'a b' and 'a_b' are two."""
    names = ("a b", "a_b", "é:0")
    inputs = [keras.Input((4,), name=name) for name in names]
    total = layers.Add()([layers.Dense(3)(x) for x in inputs])
    model = keras.Model(inputs, total)
    x = [np.random.default_rng(i).normal(size=(64, 4)).astype("float32") for i in range(3)]
    qat = kqat.quantize_model(model, calibration_data=x)
    qat.compile("sgd", "mse")
    qat.fit(x, np.zeros((64, 3)), verbose=0)
    blob = tflite_export.convert(qat)
    assert sorted(t.name for t in tflite_export.inspect(blob).inputs) == sorted(names)
    report = tflite_export.verify(qat, blob, x, samples=4, runtimes=["litert_reference"])
    assert report.runtimes[0].is_right
    assert {*names} <= {row.name for row in report.layers}


def test_a_layer_that_tensorflow_cannot_run_is_refused_by_name() -> None:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="my layer")])
    with pytest.raises(ModelError, match=r"'my layer'.*clone_model"):
        kqat.plan(model)
    inside = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")], name="my model")
    with pytest.raises(ModelError, match=r"'my model_dense'.*clone_model"):
        kqat.plan(keras.Sequential([keras.Input((4,)), inside]))
    renamed = keras.models.clone_model(
        model,
        clone_function=lambda layer: type(layer).from_config(
            {**layer.get_config(), "name": scope_name(layer.name)}
        ),
    )
    renamed.set_weights(model.get_weights())
    assert kqat.plan(renamed).layers
