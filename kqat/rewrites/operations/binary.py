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
from kqat.grids import HIDDEN, Bounds
from kqat.parts import (
    ChannelAffine,
    Clip,
    ConstantKind,
    Elementwise,
    Hide,
    IndexKind,
    IndexOperation,
    Select,
    WithConstant,
    within_domain,
)
from kqat.rewrites.layers.one_hot import truth
from kqat.rewrites.operations.weights import computed, emitted, on_grid_of

Row = Callable[[Any, str], Callable[..., Any]]


def is_number(value: Any) -> bool:
    """Whether a value is one constant number."""
    return not isinstance(value, keras.Variable | keras.KerasTensor) and np.size(value) == 1


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
    """Arithmetic on indexes, and comparisons: the result is an index or boolean, not a quantity.

    A constant that a quantity may be equal to is rounded as the quantity is. Its own value is
    between two points of the grid, so that nothing would ever be equal to it.
    """
    kind = _KINDS[type(operation).__name__]

    def call(*args: Any) -> Any:
        tensors = [a for a in args if is_tensor(a)]
        if len(tensors) == len(args):
            return IndexOperation(kind, name=name)(tensors if len(args) > 1 else tensors[0])
        constant = np.asarray(next(a for a in args if not is_tensor(a)))
        if kind in _EQUALITIES and not holds_indexes(tensors[0]) and _is_between(constant):
            rounded = on_grid_of(tensors[0], constant, name)
            return IndexOperation(kind, name=name)([tensors[0], rounded])
        option = {"x2" if is_tensor(args[0]) else "x1": constant.tolist()}
        return IndexOperation(kind, option, name=name)(tensors[0])

    return call


