"""Files of Keras 2 come into Keras 3, or the error says what to do."""

import json
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
from kqat.base.errors import ModelError


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
    with pytest.raises(ModelError, match=r"the folder .*tf_keras"):
        kqat.load_model(tmp_path)
    with pytest.raises(ModelError, match="which is no file"):
        kqat.load_model(tmp_path / "none.keras")
