"""**Table**: functions of TensorFlow in models of Keras 2, as operations of `keras.ops`.

Keras 2 keeps `x + 3.0` or `tf.nn.relu(x)` as a layer of class TFOpLambda that names the function,
and `x[:, 1:]` as a SlicingOpLambda.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import keras

from kqat.base import ModelError

# A function's keyword arguments -> module of keras.ops, operation, its options, more operands.
Arguments = dict[str, Any]
_Translated = tuple[str, str, dict[str, Any], list[Any]]
_Row = Callable[[Arguments], _Translated]


def _of_two(name: str, other: str = "y") -> _Row:
    return lambda given: ("numpy", name, {}, [given.pop(other)])


def _of_one(name: str, module: str = "numpy", **options: Any) -> _Row:
    return lambda given: (module, name, options, [])


def _over_axis(name: str, module: str = "numpy", default: Any = None) -> _Row:
    def row(given: Arguments) -> _Translated:
        axis = given.pop("axis", None)
        options = {"axis": default if axis is None else axis}
        if "keepdims" in given or default is None:
            options["keepdims"] = bool(given.pop("keepdims", False))
        return module, name, options, []

    return row


def _axis_alone(name: str, module: str = "numpy", default: Any = -1) -> _Row:
    def row(given: Arguments) -> _Translated:
        axis = given.pop("axis", None)
        return module, name, {"axis": default if axis is None else axis}, []

    return row


def _renamed(name: str, module: str = "numpy", **options: str) -> _Row:
    return lambda given: (module, name, {ours: given.pop(o) for o, ours in options.items()}, [])


def _cast(given: Arguments) -> _Translated:
    dtype = given.pop("dtype")
    return "core", "Cast", {"dtype": getattr(dtype, "name", dtype)}, []


def _matmul(given: Arguments) -> _Translated:
    for option in ("transpose_a", "transpose_b", "adjoint_a", "adjoint_b", "a_is_sparse"):
        if given.pop(option, False):
            raise ValueError(option)
    return "numpy", "Matmul", {}, [given.pop("b")]


def _clip(given: Arguments) -> _Translated:
    limits = {"x_min": given.pop("clip_value_min"), "x_max": given.pop("clip_value_max")}
    return "numpy", "Clip", limits, []


def _getitem(given: Arguments) -> _Translated:
    spec = given.pop("slice_spec")
    return "numpy", "GetItem", {}, [_key(spec)]


def _key(spec: Any) -> Any:
    if isinstance(spec, list):
        return [_key(part) for part in spec]
    if isinstance(spec, Mapping) and {"start", "stop", "step"} <= set(spec):
        return {
            "class_name": "__slice__",
            "config": {k: spec[k] for k in ("start", "stop", "step")},
        }
    if isinstance(spec, Mapping):
        spec = spec.get("config", spec)
        return {"class_name": "__ellipsis__", "config": {}} if spec == "..." else spec
    return spec


FUNCTIONS: dict[str, _Row] = {
    "__operators__.add": _of_two("Add"),
    "math.add": _of_two("Add"),
    "__operators__.getitem": _getitem,
    "cast": _cast,
    "clip_by_value": _clip,
    "concat": _axis_alone("Concatenate"),
    "expand_dims": _axis_alone("ExpandDims"),
    "linalg.matmul": _matmul,
    "math.abs": _of_one("Absolute"),
    "math.divide": _of_two("TrueDivide"),
    "math.exp": _of_one("Exp"),
    "math.log": _of_one("Log"),
    "math.maximum": _of_two("Maximum"),
    "math.minimum": _of_two("Minimum"),
    "math.multiply": _of_two("Multiply"),
    "math.negative": _of_one("Negative"),
    "math.pow": _of_two("Power"),
    "math.reduce_max": _over_axis("Max"),
    "math.reduce_mean": _over_axis("Mean"),
    "math.reduce_min": _over_axis("Min"),
    "math.reduce_sum": _over_axis("Sum"),
    "math.rsqrt": _of_one("Rsqrt", "math"),
    "math.sigmoid": _of_one("Sigmoid", "nn"),
    "math.sqrt": _of_one("Sqrt"),
    "math.square": _of_one("Square"),
    "math.subtract": _of_two("Subtract"),
    "math.tanh": _of_one("Tanh"),
    "math.truediv": _of_two("TrueDivide"),
    "nn.elu": _of_one("Elu", "nn"),
    "nn.gelu": lambda given: ("nn", "Gelu", {"approximate": given.pop("approximate", False)}, []),
    "nn.leaky_relu": lambda given: (
        "nn", "LeakyRelu", {"negative_slope": given.pop("alpha", 0.2)}, []
    ),
    "nn.relu": _of_one("Relu", "nn"),
    "nn.relu6": _of_one("Relu6", "nn"),
    "nn.sigmoid": _of_one("Sigmoid", "nn"),
    "nn.silu": _of_one("Silu", "nn"),
    "nn.softmax": _axis_alone("Softmax", "nn"),
    "nn.swish": _of_one("Silu", "nn"),
    "nn.tanh": _of_one("Tanh"),
    "reshape": _renamed("Reshape", shape="newshape"),
    "squeeze": _axis_alone("Squeeze", default=None),
    "stack": _axis_alone("Stack", default=0),
    "tanh": _of_one("Tanh"),
    "transpose": _renamed("Transpose", perm="axes"),
}  # fmt: skip
# The modules that files of Keras 3 name for the operations, by one function of each.
_MODULES = {
    "core": keras.ops.cast.__module__,
    "math": keras.ops.rsqrt.__module__,
    "nn": keras.ops.relu.__module__,
    "numpy": keras.ops.add.__module__,
}
# Keyword arguments that change nothing in inference.
_IDLE = ("b_is_sparse", "beta", "grad_a", "grad_b", "num", "output_type")


def translated(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a TFOpLambda or SlicingOpLambda as that of an operation of `keras.ops`.

    Raises:
        ModelError: if the table has no row for its function, or not for these arguments.
    """
    function = str(layer["config"]["function"])
    name = layer["config"]["name"]
    row = FUNCTIONS.get(function)
    if row is None:
        raise ModelError(
            f"Expected functions of TensorFlow that kqat knows as keras.ops. Received: "
            f"'{function}', as layer '{name}'. Build the model in Keras 3 with keras.ops in its "
            "place, and load the weights: the other layers keep their names."
        )
    nodes, made = [], ("", "", dict[str, Any]())
    for call in layer["inbound_nodes"]:
        operands, given = arguments(call)
        try:
            module, kind, options, more = row(given)
        except (KeyError, ValueError) as error:
            raise _unknown_argument(name, function, str(error)) from error
        rest = {key: value for key, value in given.items() if value not in (None, False)}
        unknown = sorted(set(rest) - set(_IDLE))
        if unknown:
            raise _unknown_argument(name, function, str(unknown))
        nodes.append({"args": [operands, *more], "kwargs": {}})
        made = (module, kind, options)
    module, kind, options = made
    operation = getattr(sys.modules[_MODULES[module]], kind)
    # Operations with options take a name since Keras 3.11; before, the entry below alone has it.
    named = "name" in inspect.signature(operation.__init__).parameters
    return {
        "module": _MODULES[module],
        "class_name": kind,
        "config": {"name": name, **options} if named else options,
        "registered_name": kind,
        "name": layer.get("name", name),
        "inbound_nodes": nodes,
    }


