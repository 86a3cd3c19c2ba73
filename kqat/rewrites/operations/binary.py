"""Rewrites functions of two tensors, or of a tensor and a constant: `add`, `multiply`, `where` …

A constant may be a number, an array without the batch axis, or a variable, which training still
updates.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, holds_indexes, is_tensor
from kqat.parts import (
    ChannelAffine,
    ConstantKind,
    Elementwise,
    IndexKind,
    IndexOperation,
    Select,
    WithConstant,
    within_domain,
)

Row = Callable[[Any, str], Callable[..., Any]]


def is_number(value: Any) -> bool:
    """Whether a value is one constant number."""
    return not isinstance(value, keras.Variable) and np.size(value) == 1


def function(operation: Any, name: str) -> Callable[..., Any]:
    """A function of one tensor and of numbers, as a lookup table."""

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in args if is_tensor(a)]
        if len(tensors) != 1 or not all(is_tensor(a) or a is None or is_number(a) for a in args):
            raise UnsupportedLayerError(
                f"Expected one tensor, and numbers, in operation '{name}' of type "
                f"{type(operation).__name__}. Received: {[_text(a) for a in args]}. No integer "
                "kernel computes it of two tensors. Leave it float, or make one of them a number."
            )

        def of_one(x: Any) -> Any:
            x = within_domain(operation, x)
            return operation(*(x if is_tensor(a) else a for a in args), **kwargs)

        return Elementwise.of(of_one, name=name)(tensors[0])

    return call


def _text(value: Any) -> str:
    return f"{type(value).__name__} of shape {tuple(np.shape(value))}" if value is not None else ""


def binary(merge: type, constant: Callable[[Any, Any, bool, str], Any]) -> Row:
    """A row for a function of two; `constant(x, c, c_first, name)` rewrites it for a constant."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(a: Any, b: Any) -> Any:
            tensors = [v for v in (a, b) if is_tensor(v)]
            if all(holds_indexes(x) for x in tensors):
                return index_operation(operation, name)(a, b)
            if len(tensors) == 2:
                _check_rank(a, b, name)
                return merge(name=name)([a, b])
            return constant(a, b, False, name) if is_tensor(a) else constant(b, a, True, name)

        return call

    return row


def _check_rank(x: Any, y: Any, name: str) -> None:
    if len(x.shape) != len(y.shape):
        raise UnsupportedLayerError(
            f"Expected operands of equal rank in operation '{name}'. Received: shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}. Reshape one of them."
        )


def index_operation(operation: Any, name: str) -> Callable[..., Any]:
    """Arithmetic on indexes, and comparisons: the result is an index or boolean, not a quantity."""
    kind = _KINDS[type(operation).__name__]

    def call(*args: Any) -> Any:
        tensors = [a for a in args if is_tensor(a)]
        if len(tensors) == len(args):
            return IndexOperation(kind, name=name)(tensors if len(args) > 1 else tensors[0])
        constant = next(a for a in args if not is_tensor(a))
        if not is_number(constant):
            raise UnsupportedLayerError(
                f"Expected tensors and numbers in operation '{name}'. Received: a constant of "
                f"shape {np.shape(constant)}. Put the constant into a layer of its own."
            )
        number = np.asarray(constant).item()
        option = {"x2" if is_tensor(args[0]) else "x1": number}
        return IndexOperation(kind, option, name=name)(tensors[0])

    return call


_KINDS = {
    "Add": IndexKind.ADD,
    "Subtract": IndexKind.SUBTRACT,
    "Multiply": IndexKind.MULTIPLY,
    "Equal": IndexKind.EQUAL,
    "NotEqual": IndexKind.NOT_EQUAL,
    "Greater": IndexKind.GREATER,
    "GreaterEqual": IndexKind.GREATER_EQUAL,
    "Less": IndexKind.LESS,
    "LessEqual": IndexKind.LESS_EQUAL,
    "LogicalAnd": IndexKind.LOGICAL_AND,
    "LogicalOr": IndexKind.LOGICAL_OR,
    "LogicalNot": IndexKind.LOGICAL_NOT,
}


def scaled(x: Any, scale: float, offset: float, name: str) -> Any:
    """The layer `x * scale + offset`, with one number for each."""
    return layers.Rescaling(scale, offset, name=name)(x)


