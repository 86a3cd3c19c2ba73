"""Files of Keras 2, tf_keras and Keras 3, brought into Keras 3."""

import json
import os
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import keras

from kqat.base import ModelError

# What a Keras 2 config says of a layer and its class of Keras 3 does not know, with the one value
# that means nothing.
_DROPPED: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), ("groups", 1)),
    **dict.fromkeys(("RNN", "SimpleRNN", "GRU", "LSTM"), ("time_major", False)),
}
_FIRST_BYTES = {b"\x89HDF": "h5", b"PK\x03\x04": "zip"}


def load_model(path: str | os.PathLike[str]) -> keras.Model:
    """The float model of a file that Keras 3, Keras 2 or tf_keras wrote, uncompiled.

    What Keras 3 loads itself it loads. In a Keras 2 `.h5` the arguments that its layers have no
    more are left out (`groups` of DepthwiseConv2D), and names may hold `/`, which becomes `_`.

    Args:
        path: a `.keras` or `.h5` file.

    Raises:
        ModelError: if the file does not exist, is of another kind, or holds what Keras 3 cannot
            read; the last line says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(
            f"Expected a .keras or .h5 file. Received: the folder '{path}', as a SavedModel is. "
            f"Load it with tf_keras.models.load_model, save its weights with save_weights('w.h5'), "
            "and load those into the same model built in Keras 3."
        )
    if not path.is_file():
        raise ModelError(f"Expected a .keras or .h5 file. Received: '{path}', which is no file.")
    with path.open("rb") as file:
        kind = _FIRST_BYTES.get(file.read(4))
    if kind is None:
        raise ModelError(
            f"Expected a .keras or .h5 file. Received: '{path}', which is neither. Save the model "
            "with model.save('model.keras')."
        )
    try:
        return _load_h5(path) if kind == "h5" else _load_keras(path)
    except ModelError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise ModelError(
            f"Expected a model that Keras 3 can read. Received: '{path}': {words} Register its own "
            "classes with keras.saving.register_keras_serializable before, or load it in the "
            "Keras that wrote it, save_weights('w.h5'), and load those into the same model built "
            "in Keras 3."
        ) from error


def _load_h5(path: Path) -> keras.Model:
    import h5py

    with tempfile.TemporaryDirectory(prefix="kqat_") as folder:
        copy = Path(folder, "model.h5")
        shutil.copyfile(path, copy)
        with h5py.File(copy, "r+") as file:
            text: Any = file.attrs.get("model_config")
            if text is None:
                raise ModelError(
                    f"Expected a whole model. Received: '{path}', which holds weights alone. "
                    "Build the model, then model.load_weights(path)."
                )
            file.attrs["model_config"] = json.dumps(_translated(json.loads(text)))
        with warnings.catch_warnings():
            # Keras 2 wrote the input shape into a Sequential model's first layer.
            warnings.filterwarnings("ignore", message="Do not pass an `input_shape`")
            return keras.models.load_model(copy, compile=False)


def _load_keras(path: Path) -> keras.Model:
    with zipfile.ZipFile(path) as archive:
        written_by = str(json.loads(archive.read("metadata.json")).get("keras_version", ""))
    if written_by.startswith("2."):
        raise ModelError(
            f"Expected a .keras file of Keras 3. Received: '{path}' of Keras {written_by}, whose "
            "weights lie elsewhere. Load it with tf_keras, save it with model.save('model.h5'), "
            "and give that."
        )
    return keras.models.load_model(path, compile=False)


def _translated(config: Any) -> Any:
    """A Keras 2 config in the words of Keras 3."""
    if isinstance(config, list):
        return [_translated(part) for part in config]
    if not isinstance(config, dict):
        return config
    dropped = _DROPPED.get(str(config.get("class_name")))
    inner = config.get("config")
    if isinstance(inner, dict):
        inner = {key: value for key, value in inner.items() if (key, value) != dropped}
        config = {**config, "config": inner}
    return {key: _translated(_renamed(key, value)) for key, value in config.items()}


def _renamed(key: str, value: Any) -> Any:
    """Names without `/`, in the config of a layer and in the calls that read it."""
    if key == "name" and isinstance(value, str):
        return value.replace("/", "_")
    if key in ("inbound_nodes", "input_layers", "output_layers"):
        return _without_slashes(value)
    return value


def _without_slashes(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_slashes(part) for part in value]
    if isinstance(value, dict):
        return {key: _without_slashes(part) for key, part in value.items()}
    return value.replace("/", "_") if isinstance(value, str) else value
