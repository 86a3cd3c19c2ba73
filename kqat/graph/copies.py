"""Copies of layers: a new layer of the same config that takes over the weights."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import layers

from kqat.base import ModelError
from kqat.graph.keras_internals import parts_of, told_output_shape


class Part:
    """A layer that takes over given weights as soon as it is built; calls like the layer.

    Args:
        layer: the layer, not built yet.
        weights: what it takes over, by `set_weights` or, if given, by `take_over(*weights)`.
        take_over: a layer's own way to take them.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        weights: Sequence[Any] = (),
        take_over: Callable[..., None] | None = None,
    ):
        self.layer = layer
        self._pending = weights
        self._take_over = take_over

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._pending:
            return self.layer(*args, **kwargs)
        with _initialized_by_zeros(self.layer):
            output = self.layer(*args, **kwargs)
        if self._pending:
            weights, self._pending = self._pending, ()
            if self._take_over is not None:
                self._take_over(*weights)
            else:
                self._check_number(len(weights))
                self.layer.set_weights(weights)
                finalize(self.layer)
        return output

    def _check_number(self, received: int) -> None:
        """Checks that the layer has a place for all weights.

        Raises:
            ModelError: if it has not.
        """
        expected = len(self.layer.weights)
        if received != expected:
            raise ModelError(
                f"Expected the {expected} weights that the config of layer '{self.layer.name}' of "
                f"type {type(self.layer).__name__} makes. Received: {received}, as where a layer "
                "inside it was replaced by another. Write a layer of your own of these parts, or "
                "leave it as it was made."
            )


@contextlib.contextmanager
def _initialized_by_zeros(layer: keras.layers.Layer) -> Iterator[None]:
    """Inside, layers that are built draw no random numbers for weights that they take over."""
    kept = [
        (part, key, value)
        for part in parts_of(layer)
        for key, value in vars(part).items()
        if key.endswith("_initializer") and isinstance(value, keras.initializers.Initializer)
    ]
    zeros = keras.initializers.Zeros()
    try:
        for part, key, _ in kept:
            object.__setattr__(part, key, zeros)
        yield
    finally:
        for part, key, value in kept:
            object.__setattr__(part, key, value)


def finalize(layer: Any) -> None:
    """Lets a Normalization compute with the weights that it was just given."""
    if isinstance(layer, layers.Normalization) and layer.input_mean is None:
        layer.finalize_state()


def _without_config(error: Exception) -> str:
    """What an error of Keras says, without the config that it quotes."""
    text = str(error)
    _, found, reason = text.partition("Exception encountered:")
    words = (reason if found else text.split("using config=")[0]).split()
    return " ".join(words)[:300]


def _from_config(kind: Any, config: dict[str, Any]) -> Any:
    """A layer of this class; entries of the config that no `__init__` of it takes are left out."""
    try:
        return kind.from_config(config)
    except Exception:  # Whatever a user's own class raises.
        known: set[str] = set()
        for base in kind.__mro__:
            parameters = inspect.signature(base.__init__).parameters.values()
            known.update(p.name for p in parameters)
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
                break
            if base is layers.Layer:
                break
        kept = {key: value for key, value in config.items() if key in known}
        if len(kept) == len(config):
            raise
        return kind.from_config(kept)


@contextlib.contextmanager
def _nameless_functions() -> Iterator[None]:
    """Without the warning of Keras about lambdas: they are shared or replaced, not read back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        yield


def _serialized(function: Any) -> Any:
    """An activation as a config holds it; `None` for what none can, as a `functools.partial`."""
    try:
        with _nameless_functions():
            return keras.activations.serialize(function)
    except TypeError:
        return None


def activation_name(function: Any) -> str | None:
    """The name of an activation that Keras knows by name; `None` for the user's own."""
    name = _serialized(function)
    if not isinstance(name, str):
        return None
    # A function of the user's own may bear the name of one of Keras.
    return name if getattr(keras.activations, name, None) is function else None


def clone(layer: Any, name: str | None = None, **changes: Any) -> keras.layers.Layer:
    """An unbuilt layer of the same class and config, except for `changes`.

    Raises:
        ModelError: if the class cannot be made from its config.
    """
    if name is not None:
        changes["name"] = name
    try:
        copy = _made_anew(layer, changes)
    except Exception as error:  # Whatever a user's own class raises.
        raise ModelError(
            f"Expected a layer that can be made anew from its config. Received: '{layer.name}' of "
            f"type {type(layer).__name__}, which cannot: {_without_config(error)} Let get_config "
            "return every argument of __init__, and register functions of your own with "
            "keras.saving.register_keras_serializable."
        ) from error
    copy.trainable = layer.trainable
    # A layer's config has neither.
    copy.autocast, copy.supports_jit = layer.autocast, layer.supports_jit
    return copy


