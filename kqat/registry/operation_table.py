"""**Table**: one row for each `keras.ops` function or tensor operator, which rewrites it as layers.

A row takes the operation and a name for its layers, and returns a callable of the operation's own
arguments. Constant arguments become part of the layers: `x + 3.0` is a Rescaling.
"""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, holds_indexes, is_tensor
from kqat.parts import (
    Elementwise,
    IndexKind,
    IndexOperation,
    LearnedPower,
    Matmul,
    StopGradient,
    power,
)
from kqat.registry.refusals import OPERATION_REASONS, reason
from kqat.rewrites import (
    BINARY,
    NETWORKS,
    REARRANGING,
    REDUCING,
    SORTING,
    Row,
    clip,
    function,
    is_number,
    matrix_products,
    scaled,
    whole_numbers,
)


def as_layers(operation: Any, name: str) -> Callable[..., Any]:
    """A callable that computes `operation` with layers.

    Raises:
        UnsupportedLayerError: if the table has no row, or the row refuses these arguments.
    """
    kind = type(operation).__name__
    if kind not in OPERATIONS:
        raise UnsupportedLayerError(
            f"Expected operations with an integer form. Received: operation '{name}' of type "
            f"{kind}. Leave it float with policy={{'{name}': None}}, or write it with others."
            f"{reason(_function_name(kind), OPERATION_REASONS)}"
        )
    row = OPERATIONS[kind](operation, name)
    if kind not in _PROMOTING | _OF_QUANTITIES:
        return row

    def call(*args: Any, **kwargs: Any) -> Any:
        first = 1 if kind == "Where" else 0  # Behind its condition.
        numbers = args[first:]
        if any(map(whole_numbers.is_whole, numbers)) and (
            kind in _OF_QUANTITIES or any(map(_is_float, numbers))
        ):
            args = (*args[:first], *whole_numbers.promoted(numbers, name))
        return row(*args, **kwargs)

    return call


# Operations whose result is of floats if any argument is, and those whose result always is.
_PROMOTING = frozenset(
    (
        "Add", "Subtract", "Multiply", "Maximum", "Minimum", "Where", "Matmul", "Einsum",
        "Tensordot", "Dot", "Inner", "Power",
    )
)  # fmt: skip
_OF_QUANTITIES = frozenset(
    (
        "Divide", "TrueDivide", "DivideNoNan", "Mean", "Average", "Std", "Var", "Reciprocal",
        "Sqrt", "Rsqrt", "Log", "Log10", "Log1p", "Log2", "Exp", "Sin", "Cos", "Tanh", "Sigmoid",
    )
)  # fmt: skip


def _is_float(value: Any) -> bool:
    """Whether an argument is of floats: a tensor, a weight, an array or a number."""
    if value is None:
        return False
    if hasattr(value, "dtype"):
        return keras.backend.is_float_dtype(keras.backend.standardize_dtype(value.dtype))
    return bool(np.asarray(value).dtype.kind == "f")


