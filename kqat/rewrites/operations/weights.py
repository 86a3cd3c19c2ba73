"""Weights in the place of tensors: which operations take them, and what stands for them elsewhere.

A product or sum with a weight is a layer that owns it. Elsewhere the weight becomes a value.
"""

from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, holds_indexes
from kqat.parts import (
    ConstantKind,
    IndexKind,
    IndexOperation,
    Learned,
    Matmul,
    Slice,
    WithConstant,
)
from kqat.rewrites.layers.one_hot import rows

# Operations and layers whose rows make a layer of a weight.
TAKE_WEIGHTS = frozenset(
    (
        "Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum", "Where",
        "Power", "FFT2",
        "Matmul", "Einsum", "Tensordot", "Dot", "Inner", "Take", "Conv", "DepthwiseConv",
        "ConvTranspose", "DotProductAttention", "SimpleRNNCell", "GRUCell", "LSTMCell",
    )
)  # fmt: skip
# Those among them whose operands all have the batch's size.
WANT_BATCH = frozenset(("FFT2",))
# Operations that hand a weight on: it ships as a constant on their grid.
_HAND_ON = ("Concatenate", "Stack", "Append", "Hstack", "Dstack", "Vstack")


def is_weight(value: Any) -> bool:
    """Whether a value is a variable, or a constant array of quantities."""
    if isinstance(value, keras.KerasTensor):
        return False
    if isinstance(value, keras.Variable):
        return True
    array = isinstance(value, np.ndarray) or keras.ops.is_tensor(value)
    return (
        array
        and len(value.shape) > 0
        and keras.backend.is_float_dtype(keras.backend.standardize_dtype(value.dtype))
    )


def as_values(layer: Any, args: Any, kwargs: Any, name: str) -> tuple[Any, Any]:
    """The arguments of a call with values in place of the weights that it cannot take.

    Args:
        layer: a layer or operation.
        args: of the call: symbolic tensors, variables, constants.
        kwargs: of the call.
        name: that the parts' names begin with.

    Raises:
        UnsupportedLayerError: if a weight has a batch axis.
    """
    flat = keras.tree.flatten((args, kwargs))
    weights = {id(v): v for v in flat if is_weight(v)}
    takes = type(layer).__name__ in TAKE_WEIGHTS and not isinstance(layer, Matmul)
    if not weights or takes:
        return args, kwargs
    is_layer = isinstance(layer, layers.Layer)
    if not is_layer:
        # Numbers and arrays are options of an operation; rows know which.
        hands_on = type(layer).__name__ in _HAND_ON
        weights = {k: v for k, v in weights.items() if hands_on or isinstance(v, keras.Variable)}
    tensors = [t for t in flat if isinstance(t, keras.KerasTensor)]
    if not weights or not tensors:
        return args, kwargs
    hands_on = isinstance(layer, layers.Concatenate) or type(layer).__name__ in _HAND_ON
    make = emitted if hands_on else computed
    rank = len(tensors[0].shape)
    values = {
        key: make(weight, tensors[0], rank, f"{name}_weight_{i}" if i else f"{name}_weight")
        for i, (key, weight) in enumerate(weights.items())
    }
    return keras.tree.map_structure(lambda x: values.get(id(x), x), (args, kwargs))


def _value(weight: Any, rank: int, name: str) -> tuple[np.ndarray, bool]:
    """A weight without its batch axis, and whether it is trained."""
    array = np.asarray(weight, np.float32)
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if array.shape[0] != 1:
        raise UnsupportedLayerError(
            f"Expected a weight that is the same for all samples in '{name}'. Received: shape "
            f"{array.shape}. Let its first axis, the batch, be 1."
        )
    return array[0], isinstance(weight, keras.Variable) and weight.trainable


def emitted(weight: Any, like: Any, rank: int, name: str) -> Any:
    """A weight as a constant of the file, which only operators of one scale can read."""
    array, trained = _value(weight, rank, name)
    return Part(Learned(list(array.shape), name=name, trainable=trained), [array])(like)


def computed(weight: Any, like: Any, rank: int, name: str) -> Any:
    """A weight as a value that an operator computes: zero plus the weight."""
    array, trained = _value(weight, rank, name)
    if holds_indexes(like):
        first = _first_element(like, len(array.shape), name)
        none = IndexOperation(IndexKind.MULTIPLY, {"x2": 0}, name=f"{name}_zero")(first)
        row = rows(array.reshape(1, -1), none, f"{name}_row", trained)
        return layers.Reshape(array.shape, name=name)(row)
    layer = WithConstant(ConstantKind.ADD, [1, *array.shape], name=name, trainable=trained)
    return Part(layer, [array[None]])(zero(like, len(array.shape), name))


def on_grid_of(x: Any, constant: Any, name: str) -> Any:
    """A constant as values of the grid of `x`, whose range then holds it.

    It stands beside a number of `x` for that: what is joined has one scale.

    Args:
        x: quantities `(batch, …)`.
        constant: numbers without the batch, whose shape broadcasts with that of `x`.
        name: that the parts' names begin with.
    """
    rank = len(x.shape)
    array, _ = _value(constant, rank, name)
    first = _first_element(x, 1, name)
    flat = emitted(array.reshape(1, -1), x, 2, f"{name}_constant")
    whole = layers.Concatenate(axis=-1, name=f"{name}_beside")([first, flat])
    row = Slice([1], [1 + array.size], [1], name=f"{name}_rounded")(whole)
    if array.shape == row.shape[1:]:
        return row
    return layers.Reshape(array.shape, name=f"{name}_number")(row)


def zero(like: Any, rank: int, name: str) -> Any:
    """Zero for each sample of a tensor of quantities, of shape `(batch, 1, …)`.

    Args:
        like: the tensor.
        rank: how many axes of 1 follow the batch.
        name: that the parts' names begin with.
    """
    first = _first_element(like, rank, name)
    return layers.Subtract(name=f"{name}_zero")([first, first])


def _first_element(x: Any, rank: int, name: str) -> Any:
    """One number of each sample, of shape `(batch, 1, …)`."""
    ones = [1] * (len(x.shape) - 1)
    first = Slice([0 for _ in ones], ones, ones, name=f"{name}_first")(x) if ones else x
    return layers.Reshape((1,) * rank, name=f"{name}_one")(first)
