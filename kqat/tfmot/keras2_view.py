"""`Keras2View`: shows a Keras 3 layer with the class and attribute names of Keras 2."""

import sys
from typing import Any

# Name of a class -> Keras 2's name of an attribute -> Keras 3's name.
_RENAMED = dict.fromkeys(
    ("DepthwiseConv1D", "DepthwiseConv2D"),
    {f"depthwise_{what}": f"kernel_{what}" for what in ("initializer", "regularizer", "constraint")}
    | {"depthwise_kernel": "kernel"},
)
# Keras 3's name of an activation function -> Keras 2's.
_FUNCTIONS = {"silu": "swish"}
_COMPAT = "tensorflow_model_optimization.python.core.keras.compat"


class Keras2View:
    """A Keras 3 layer that appears with the class and the attribute names of Keras 2.

    For `isinstance` it has the Keras 2 class that tfmot uses, if tfmot is loaded. Its attributes
    are the layer's own variables and functions.
    """

    def __init__(self, layer: Any):
        self._layer = layer

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the same name in the Keras that tfmot uses."""
        used = getattr(sys.modules.get(_COMPAT), "keras", None)
        found = getattr(getattr(used, "layers", None), type(self._layer).__name__, None)
        return found or type(self._layer)

    def __getattr__(self, name: str) -> Any:
        renamed = _RENAMED.get(type(self._layer).__name__, {})
        value = getattr(self._layer, renamed.get(name, name))
        if name == "activation" and getattr(value, "__name__", "") in _FUNCTIONS:
            return _Renamed(value)
        return value


class _Renamed:
    """An activation function with its name in Keras 2."""

    def __init__(self, function: Any):
        self.function = function
        self.__name__ = _FUNCTIONS[function.__name__]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def original(function: Any) -> Any:
    """The layer's own function for a function that a view returned; others as they are."""
    return function.function if isinstance(function, _Renamed) else function
