"""Files of Keras 2, tf_keras and Keras 3, brought into Keras 3."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras

from kqat.base import ModelError, RuntimeUnavailableError
from kqat.graph import FUNCTIONAL_MODULE, is_keras_2
from kqat.old_operations import arguments, translated


class FileWarning(UserWarning):
    """A part of a file that the model can do without was left out."""


_KERNEL = dict.fromkeys(("kernel_initializer", "kernel_regularizer", "kernel_constraint"), ...)
# Arguments of Keras 2 that Keras 3 has no more, with the values that may be left out (`...`: all).
_DROPPED: dict[str, dict[str, Any]] = {
    **{key: {"groups": 1} for key in ("DepthwiseConv1D", "DepthwiseConv2D")},
    **{key: {**_KERNEL, "groups": 1} for key in ("SeparableConv1D", "SeparableConv2D")},
    **{key: {"time_major": False} for key in ("RNN", "SimpleRNN", "GRU", "LSTM")},
    "MultiHeadAttention": {
        "query_shape": ...,
        "key_shape": ...,
        "value_shape": ...,
        "softmax_robust_masking": False,
    },
}
# Layers of Keras 2 that Keras 3 has under another name.
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "SyncBatchNormalization": ("BatchNormalization", {"synchronized": True}),
    "ThresholdedReLU": ("ReLU", {}),
}
# What Keras says of a class of tfmot.
_WRAPPED = re.compile(
    "locate class '(Quantize(?:Layer|Wrapper|WrapperV2|Annotate)|PruneLowMagnitude|ClusterWeights)'"
)
_FIRST_BYTES = {b"\x89HDF": "h5", b"PK\x03\x04": "zip"}
_DESERIALIZE: dict[str, Callable[[Any], Any]] = {
    "initializer": keras.initializers.get,
    "regularizer": keras.regularizers.get,
    "constraint": keras.constraints.get,
}


def load_model(
    source: str | os.PathLike[str] | Any, custom_objects: Mapping[str, Any] | None = None
) -> keras.Model:
    """The float model that Keras 3, Keras 2 or tf_keras saved, uncompiled.

    What Keras 3 loads itself it loads. Of Keras 2, layers, TensorFlow functions of common kinds
    (`x + 3.0`, `tf.nn.relu`, slices) and nested models are brought; arguments that layers have no
    more are left out, and a `/` in a name becomes `_`. Optimizers, losses and metrics stay behind.
    So do initializers, regularizers and constraints that nobody registered, of which the latter two
    are warned of.

    Args:
        source: a `.keras` or `.h5` file, the folder of a SavedModel, or a tf_keras model.
        custom_objects: the user's own classes and functions by name, as of
            `keras.saving.load_model`.

    Raises:
        ModelError: if the file does not exist, is of another kind, or holds what Keras 3 cannot
            read; the last line says what to do.
    """
    with keras.saving.custom_object_scope({**(custom_objects or {})}):
        if is_keras_2(source):
            return _from_tf_keras(source)
        if not isinstance(source, str | os.PathLike):
            raise ModelError(
                f"Expected the path of a .keras or .h5 file, or a tf_keras model. Received: "
                f"{type(source).__name__}."
            )
        path = Path(source)
        if path.is_dir():
            return _load_folder(path)
        if not path.is_file():
            raise ModelError(
                f"Expected a .keras or .h5 file. Received: '{path}', which is no file."
            )
        with path.open("rb") as file:
            kind = _FIRST_BYTES.get(file.read(4))
        if kind is None:
            empty = "is empty" if not path.stat().st_size else "is neither"
            raise ModelError(
                f"Expected a .keras or .h5 file. Received: '{path}', which {empty}. Save the "
                "model with model.save('model.keras')."
            )
        _check_undamaged(path, kind)
        with _told(f"'{path}'"):
            return _load_h5(path) if kind == "h5" else _load_keras(path)


def _check_undamaged(path: Path, kind: str) -> None:
    """Checks that the whole file is there and unchanged, as far as its format can tell.

    Raises:
        ModelError: if it is damaged, or an archive of something else than a model.
    """
    try:
        if kind == "h5":
            import h5py

            h5py.File(path, "r").close()
            return
        with zipfile.ZipFile(path) as archive:
            if "config.json" not in archive.namelist():
                raise ModelError(
                    f"Expected a .keras or .h5 file. Received: '{path}', an archive without a "
                    "model in it. Save the model with model.save('model.keras')."
                )
            reason = _fault_of(archive)
    except (OSError, zipfile.BadZipFile) as error:
        reason = str(error)
    if reason:
        raise ModelError(
            f"Expected a whole file. Received: '{path}' of {path.stat().st_size:,} bytes, which is "
            f"damaged: {reason}. Copy it again, or save the model again."
        )


def _fault_of(archive: zipfile.ZipFile) -> str:
    """In which way a Keras archive is not what Keras wrote, or nothing."""
    broken = archive.testzip()
    if broken is not None:
        return f"'{broken}' in it is not what was written"
    names = archive.namelist()
    if not any(name.startswith("model.weights.") for name in names):
        return "it holds no weights"
    for name in ("config.json", "metadata.json"):
        try:
            found = json.loads(archive.read(name))
        except (KeyError, ValueError):
            found = None
        if not isinstance(found, dict):
            return f"'{name}' in it is no JSON of Keras" if name in names else f"it has no '{name}'"
    return ""


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns whatever Keras raises into an error that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        cause: BaseException = error
        while (deeper := cause.__cause__ or cause.__context__) is not None:
            cause = deeper
        text = str(cause)
        if found := _WRAPPED.search(text):
            raise ModelError(
                f"Expected a model without tfmot's wrappers. Received: {what}, with a {found[1]}. "
                "Save it in the Keras that wrote it: the float model from before quantize_model or "
                "quantize_apply, or what strip_pruning or strip_clustering return."
            ) from error
        if "Exception encountered:" in text:  # Keras quotes the whole config between the two.
            begin, _, end = text.partition("Exception encountered:")
            text = f"{begin.split('using config=')[0]} {end}"
        text = text.split("config={")[0].split("Full object config:")[0]
        words = " ".join(text.split())[:300]
        stop = "" if words.endswith((".", "!", "?")) else "."
        raise ModelError(
            f"Expected a model that Keras 3 can read. Received: {what}: {words}{stop} Give classes "
            "and functions of its own as custom_objects, or load it in the Keras that wrote it, "
            "save_weights('w.h5'), and load those into the same model built in Keras 3."
        ) from error


def _load_folder(path: Path) -> keras.Model:
    """The model of a SavedModel, by way of tf_keras."""
    if not (path / "saved_model.pb").is_file():
        raise ModelError(
            f"Expected a .keras or .h5 file, or a SavedModel. Received: the folder '{path}', which "
            "has no saved_model.pb."
        )
    try:
        import tf_keras  # It takes seconds, and no other file needs it.
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"Expected the package tf-keras, which reads SavedModels of Keras 2. Received: "
            f"{error}, for the folder '{path}'. Install it with `pip install 'kqat[tfmot]'`."
        ) from error
    with _told(f"the SavedModel '{path}'"):
        model = tf_keras.models.load_model(path, compile=False)
        if not hasattr(model, "get_config"):
            raise ModelError(
                f"Expected a SavedModel that Keras 2 or tf_keras saved. Received: '{path}', which "
                "holds functions and no layers, as model.export writes it. Load the .keras or .h5 "
                "file that it was made of."
            )
        return _from_tf_keras(model)


def _from_tf_keras(model: Any) -> keras.Model:
    """A tf_keras model, by way of a `.keras` file."""
    with tempfile.TemporaryDirectory(prefix="kqat_") as folder, _told(f"the model '{model.name}'"):
        path = Path(folder, "model.keras")
        model.save(path, save_format="keras")
        return _load_keras(path)


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
            config = _Translation(of_keras_2=True).of(json.loads(text))
            del file.attrs["model_config"]
            file.attrs["model_config"] = json.dumps(config)
        with warnings.catch_warnings():
            # Keras 2 wrote the input shape into a Sequential model's first layer.
            warnings.filterwarnings("ignore", message="Do not pass an `input_shape`")
            return keras.models.load_model(copy, compile=False)


def _load_keras(path: Path) -> keras.Model:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(files["metadata.json"])
    of_keras_2 = _is_of_keras_2(metadata, files["config.json"])
    translation = _Translation(of_keras_2)
    files["config.json"] = json.dumps(translation.of(json.loads(files["config.json"]))).encode()
    if of_keras_2:
        files["metadata.json"] = json.dumps({**metadata, "keras_version": "3.0.0"}).encode()
    with tempfile.TemporaryDirectory(prefix="kqat_") as folder:
        weights = Path(folder, "model.weights.h5")
        if of_keras_2:
            weights.write_bytes(files["model.weights.h5"])
            _rename_parts(weights)
            files["model.weights.h5"] = weights.read_bytes()
        copy = Path(folder, "model.keras")
        with zipfile.ZipFile(copy, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Do not pass an `input_shape`")
            return keras.models.load_model(copy, compile=False)


def _is_of_keras_2(metadata: Mapping[str, Any], config: bytes) -> bool:
    return str(metadata.get("keras_version", "")).startswith("2.") or b"tf_keras." in config


def _rename_parts(path: Path) -> None:
    """Gives the parts of layers, as the query of an attention, the names that Keras 3 knows."""
    import h5py

    with h5py.File(path, "r+") as file:
        groups: list[str] = []
        file.visit(groups.append)
        for name in sorted(groups, key=len, reverse=True):
            parent, _, last = name.rpartition("/")
            if last.startswith("_"):
                file.move(name, f"{parent}/{last.lstrip('_')}")


class _Translation:
    """A saved config as Keras 3 can read it, without what a built model can do without."""

    def __init__(self, of_keras_2: bool):
        self.of_keras_2 = of_keras_2

    def of(self, config: Any) -> Any:
        """The translated config."""
        left_out: list[str] = []
        config = self._settled(config, left_out)
        if left_out:
            warnings.warn(
                f"Left out what Keras cannot make anew: {', '.join(left_out)}. The values of the "
                "model are the same; training it on is not. Give them as custom_objects.",
                FileWarning,
                stacklevel=5,
            )
        return self._translated(config) if self.of_keras_2 else config

    def _settled(self, config: Any, left_out: list[str], layer: str = "") -> Any:
        """`config` without initializers, regularizers and constraints that cannot be made."""
        if isinstance(config, list):
            return [self._settled(part, left_out, layer) for part in config]
        if not isinstance(config, dict):
            return config
        layer = config["name"] if isinstance(config.get("name"), str) else layer
        found = {}
        for key, value in config.items():
            make = _DESERIALIZE.get(key.rsplit("_", 1)[-1])
            if make is None or value is None or not isinstance(value, str | dict):
                found[key] = self._settled(value, left_out, layer)
                continue
            found[key] = value
            try:
                make(value)
            except Exception:  # Whatever a user's own class raises.
                found[key] = "zeros" if make is keras.initializers.get else None
                if make is not keras.initializers.get:
                    left_out.append(f"{key} of '{layer}'")
        return found

    def _translated(self, config: Any) -> Any:
        """A Keras 2 config in the words of Keras 3."""
        if isinstance(config, list):
            return [self._translated(part) for part in config]
        if not isinstance(config, dict):
            return config
        config = _of_keras_3(config)
        return {key: self._translated(_renamed(key, value)) for key, value in config.items()}


def _of_keras_3(config: dict[str, Any]) -> dict[str, Any]:
    """A layer's config with the class, arguments and calls that Keras 3 knows."""
    kind, inner = str(config.get("class_name")), config.get("config")
    if kind in ("TFOpLambda", "SlicingOpLambda"):
        return translated(config)
    if not isinstance(inner, dict):
        return config
    config = {key: value for key, value in config.items() if key != "build_config"}
    dropped = _DROPPED.get(kind, {})
    if kind != "InputLayer":
        dropped = {**dropped, "batch_input_shape": ..., "input_length": ...}
    inner = {k: v for k, v in inner.items() if k not in dropped or dropped[k] not in (..., v)}
    axis = inner.get("axis")
    if kind.endswith("BatchNormalization") and isinstance(axis, list) and len(axis) == 1:
        inner["axis"] = axis[0]
    if kind in _CLASSES:
        if kind == "ThresholdedReLU":
            inner["threshold"] = inner.pop("theta", 1.0)
        kind, more = _CLASSES[kind]
        inner |= more
    config |= {"class_name": kind, "config": inner}
    if str(config.get("module", "")).startswith("tf_keras."):
        home = {"Functional": FUNCTIONAL_MODULE, "Sequential": "keras"}
        config |= {"module": home.get(kind, "keras.layers"), "registered_name": kind}
    if isinstance(inner.get("layers"), list):
        config["config"] = _with_input(_with_first_calls(inner), kind)
    if isinstance(config.get("inbound_nodes"), list) and kind != "InputLayer":
        config["inbound_nodes"] = [_call(call) for call in config["inbound_nodes"]]
    return config