def _function_name(kind: str) -> str:
    """The function's name for an operation's class: `rgb_to_hsv` for `RGBToHSV`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind).lower()


# `keras.ops` functions without options that are Keras activations. Those with options have rows
# below.
_ACTIVATIONS = {
    "".join(word.capitalize() for word in name.split("_")): name
    for name in (
        "relu relu6 sigmoid tanh silu hard_silu hard_sigmoid hard_tanh log_sigmoid selu softplus "
        "softsign"
    ).split()
} | {"Exp": "exponential"}


def _activation(function: str) -> Row:
    return lambda operation, name: layers.Activation(function, name=name)


def _clip(operation: Any, name: str) -> Callable[..., Any]:
    if (operation.x_min, operation.x_max) == (0, 6):
        return layers.Activation("relu6", name=name)
    ends = (operation.x_min, operation.x_max)
    if not all(end is not None and is_number(end) for end in ends):
        return _of_integers(operation, name)
    low, high = (float(np.reshape(end, ())) for end in ends)

    def call(x: Any) -> Any:
        if whole_numbers.is_whole(x) or not low < high:
            return _of_integers(operation, name)(x)
        return clip(x, low, high, name)

    return call


def _of_integers(operation: Any, name: str) -> Callable[..., Any]:
    """Functions of quantities as tables; those of integers that stay integers, by arithmetic."""

    def call(x: Any, *args: Any) -> Any:
        if not whole_numbers.is_whole(x):
            return function(operation, name)(x, *args)
        whole = whole_numbers.as_integers(x, name)
        if type(operation).__name__ == "Clip":
            # Of integers Keras makes the ends integers too.
            ends = [
                int(np.clip(end, -(2**31), 2**31 - 1)) for end in (operation.x_min, operation.x_max)
            ]
            return _between(whole, ends[0], ends[1], name)
        negative = _negated(whole, f"{name}_negative")
        return IndexOperation(IndexKind.MAXIMUM, name=name)([whole, negative])

    return call


def _between(x: Any, low: int, high: int, name: str) -> Any:
    """Integers, none below `low` or above `high`."""
    above = IndexOperation(IndexKind.MAXIMUM, {"x2": low}, name=f"{name}_above")(x)
    return IndexOperation(IndexKind.MINIMUM, {"x2": high}, name=name)(above)


def _negated(x: Any, name: str) -> Any:
    return IndexOperation(IndexKind.SUBTRACT, {"x1": 0}, name=name)(x)


def _negative(operation: Any, name: str) -> Callable[..., Any]:
    return lambda x: _negated(x, name) if whole_numbers.is_whole(x) else scaled(x, -1.0, 0.0, name)


def _divided_down(operation: Any, name: str) -> Callable[..., Any]:
    """`floor_divide` and `mod`: of integers by arithmetic, of quantities by tables."""

    def call(a: Any, b: Any) -> Any:
        constants = not is_tensor(b) and np.asarray(b).dtype.kind in "iu"
        if not (is_tensor(a) and whole_numbers.is_whole(a) and constants):
            return function(operation, name)(a, b)
        rest = type(operation).__name__ == "Mod"
        return whole_numbers.floor_division(a, b, name)[rest]

    return call


def _sign(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        if not whole_numbers.is_whole(x):
            return function(operation, name)(x)
        return _between(whole_numbers.as_integers(x, name), -1, 1, name)

    return call


def _divide_no_nan(operation: Any, name: str) -> Callable[..., Any]:
    """A quotient, zero where the divisor is: a product with the divisor's inverse, by a table."""

    def inverse(x: Any) -> Any:
        none = ops.equal(x, 0.0)
        return ops.where(none, 0.0, 1.0 / ops.where(none, 1.0, x))

    def call(a: Any, b: Any) -> Any:
        if not is_tensor(b):
            b = np.asarray(b, np.float32)
            return ops.multiply(a, np.divide(1.0, b, out=np.zeros_like(b), where=b != 0))
        return ops.multiply(a, Elementwise.of(inverse, name=f"{name}_inverse")(b))

    return call


def _rectified(operation: Any, name: str) -> Callable[..., Any]:
    if operation.negative_slope < 0:  # Keras's layers refuse what its functions take.
        return function(operation, name)
    options = ("negative_slope", "max_value", "threshold")
    return layers.ReLU(**{option: getattr(operation, option) for option in options}, name=name)


def _leaky(operation: Any, name: str) -> Callable[..., Any]:
    if operation.negative_slope < 0:
        return function(operation, name)
    return layers.LeakyReLU(operation.negative_slope, name=name)


def _elu(operation: Any, name: str) -> Callable[..., Any]:
    if operation.alpha == 1:
        return layers.Activation("elu", name=name)
    return function(operation, name)


