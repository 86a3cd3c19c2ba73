"""Files of Keras 2 come into Keras 3, or the error says what to do."""

import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers as L

import kqat
from kqat.base.errors import ModelError
from tests.newer_keras import needs_keras


def test_arguments_and_slashes_of_keras_2_are_brought_along(tmp_path: Path) -> None:
    x = keras.Input((6, 6, 2))
    y = L.DepthwiseConv2D(3, name="block_dw")(x)
    y = L.LSTM(3, name="block_lstm")(L.Reshape((4, 8))(y))
    model = keras.Model(x, L.Dense(2, name="head")(y))
    path = tmp_path / "old.h5"
    model.save(path)
    with h5py.File(path, "r+") as file:
        text = file.attrs["model_config"].replace("block_", "block/")
        config = json.loads(text)
        for layer in config["config"]["layers"]:
            if layer["class_name"] == "DepthwiseConv2D":
                layer["config"]["groups"] = 1
            if layer["class_name"] == "LSTM":
                layer["config"]["time_major"] = False
        file.attrs["model_config"] = json.dumps(config)
    loaded = kqat.load_model(path)
    data = np.random.default_rng(0).normal(size=(4, 6, 6, 2)).astype(np.float32)
    np.testing.assert_array_equal(loaded(data), model(data))
    assert "block_dw" in [layer.name for layer in loaded.layers]