_KINDS = {
    "Add": IndexKind.ADD,
    "Subtract": IndexKind.SUBTRACT,
    "Multiply": IndexKind.MULTIPLY,
    "Maximum": IndexKind.MAXIMUM,
    "Minimum": IndexKind.MINIMUM,
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


_EQUALITIES = (IndexKind.EQUAL, IndexKind.NOT_EQUAL)


def _is_between(constant: np.ndarray) -> bool:
    """Whether a constant may lie between two points of a grid: zero lies on every one.

    None holds what is far beyond all values; a mask of scores may be told by it. A grid that was
    widened to hold it would leave nothing of the values.
    """
    return bool(np.any(constant != 0) and np.all(np.abs(constant) < -FAR_BELOW))


def scaled(x: Any, scale: float, offset: float, name: str) -> Any:
    """The layer `x * scale + offset`, with one number for each."""
    return layers.Rescaling(scale, offset, name=name)(x)


def clip(x: Any, low: float, high: float, name: str) -> Any:
    """The layer `x`, but none below `low` and none above `high`; one of them may be infinite."""
    return Clip.of(Bounds(low, high), name=name)(x)


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
            f"{array.shape} beside {tuple(x.shape)}. Make it an input of the model; if "
            "it is drawn at random, as a variational autoencoder samples, leave that out."
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
                inverse = keras.Variable(np.divide(1.0, np.asarray(b)), trainable=b.trainable)
                return _with_constant(ConstantKind.MULTIPLY, a, inverse, name)
            return _with_constant(ConstantKind.MULTIPLY, a, np.divide(1.0, b), name)
        if is_tensor(a):
            _check_rank(a, b, name)
            return layers.Multiply(name=name)([a, ops.reciprocal(b)])
        return _with_constant(ConstantKind.MULTIPLY, ops.reciprocal(b), a, name)

    return call


def _bound(merge: type) -> Row:
    """`maximum` and `minimum`: with a number a clip, or RELU for `maximum(x, 0)`.

    A weight, or an array, becomes a value, and so gets a grid of its own.
    """

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def constant(x: Any, c: Any, first: bool, name: str) -> Any:
            if merge is layers.Maximum and is_number(c) and float(np.asarray(c)) == 0.0:
                return layers.Activation("relu", name=name)(x)
            if is_number(c):
                end, rises = float(np.reshape(c, ())), merge is layers.Maximum
                return clip(x, end if rises else -np.inf, np.inf if rises else end, name)
            return merge(name=name)([x, computed(c, x, len(x.shape), f"{name}_weight")])

        return binary(merge, constant)(operation, name)

    return row


def _where(operation: Any, name: str) -> Callable[..., Any]:
    """A selection; where the other value is far below all others, a mask of attention scores."""

    def call(condition: Any, a: Any = None, b: Any = None) -> Any:
        for scores, number, shown in ((a, b, True), (b, a, False)):
            if is_tensor(scores) and _is_far_below(number, scores.shape):
                return _scores(condition, scores, shown, name)
        if is_tensor(condition) and not (is_tensor(a) or is_tensor(b)) and _are_numbers(a, b):
            no, yes = (float(np.asarray(v).reshape(())) for v in (b, a))
            return truth(condition, (no, yes), condition.shape[1:], name)
        if not is_tensor(condition) or not (is_tensor(a) or is_tensor(b)):
            raise UnsupportedLayerError(
                f"Expected a condition and a value that are tensors in operation '{name}' of type "
                f"Where. Received: {[_text(v) for v in (condition, a, b)]}. Multiply by the "
                "condition instead, or write it as one function of each number, in a Lambda."
            )
        if any(is_tensor(v) and holds_indexes(v) for v in (a, b)):
            return _where_of_indexes(condition, a, b, name)
        like = a if is_tensor(a) else b
        rank = len(like.shape)
        values = [
            v if is_tensor(v) else emitted(v, like, rank, f"{name}_{part}")
            for v, part in ((a, "true"), (b, "false"))
        ]
        return Select(name=name)([condition, *values])

    return call


def _where_of_indexes(condition: Any, a: Any, b: Any, name: str) -> Any:
    """A selection of integers, as `b + condition * (a - b)`: a SELECT would give them a scale.

    Raises:
        UnsupportedLayerError: if they are truth values, or quantities stand beside them.
    """
    tensors = [v for v in (a, b) if is_tensor(v)]
    if any(v.dtype == "bool" or not holds_indexes(v) for v in tensors) or not all(
        is_tensor(v) or np.asarray(v).dtype.kind in "iu" for v in (a, b)
    ):
        raise UnsupportedLayerError(
            f"Expected quantities, or integers, to select from in operation '{name}' of type "
            f"Where. Received: {[_text(v) for v in (a, b)]}. Use logical_and and logical_or of "
            "truth values, and cast integers to float before."
        )

    def combined(kind: IndexKind, x: Any, y: Any, label: str) -> Any:
        options = {f"x{i}": np.asarray(v).tolist() for i, v in ((1, x), (2, y)) if not is_tensor(v)}
        read = [v for v in (x, y) if is_tensor(v)]
        return IndexOperation(kind, options, name=label)(read if len(read) > 1 else read[0])

    if condition.dtype != "bool":
        condition = combined(IndexKind.NOT_EQUAL, condition, 0, f"{name}_true")
    ones = combined(IndexKind.MULTIPLY, condition, 1, f"{name}_ones")
    away = combined(IndexKind.SUBTRACT, a, b, f"{name}_difference")
    return combined(
        IndexKind.ADD, combined(IndexKind.MULTIPLY, ones, away, f"{name}_added"), b, name
    )


def _is_far_below(value: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether a value is one constant, or several, all far below scores of `shape`."""
    if value is None or is_tensor(value) or getattr(value, "trainable", False):
        return False
    array = np.asarray(value)
    fits = array.ndim <= len(shape) and all(
        size in (1, whole) for size, whole in zip(array.shape[::-1], shape[::-1], strict=False)
    )
    return fits and bool(np.all(array <= FAR_BELOW))


def _are_numbers(*values: Any) -> bool:
    return all(v is not None and not isinstance(v, keras.Variable) and is_number(v) for v in values)


# A score below this is that of a hidden key, whatever the others are.
FAR_BELOW = -1e4


def _scores(condition: Any, scores: Any, shown: bool, name: str) -> Any:
    """`scores` where `condition` is `shown`, and below all others elsewhere."""
    rank = len(scores.shape)
    if not is_tensor(condition):
        bias = np.where(np.asarray(condition).astype(bool) == shown, 0.0, HIDDEN)
        bias = bias.astype(np.float32)
        bias = bias.reshape((1,) * (rank - bias.ndim) + bias.shape)
        layer = WithConstant(ConstantKind.HIDE, list(bias.shape), name=name, trainable=False)
        return Part(layer, [bias])(scores)
    shape = tuple(condition.shape[1:])
    if len(shape) != rank - 1:
        raise UnsupportedLayerError(
            f"Expected a condition of the rank of the scores in operation '{name}'. Received: "
            f"shapes {tuple(condition.shape)} and {tuple(scores.shape)}. Reshape it."
        )
    values = (HIDDEN, 0.0) if shown else (0.0, HIDDEN)
    bias = truth(condition, values, shape, f"{name}_bias")
    return Hide(name=name)([bias, scores])


_ARITHMETIC = ("Add", "Subtract", "Multiply", "Maximum", "Minimum")

BINARY: dict[str, Row] = {
    "Add": binary(layers.Add, _add),
    "Subtract": binary(layers.Subtract, _subtract),
    "Multiply": binary(layers.Multiply, _multiply),
    "Divide": _divide,
    "TrueDivide": _divide,
    "Maximum": _bound(layers.Maximum),
    "Minimum": _bound(layers.Minimum),
    "Where": _where,
    **{kind: index_operation for kind in _KINDS if kind not in _ARITHMETIC},
}