def _power(operation: Any, name: str) -> Callable[..., Any]:
    """A power, of whose two numbers one may be a weight."""

    def call(a: Any, b: Any) -> Any:
        a, b = (_number_of(v) for v in (a, b))
        weight = next((v for v in (a, b) if isinstance(v, keras.Variable)), None)
        if weight is not None:
            return _power_of_weight(a, b, weight, name)
        if not (is_tensor(a) and is_number(b)):
            return function(operation, name)(a, b)
        exponent = float(np.asarray(b).reshape(()))
        if exponent == 2.0:
            return _squared(a, name)
        if exponent == round(exponent) and exponent > 0:
            return function(operation, name)(a, b)
        return Elementwise.of(lambda x: power(x, exponent), name=name)(a)

    return call


def _number_of(value: Any) -> Any:
    """A weight of one number that is not trained, as that number; else what is given."""
    is_weight = isinstance(value, keras.Variable)
    if not is_weight or value.trainable or np.size(value) != 1:
        return value
    return float(np.asarray(value).reshape(()))


def _power_of_weight(a: Any, b: Any, weight: Any, name: str) -> Any:
    """`x ** weight`, or `weight ** x` as `exp(x * log(weight))`."""
    if np.size(weight) != 1 or (weight is a and float(np.asarray(weight).reshape(())) <= 0):
        raise UnsupportedLayerError(
            f"Expected one number that is trained, above zero if it is the base, in operation "
            f"'{name}' of type Power. Received: a weight of shape {tuple(weight.shape)}, "
            f"{np.ravel(weight)[:3]}. Its lookup table is the same for all channels: train one "
            "number, or leave it float."
        )
    number = np.asarray(weight, np.float32).reshape(())
    if weight is b:
        return Part(LearnedPower(name=name, trainable=weight.trainable), [number])(a)
    logarithm = keras.Variable(np.log(number), trainable=weight.trainable, name="logarithm")
    return layers.Activation("exponential", name=name)(ops.multiply(b, logarithm))


def _matmul(operation: Any, name: str) -> Callable[..., Any]:
    def call(a: Any, b: Any) -> Any:
        shapes = tuple(a.shape), tuple(b.shape)
        ranks = len(shapes[0]), len(shapes[1])
        if is_tensor(a) and is_tensor(b):
            if ranks[0] == ranks[1] >= 3:
                return Matmul(name=name)([a, b])
        elif is_tensor(a) and ranks[1] == 2:
            return matrix_products.einsum("...y,yz->...z", a, b, name)
        elif min(ranks) >= 2 and max(ranks) >= 3:
            x, weight = (a, b) if is_tensor(a) else (b, a)
            return matrix_products.with_weight(x, weight, name, weight_first=weight is a)
        raise UnsupportedLayerError(
            f"Expected matrices for each sample, or one constant matrix, in operation '{name}'. "
            f"Received: shapes {shapes[0]} and {shapes[1]}. Reshape so that the ranks are equal."
        )

    return call


def _einsum(operation: Any, name: str) -> Callable[..., Any]:
    return lambda *operands: matrix_products.contraction(operation.subscripts, operands, name)


_LETTERS = "abcdefghijklmnopqrstuvw"


def _tensordot(operation: Any, name: str) -> Callable[..., Any]:
    def call(a: Any, b: Any) -> Any:
        ranks, axes = (len(a.shape), len(b.shape)), operation.axes
        if isinstance(axes, int):
            axes = [[*range(ranks[0] - axes, ranks[0])], [*range(axes)]]
        ours, theirs = (
            [int(i) % rank for i in np.reshape(part, -1)]
            for part, rank in zip(axes, ranks, strict=True)
        )
        return _contracted(a, b, ours, theirs, name)

    return call


def _dot(operation: Any, name: str) -> Callable[..., Any]:
    def call(a: Any, b: Any) -> Any:
        theirs = max(len(b.shape) - 2, 0)
        return _contracted(a, b, [len(a.shape) - 1], [theirs], name)

    return call


def _inner(operation: Any, name: str) -> Callable[..., Any]:
    return lambda a, b: _contracted(a, b, [len(a.shape) - 1], [len(b.shape) - 1], name)