def test_what_cannot_be_brought_is_told(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    model.save_weights(tmp_path / "w.weights.h5")
    (tmp_path / "text.h5").write_text("no model")
    with pytest.raises(ModelError, match="holds weights alone"):
        kqat.load_model(tmp_path / "w.weights.h5")
    with pytest.raises(ModelError, match="which is neither"):
        kqat.load_model(tmp_path / "text.h5")
    with pytest.raises(ModelError, match=r"the folder .* which has no saved_model.pb"):
        kqat.load_model(tmp_path)
    exported = tmp_path / "exported"
    tf.saved_model.save(tf.Module(), str(exported))
    with pytest.raises(ModelError, match=r"holds functions and no layers.* Load the .keras"):
        kqat.load_model(exported)
    with pytest.raises(ModelError, match="which is no file"):
        kqat.load_model(tmp_path / "none.keras")


def images() -> tf_keras.Model:
    old = tf_keras.layers
    x = tf_keras.Input((8, 8, 3))
    y = old.Conv2D(4, 3, name="stem/conv", kernel_regularizer="l2")(x)
    y = old.ReLU(6.0)(old.BatchNormalization(name="stem/bn")(y) + 3.0) / 6.0
    y = tf.concat([tf.nn.relu(y[:, ::2, :, 1:]), 2.0 - y[:, 1::2, :, 1:]], axis=-1)
    y = old.DepthwiseConv2D(3, name="block/dw")(y) * tf.reduce_mean(y, axis=[1, 2], keepdims=True)
    inner = tf_keras.Sequential([old.Input((1, 4, 6)), old.Conv2D(5, 1), old.Flatten()])
    model = tf_keras.Model(x, old.Dense(2, activation="softmax")(inner(y)))
    model.compile("adam", "mse")
    return model


def sequence() -> tf_keras.Model:
    old = tf_keras.layers
    first = old.Bidirectional(old.LSTM(3, return_sequences=True), input_shape=(6, 8))
    return tf_keras.Sequential([first, old.GRU(3), old.Dense(2)])


def attention() -> tf_keras.Model:
    old = tf_keras.layers
    x = tf_keras.Input((6, 8))
    y = old.LayerNormalization()(old.Add()([x, old.MultiHeadAttention(2, 4)(x, x)]))
    return tf_keras.Model(x, old.TimeDistributed(old.Dense(3))(old.SeparableConv1D(4, 3)(y)))


SHAPES = {images: (8, 8, 3), sequence: (6, 8), attention: (6, 8)}


@pytest.mark.parametrize("kind", ["h5", "keras", "model"])
@pytest.mark.parametrize("make", list(SHAPES))
def test_what_tf_keras_saved_computes_the_same(make: Any, kind: str, tmp_path: Path) -> None:
    old = make()
    for variable in old.weights:  # Else a batch norm's would all be alike.
        if len(variable.shape) == 1:
            variable.assign(np.random.default_rng(0).uniform(0.5, 1.5, variable.shape))
    source: Any = old
    if kind != "model":
        source = tmp_path / f"old.{kind}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Keras tells that h5 is old.
            old.save(source)
    loaded = kqat.load_model(source)
    data = np.random.default_rng(1).normal(size=(3, *SHAPES[make])).astype(np.float32)
    np.testing.assert_allclose(loaded(data), np.asarray(old(data)), rtol=1e-5, atol=1e-6)
    if make is images:
        assert {"stem_conv", "stem_bn", "block_dw"} <= {layer.name for layer in loaded.layers}
        assert not loaded.compiled


def test_a_sequential_whose_first_layer_has_the_input_shape(tmp_path: Path) -> None:
    old, path = sequence(), tmp_path / "old.h5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        old.save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        assert config["config"]["layers"].pop(0)["class_name"] == "InputLayer"
        file.attrs["model_config"] = json.dumps(config)
    data = np.ones((2, 6, 8), np.float32)
    np.testing.assert_allclose(kqat.load_model(path)(data), np.asarray(old(data)), rtol=1e-5)


def test_a_saved_model_of_keras_2_is_brought(tmp_path: Path) -> None:
    old = images()
    old.save(tmp_path / "old", save_format="tf")
    data = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    loaded = kqat.load_model(tmp_path / "old")
    np.testing.assert_allclose(loaded(data), np.asarray(old(data)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapper", ["QuantizeWrapperV2", "QuantizeLayer", "PruneLowMagnitude"])
def test_wrappers_of_tfmot_are_told(wrapper: str, tmp_path: Path) -> None:
    """As a file holds them; tfmot is not asked, which may not be installed."""
    made = type(wrapper, (L.Layer,), {"call": lambda self, x: x})
    keras.Sequential([keras.Input((2,)), made()]).save(tmp_path / "m.keras")
    text = f"m.keras', with a {wrapper}. Save it in the Keras that wrote it: the float model"
    with pytest.raises(ModelError, match=text):
        kqat.load_model(tmp_path / "m.keras")


def test_a_function_that_is_not_known_is_named() -> None:
    x = tf_keras.Input((4,))
    model = tf_keras.Model(x, tf_keras.layers.Dense(2)(tf.sort(x)))
    with pytest.raises(ModelError, match=r"Received: 'sort', as layer 'tf.sort'.*keras.ops"):
        kqat.load_model(model)
    model = tf_keras.Model(x, tf.linalg.matmul(x, x, transpose_b=True))
    with pytest.raises(ModelError, match=r"arguments of tf.linalg.matmul.*transpose_b"):
        kqat.load_model(model)


class Own(keras.initializers.Initializer):
    """Nobody registers it, nor the two below."""

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return keras.ops.ones(shape, dtype)


class Decay(keras.regularizers.Regularizer):
    def __call__(self, x: Any) -> Any:
        return keras.ops.sum(x)

    def get_config(self) -> dict[str, Any]:
        return {}


class Positive(keras.constraints.Constraint):
    def __call__(self, w: Any) -> Any:
        return keras.ops.relu(w)


def own_loss(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(y_true - y_pred)


@pytest.mark.parametrize("kind", ["h5", "keras"])
def test_what_a_built_model_needs_no_more_never_stops_it(kind: str, tmp_path: Path) -> None:
    own = {"kernel_initializer": Own(), "bias_initializer": Own()}
    dense = L.Dense(2, name="head", kernel_regularizer=Decay(), bias_constraint=Positive(), **own)
    model = keras.Sequential([keras.Input((3,)), dense])
    model.compile(keras.optimizers.SGD(), loss=own_loss)
    path = tmp_path / f"model.{kind}"
    model.save(path)
    with pytest.warns(kqat.FileWarning, match=r"kernel_regularizer of 'head', bias_constraint of"):
        loaded = kqat.load_model(path)
    data = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(loaded(data), model(data))
    objects = {cls.__name__: cls for cls in (Own, Decay, Positive)}
    kept = kqat.load_model(path, custom_objects=objects)
    assert isinstance(kept.layers[-1].kernel_regularizer, Decay)


@pytest.mark.slow
def test_the_shared_models_load(shared: Path) -> None:
    paths = [path for path in (shared / "models").rglob("*") if path.suffix in (".h5", ".keras")]
    assert paths
    needs_keras("3.14", "a file whose BatchNormalization has renorm")
    for path in paths:
        assert kqat.load_model(path).built