def _unknown_argument(name: str, function: str, what: str) -> ModelError:
    return ModelError(
        f"Expected arguments of tf.{function} that keras.ops has. Received: {what} in layer "
        f"'{name}'. Build the model in Keras 3 and load the weights."
    )


def arguments(call: Any) -> tuple[Any, Arguments]:
    """The first operand of a call as Keras 2 writes it, and its keyword arguments.

    Args:
        call: `[layer, node, tensor, keywords]`, or a list of these for a list of tensors.
    """
    if not isinstance(call[0], list):
        first, given = _operand(call), call[3] if len(call) > 3 else {}
    else:
        tensors = [_operand(part) for part in call]
        first, given = tensors[0] if len(call) == 1 else tensors, _last(call[0])
    named = {key: value for key, value in given.items() if key != "name" and value is not None}
    return first, {key: _operand(value) for key, value in named.items()}


def _last(part: Any) -> Arguments:
    return part[3] if len(part) > 3 else {}


def _operand(value: Any) -> Any:
    """An operand as Keras 3 writes it: a tensor where Keras 2 names layer, node and position."""
    if isinstance(value, list) and len(value) in (3, 4) and isinstance(value[0], str):
        if value[0] == "_CONSTANT_VALUE":
            return value[2]
        return {
            "class_name": "__keras_tensor__",
            "config": {"shape": [None], "dtype": "float32", "keras_history": value[:3]},
        }
    return [_operand(part) for part in value] if isinstance(value, list) else value