def _contracted(a: Any, b: Any, ours: list[int], theirs: list[int], name: str) -> Any:
    first = _LETTERS[: len(a.shape)]
    more = iter(_LETTERS[len(a.shape) :])
    pairs = dict(zip(theirs, ours, strict=True))
    second = "".join(first[pairs[i]] if i in pairs else next(more) for i in range(len(b.shape)))
    rest = [c for c in first + second if not (c in first and c in second)]
    return matrix_products.einsum(f"{first},{second}->{''.join(rest)}", a, b, name)


def _square(operation: Any, name: str) -> Callable[..., Any]:
    return lambda x: _squared(x, name)


def _squared(x: Any, name: str) -> Any:
    if whole_numbers.is_whole(x):
        x = whole_numbers.as_integers(x, name)
        return IndexOperation(IndexKind.MULTIPLY, name=name)([x, x])
    return layers.Multiply(name=name)([x, x])


def _cast(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any, **_: Any) -> Any:
        if operation.dtype is None:  # Of `convert_to_tensor`, which keeps the type.
            return layers.Identity(name=name, dtype=x.dtype)(x)
        to_float = str(operation.dtype).startswith(("float", "bfloat"))
        if to_float and holds_indexes(x):
            return whole_numbers.quantity(x, name)
        to_bool, from_bool = operation.dtype == "bool", x.dtype == "bool"
        if to_bool and not from_bool:
            return IndexOperation(IndexKind.NOT_EQUAL, {"x2": 0}, name=name)(x)
        if not to_float and not holds_indexes(x):
            raise UnsupportedLayerError(
                f"Expected a cast from float to float, or from integer to integer, in operation "
                f"'{name}'. Received: {x.dtype} -> {operation.dtype}. A quantity is no index; "
                "compare it, or compute indexes with argmax."
            )
        if from_bool and not to_bool:
            return IndexOperation(IndexKind.MULTIPLY, {"x2": 1}, name=name)(x)
        return layers.Identity(name=name)(x)

    return call


# Elementwise functions without an int8 operator on every runtime: they ship as lookup tables.
FUNCTIONS = (
    "Absolute", "Arccos", "Arccosh", "Arcsin", "Arcsinh", "Arctan", "Arctan2",
    "Arctanh", "Cbrt", "Ceil", "Celu", "Cos", "Cosh", "Deg2rad", "Erf", "Erfc", "Erfinv", "Exp2",
    "Expm1", "Fabs", "Floor", "FloorDivide", "Fmax", "Fmin", "Fmod", "HardShrink",
     "I0", "Log", "Log10", "Log1p", "Log2", "Logaddexp", "Logaddexp2", "Mod", "NanToNum",
    "Rad2deg", "Reciprocal", "Round", "Rsqrt", "Sign", "Sin", "Sinc", "Sinh", "SoftShrink",
    "SparsePlus", "SparseSigmoid", "Sqrt", "Squareplus", "Tan", "TanhShrink", "Threshold", "Trunc",
)  # fmt: skip

OPERATIONS: dict[str, Row] = {
    **BINARY,
    **REARRANGING,
    **REDUCING,
    **SORTING,
    **NETWORKS,
    **dict.fromkeys(FUNCTIONS, function),
    "Negative": _negative,
    "FloorDivide": _divided_down,
    "Mod": _divided_down,
    "Sign": _sign,
    "Square": _square,
    "Power": _power,
    "Clip": _clip,
    "Absolute": _of_integers,
    "DivideNoNan": _divide_no_nan,
    **{operation: _activation(name) for operation, name in _ACTIVATIONS.items()},
    "ReLU": _rectified,
    "Elu": _elu,
    "Gelu": function,
    "LeakyRelu": _leaky,
    "Matmul": _matmul,
    "Einsum": _einsum,
    "Tensordot": _tensordot,
    "Dot": _dot,
    "Inner": _inner,
    "Cast": _cast,
    "StopGradient": lambda operation, name: StopGradient(name=name),
    "ConvertToTensor": lambda operation, name: (
        layers.Identity(name=name) if operation.dtype is None else _cast(operation, name)
    ),
    "Copy": lambda operation, name: layers.Identity(name=name),
}