def _with_input(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """A Sequential's config with an input of its own, which Keras 2 wrote into the first layer."""
    first = config["layers"][0] if config["layers"] else {}
    shape = first.get("config", {}).get("batch_input_shape")
    if kind != "Sequential" or first.get("class_name") == "InputLayer" or shape is None:
        return config
    name = f"{first['config'].get('name', 'first')}_input"
    own = {"batch_shape": shape, "dtype": "float32", "name": name}
    return {**config, "layers": [{"class_name": "InputLayer", "config": own}, *config["layers"]]}


def _with_first_calls(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config in which the first call of a model inside it is number 0.

    Keras 2 counts the call that made the model inside, too.
    """
    models = {
        layer.get("name", layer["config"].get("name"))
        for layer in config["layers"]
        if isinstance(layer.get("config"), dict) and "layers" in layer["config"]
    }
    first: dict[str, int] = {}

    def visit(value: Any, change: bool) -> Any:
        numbered = isinstance(value, list) and len(value) in (3, 4)
        if numbered and isinstance(value[0], str) and value[0] in models:
            name, node, *rest = value
            first[name] = min(first.get(name, node), node)
            return [name, node - first[name], *visit(rest, change)] if change else value
        if isinstance(value, list):
            return [visit(part, change) for part in value]
        if isinstance(value, dict):
            return {key: visit(part, change) for key, part in value.items()}
        return value

    calls = [layer.get("inbound_nodes") for layer in config["layers"]]
    visit([calls, config.get("output_layers")], False)
    layers = [
        {**layer, "inbound_nodes": visit(layer["inbound_nodes"], True)}
        if "inbound_nodes" in layer
        else layer
        for layer in config["layers"]
    ]
    # A list of one tensor is that tensor in Keras 2.
    ends = {
        key: visit(value[0] if isinstance(value, list) and len(value) == 1 else value, True)
        for key, value in config.items()
        if key in ("input_layers", "output_layers")
    }
    return {**config, "layers": layers, **ends}


def _call(call: Any) -> Any:
    """The call of a layer as Keras 3 writes it."""
    if not isinstance(call, list) or not call:
        return call
    first, given = arguments(call)
    return {"args": [first], "kwargs": given}


def _renamed(key: str, value: Any) -> Any:
    """Names without `/`, in the config of a layer and in the calls that read it."""
    if key == "name" and isinstance(value, str):
        return value.replace("/", "_")
    if key in ("keras_history", "inbound_nodes", "input_layers", "output_layers"):
        return _without_slashes(value)
    return value


def _without_slashes(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_slashes(part) for part in value]
    if isinstance(value, dict):
        return {key: _without_slashes(part) for key, part in value.items()}
    return value.replace("/", "_") if isinstance(value, str) else value
