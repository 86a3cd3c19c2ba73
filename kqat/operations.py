"""The one table of `keras.ops` functions, and operators on tensors, as layers of the registry.

A row takes the operation and the name that its layers go by, and returns a callable of the
operation's own arguments. Constants join in: `x + 3.0` is a Rescaling.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.errors import UnsupportedLayerError
from kqat.primitives import Slice

Row = Callable[[Any, str], Callable[..., Any]]


def as_layers(operation: Any, name: str) -> Callable[..., Any]:
    """A callable that computes `operation` with layers.

    Raises:
        UnsupportedLayerError: if the table has no row, or the row cannot serve this call.
    """
    kind = type(operation).__name__
    if kind not in OPERATIONS:
        raise UnsupportedLayerError(
            f"Expected operations with an integer form. Received: operation '{name}' of type "
            f"{kind}. Leave it float with policy={{'{name}': None}}, or use one of "
            f"{', '.join(sorted(OPERATIONS))}."
        )
    return OPERATIONS[kind](operation, name)


def _activation(function: str) -> Row:
    return lambda operation, name: layers.Activation(function, name=name)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _constant(value: Any, name: str, channels: int) -> list[float]:
    array = np.asarray(value, np.float64)
    if array.size not in (1, channels) or (array.ndim and array.shape[-1] != array.size):
        raise UnsupportedLayerError(
            f"Expected a number or one number per channel ({channels}) in operation '{name}'. "
            f"Received: a constant of shape {array.shape}. Put it into a layer of its own."
        )
    return (
        np.broadcast_to(array.reshape(-1), (channels,)).tolist()
        if array.size > 1
        else [float(array.reshape(()))]
    )


def _scaled(x: Any, scale: Any, offset: Any, name: str) -> Any:
    channels = x.shape[-1]
    scale, offset = (_constant(v, name, channels) for v in (scale, offset))
    if len(scale) == len(offset) == 1:
        return layers.Rescaling(scale[0], offset[0], name=name)(x)
    return layers.Rescaling(scale, offset, name=name)(x)


def _check_rank(x: Any, y: Any, name: str) -> None:
    if len(x.shape) != len(y.shape):
        raise UnsupportedLayerError(
            f"Expected operands of equal rank in operation '{name}'. Received: shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}. Reshape one of them."
        )


def _binary(merge: type, constant: Callable[[Any, Any, bool, str], Any]) -> Row:
    """A row for a function of two; `constant(x, c, c_first, name)` serves where one is constant."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(a: Any, b: Any) -> Any:
            if _is_tensor(a) and _is_tensor(b):
                _check_rank(a, b, name)
                return merge(name=name)([a, b])
            return constant(a, b, False, name) if _is_tensor(a) else constant(b, a, True, name)

        return call

    return row


def _add(x: Any, c: Any, first: bool, name: str) -> Any:
    return _scaled(x, 1.0, c, name)


def _subtract(x: Any, c: Any, first: bool, name: str) -> Any:
    return _scaled(x, -1.0, c, name) if first else _scaled(x, 1.0, np.negative(c), name)


def _multiply(x: Any, c: Any, first: bool, name: str) -> Any:
    return _scaled(x, c, 0.0, name)


def _divide(operation: Any, name: str) -> Callable[..., Any]:
    def call(a: Any, b: Any) -> Any:
        if _is_tensor(b):
            raise UnsupportedLayerError(
                f"Expected division by a constant in operation '{name}'. Received: a tensor as "
                "divisor; TFLite has no int8 DIV. Multiply by a constant, or leave it float."
            )
        return _scaled(a, np.divide(1.0, b), 0.0, name)

    return call


def _bound(merge: type) -> Row:
    def constant(x: Any, c: Any, first: bool, name: str) -> Any:
        value = float(np.asarray(c))
        if merge is layers.Maximum and value == 0.0:
            return layers.Activation("relu", name=name)(x)
        raise UnsupportedLayerError(
            f"Expected two tensors, or maximum(x, 0), in operation '{name}'. Received: the "
            f"constant {value}. Use keras.ops.clip(x, 0, 6), relu or relu6."
        )

    return _binary(merge, constant)


def _clip(operation: Any, name: str) -> Callable[..., Any]:
    if (operation.x_min, operation.x_max) != (0, 6):
        raise UnsupportedLayerError(
            f"Expected clip(x, 0, 6) in operation '{name}', which is ReLU6. Received: bounds "
            f"{operation.x_min} and {operation.x_max}. Use relu6, or leave it float."
        )
    return layers.Activation("relu6", name=name)


def _mean(operation: Any, name: str) -> Callable[..., Any]:
    return _reduced(
        operation,
        name,
        {
            3: layers.GlobalAveragePooling1D,
            4: layers.GlobalAveragePooling2D,
            5: layers.GlobalAveragePooling3D,
        },
    )


def _max(operation: Any, name: str) -> Callable[..., Any]:
    return _reduced(
        operation,
        name,
        {3: layers.GlobalMaxPooling1D, 4: layers.GlobalMaxPooling2D, 5: layers.GlobalMaxPooling3D},
    )