def _with_constant(kind: ConstantKind, x: Any, value: Any, name: str) -> Any:
    """`x + value` or `x * value`."""
    product = kind is ConstantKind.MULTIPLY
    trained = isinstance(value, keras.Variable) and value.trainable
    array = np.asarray(value, np.float32)
    channels = x.shape[-1]
    if array.size == 1 and not trained:
        number = float(array.reshape(()))
        return scaled(x, *((number, 0.0) if product else (1.0, number)), name)
    if array.size == channels == array.shape[-1]:
        layer = ChannelAffine(product, not product, name=name, trainable=trained)
        return Part(layer, [array.reshape(-1)])(x)
    if array.ndim > len(x.shape) or (array.ndim == len(x.shape) and array.shape[0] != 1):
        raise UnsupportedLayerError(
            f"Expected a constant without the batch axis in operation '{name}'. Received: shape "
            f"{array.shape} beside {tuple(x.shape)}. Make it an input of the model."
        )
    layer = WithConstant(kind, list(array.shape), name=name, trainable=trained)
    return Part(layer, [array])(x)


def _negative(value: Any) -> Any:
    if isinstance(value, keras.Variable):
        return keras.Variable(-np.asarray(value), trainable=value.trainable)
    return np.negative(value)


def _add(x: Any, c: Any, first: bool, name: str) -> Any:
    return _with_constant(ConstantKind.ADD, x, c, name)


def _subtract(x: Any, c: Any, first: bool, name: str) -> Any:
    if not first:
        return _with_constant(ConstantKind.ADD, x, _negative(c), name)
    if is_number(c):
        return scaled(x, -1.0, float(np.asarray(c).reshape(())), name)
    return _with_constant(ConstantKind.ADD, scaled(x, -1.0, 0.0, f"{name}_negative"), c, name)


def _multiply(x: Any, c: Any, first: bool, name: str) -> Any:
    return _with_constant(ConstantKind.MULTIPLY, x, c, name)


def _divide(operation: Any, name: str) -> Callable[..., Any]:
    def call(a: Any, b: Any) -> Any:
        if not is_tensor(b):
            if isinstance(b, keras.Variable):
                raise UnsupportedLayerError(
                    f"Expected division by a constant or a tensor in operation '{name}'. "
                    "Received: a variable. Multiply by a variable instead."
                )
            return _with_constant(ConstantKind.MULTIPLY, a, np.divide(1.0, b), name)
        if is_tensor(a):
            _check_rank(a, b, name)
            return layers.Multiply(name=name)([a, ops.reciprocal(b)])
        return _with_constant(ConstantKind.MULTIPLY, ops.reciprocal(b), a, name)

    return call


def _bound(merge: type) -> Row:
    """`maximum` and `minimum`: with a number a lookup table, or RELU for `maximum(x, 0)`."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def constant(x: Any, c: Any, first: bool, name: str) -> Any:
            if merge is layers.Maximum and is_number(c) and float(np.asarray(c)) == 0.0:
                return layers.Activation("relu", name=name)(x)
            return function(operation, name)(*((c, x) if first else (x, c)))

        return binary(merge, constant)(operation, name)

    return row


def _where(operation: Any, name: str) -> Callable[..., Any]:
    def call(condition: Any, a: Any = None, b: Any = None) -> Any:
        if not all(is_tensor(v) for v in (condition, a, b)):
            raise UnsupportedLayerError(
                f"Expected three tensors in operation '{name}' of type Where. Received: "
                f"{[_text(v) for v in (condition, a, b)]}. Multiply by the condition instead, or "
                "write it as an elementwise function in a Lambda."
            )
        return Select(name=name)([condition, a, b])

    return call


BINARY: dict[str, Row] = {
    "Add": binary(layers.Add, _add),
    "Subtract": binary(layers.Subtract, _subtract),
    "Multiply": binary(layers.Multiply, _multiply),
    "Divide": _divide,
    "TrueDivide": _divide,
    "Maximum": _bound(layers.Maximum),
    "Minimum": _bound(layers.Minimum),
    "Where": _where,
    **{kind: index_operation for kind in _KINDS if kind not in ("Add", "Subtract", "Multiply")},
}