def _made_anew(layer: Any, changes: dict[str, Any]) -> keras.layers.Layer:
    """A layer of this config; a function of the user's, which no config can name, is shared."""
    if type(layer) is layers.Identity:
        # It computes nothing, and takes whatever arguments it is given.
        own = {"name": layer.name, "dtype": layer.dtype_policy.name, **changes}
        return layers.Identity(**own)
    own_objects = _own_objects_of_parts(layer)
    config = {**_config_without(layer, own_objects), **changes}
    if type(layer) is layers.Lambda:
        own = {
            "arguments": layer.arguments,
            "mask": layer.mask,
            "output_shape": told_output_shape(layer),
        }
        kept = {key: config[key] for key in ("name", "dtype", "trainable")}
        return layers.Lambda(layer.function, **own, **kept)
    if isinstance(layer, layers.Activation) and "activation" not in changes:
        config = {**config, "activation": layer.activation}
    copy = _from_config(type(layer), config)
    parts, copies = parts_of(layer), parts_of(copy)
    # A layer that makes its parts when it is built hands its own objects on to them.
    alike = [type(part) for part in parts] == [type(part) for part in copies]
    for part, its_copy in zip(parts, copies, strict=True) if alike else [(layer, copy)]:
        for key, value in own_objects[id(part)].items():
            given = part is layer and key.lstrip("_") in changes
            if not given and hasattr(its_copy, key):
                setattr(its_copy, key, value)
    return copy


def config_of(layer: Any) -> dict[str, Any]:
    """The config of a layer, whatever objects of the user's own it holds.

    Regularizers, constraints and activations of the user's own stand in it themselves. His
    initializers are replaced by zeros, as weights are copied anyway.
    """
    return _config_without(layer, _own_objects_of_parts(layer))


def _own_objects_of_parts(layer: Any) -> dict[int, dict[str, Any]]:
    """`_own_objects` of a layer and of all layers inside it, by their identity."""
    return {id(part): _own_objects(part) for part in parts_of(layer)}


def _config_without(layer: Any, own_objects: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """As `config_of`, for a caller who found the objects of the user's own already."""
    own = own_objects[id(layer)]
    kept = [(p, key, vars(p)[key]) for p in parts_of(layer) for key in own_objects[id(p)]]
    try:
        for part, key, _ in kept:
            stand_in = keras.activations.linear if key.endswith("activation") else None
            object.__setattr__(part, key, stand_in)
        with _nameless_functions():
            config = dict(layer.get_config())
    finally:
        for part, key, value in kept:
            object.__setattr__(part, key, value)
    # MultiHeadAttention keeps `kernel_regularizer` as `_kernel_regularizer`.
    named = {key if key in config else key.lstrip("_"): value for key, value in own.items()}
    return {**config, **{key: value for key, value in named.items() if key in config}}


_KINDS = (keras.regularizers.Regularizer, keras.constraints.Constraint)
_ENDINGS = ("_initializer", "_regularizer", "_constraint")


def _own_objects(layer: Any) -> dict[str, Any]:
    """Attributes of a layer that hold objects of the user's own that its config cannot name.

    These are regularizers, constraints, initializers, and activations.
    """
    found = {}
    for key, value in vars(layer).items():
        if key.endswith("activation") and _is_nameless(value, layer):
            found[key] = value
        if value is None or not key.endswith(_ENDINGS):
            continue
        own = type(value) if isinstance(value, (*_KINDS, keras.initializers.Initializer)) else value
        if not str(getattr(own, "__module__", "keras")).startswith("keras."):
            initial = key.endswith("_initializer")
            found[key] = keras.initializers.Zeros() if initial else value
    return found


def _is_nameless(activation: Any, layer: Any) -> bool:
    """Whether an activation of `layer` is a function that Keras would not find by its config."""
    if not callable(activation) or isinstance(activation, layers.Layer):
        return False
    if type(layer).__module__.startswith("keras."):
        return activation_name(activation) is None
    return _serialized(activation) is None  # A user's own class may know its functions by name.


def duplicate(layer: Any, name: str | None = None, **changes: Any) -> Callable[..., Any]:
    """A copy that computes with the same weights; an operation, which has none, serves itself."""
    if not isinstance(layer, keras.layers.Layer):
        return layer
    return Part(clone(layer, name, **changes), layer.get_weights())