def _reduced(operation: Any, name: str, pools: dict[int, type]) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        rank = len(x.shape)
        axis = operation.axis
        given = range(rank) if axis is None else axis
        axes = {a % rank for a in ([given] if isinstance(given, int) else given)}
        if rank not in pools or axes != set(range(1, rank - 1)):
            raise UnsupportedLayerError(
                f"Expected a reduction over all axes between batch and channels in operation "
                f"'{name}'. Received: axis={axis} of shape {tuple(x.shape)}. Permute or reshape."
            )
        return pools[rank](keepdims=operation.keepdims, name=name)(x)

    return call


def _to_output_shape(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        shape = operation.compute_output_spec(x).shape
        if shape[0] != x.shape[0]:
            raise UnsupportedLayerError(
                f"Expected operation '{name}' to keep the batch axis first. Received: {x.shape} "
                f"-> {shape}."
            )
        return layers.Reshape(shape[1:], name=name)(x)

    return call


def _permuted(axes_of: Callable[[Any, int], tuple[int, ...]]) -> Row:
    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            axes = axes_of(operation, len(x.shape))
            if axes[0] != 0:
                raise UnsupportedLayerError(
                    f"Expected operation '{name}' to keep the batch axis first. Received: axes "
                    f"{axes}."
                )
            return layers.Permute(axes[1:], name=name)(x)

        return call

    return row


def _transpose_axes(operation: Any, rank: int) -> tuple[int, ...]:
    return tuple(operation.axes) if operation.axes else tuple(reversed(range(rank)))


def _swap_axes(operation: Any, rank: int) -> tuple[int, ...]:
    axes = list(range(rank))
    a, b = operation.axis1 % rank, operation.axis2 % rank
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _concatenate(operation: Any, name: str) -> Callable[..., Any]:
    return layers.Concatenate(axis=operation.axis, name=name)


def _get_item(operation: Any, name: str) -> Callable[..., Any]:
    return lambda x, key: Slice.of(x, key, name)


def _softmax(function: str) -> Row:
    def row(operation: Any, name: str) -> Callable[..., Any]:
        if operation.axis != -1:
            raise UnsupportedLayerError(
                f"Expected axis=-1 in operation '{name}'. Received: axis={operation.axis}. Permute."
            )
        return layers.Activation(function, name=name)

    return row


def _resize(operation: Any, name: str) -> Callable[..., Any]:
    options = ("antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio", "data_format")
    return layers.Resizing(
        *operation.size,
        interpolation=operation.interpolation,
        name=name,
        **{option: getattr(operation, option) for option in options},
    )


def _pool(pools: dict[int, type]) -> Row:
    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            options = {"data_format": operation.data_format, "name": name}
            pool = pools[len(x.shape)]
            return pool(operation.pool_size, operation.strides, operation.padding, **options)(x)

        return call

    return row


OPERATIONS: dict[str, Row] = {
    "Add": _binary(layers.Add, _add),
    "Subtract": _binary(layers.Subtract, _subtract),
    "Multiply": _binary(layers.Multiply, _multiply),
    "Divide": _divide,
    "TrueDivide": _divide,
    "Negative": lambda operation, name: lambda x: _scaled(x, -1.0, 0.0, name),
    "Square": lambda operation, name: lambda x: layers.Multiply(name=name)([x, x]),
    "Maximum": _bound(layers.Maximum),
    "Minimum": _bound(layers.Minimum),
    "Clip": _clip,
    "Relu": _activation("relu"),
    "Relu6": _activation("relu6"),
    "Sigmoid": _activation("sigmoid"),
    "Tanh": _activation("tanh"),
    "Silu": _activation("silu"),
    "HardSilu": _activation("hard_silu"),
    "HardSigmoid": _activation("hard_sigmoid"),
    "HardTanh": _activation("hard_tanh"),
    "LogSigmoid": _activation("log_sigmoid"),
    "Selu": _activation("selu"),
    "Softplus": _activation("softplus"),
    "Softsign": _activation("softsign"),
    "Exp": _activation("exponential"),
    "Softmax": _softmax("softmax"),
    "LogSoftmax": _softmax("log_softmax"),
    "LeakyRelu": lambda operation, name: layers.LeakyReLU(operation.negative_slope, name=name),
    "Mean": _mean,
    "Max": _max,
    "Reshape": _to_output_shape,
    "Squeeze": _to_output_shape,
    "ExpandDims": _to_output_shape,
    "Transpose": _permuted(_transpose_axes),
    "Swapaxes": _permuted(_swap_axes),
    "Concatenate": _concatenate,
    "GetItem": _get_item,
    "Resize": _resize,
    "MaxPool": _pool({3: layers.MaxPooling1D, 4: layers.MaxPooling2D, 5: layers.MaxPooling3D}),
    "AveragePool": _pool(
        {3: layers.AveragePooling1D, 4: layers.AveragePooling2D, 5: layers.AveragePooling3D}
    ),
}
