"""Rewrites layers that make masks of steps, or leave masked steps out of a mean."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import layers, ops

from kqat.base import UnsupportedLayerError
from kqat.graph import holds_indexes, is_tensor
from kqat.parts import Hold, IndexKind, IndexOperation, Matmul
from kqat.rewrites.layers.basic import Decomposed
from kqat.rewrites.layers.one_hot import rows
from kqat.rewrites.layers.whole_numbers import folded
from kqat.rewrites.operations.binary import FAR_BELOW

# Factors above the largest of a group over this lie on one grid: the least is then 64 of 255 steps
# of an 8-bit grid, and so at most 0.8 % off.
_GROUP = 4


def masking(layer: Any, name: str) -> Decomposed:
    """`Masking`: of steps that are all zeros it hands its input on, as they are zeros already.

    The mask itself stands in the graph as the comparisons that Keras makes it of. They read the
    rounded input, and compare it with the rounded value that marks the steps. So a step of that
    value is masked in the file as well; so is a step in which each number rounds to it, in training
    as in the file. Such steps become zeros, as in Keras.

    Raises:
        UnsupportedLayerError: if a value marks the steps that no grid holds beside others.
    """
    value = np.asarray(layer.mask_value, np.float32)
    if not value.any():
        return layers.Identity(name=name)
    if not np.all(np.isfinite(value) & (np.abs(value) < -FAR_BELOW)):
        raise UnsupportedLayerError(
            f"Expected a mask_value in Masking layer '{name}' beside which a grid holds other "
            f"values. Received: {layer.mask_value}. Pad with zeros, as x[(x == {value.tolist()})"
            ".all(-1)] = 0 does in NumPy, in training and on the device."
        )

    def call(x: Any) -> Any:
        shown = ops.any(ops.not_equal(x, value), axis=-1, keepdims=True)
        return ops.where(shown, x, 0.0)

    return call


def truth_of_steps(mask: Any, name: str) -> Any:
    """A mask of shape `(batch, steps)` as truth values, or `None` where there is none.

    Raises:
        UnsupportedLayerError: if it has another shape, or is none of the model's tensors.
    """
    if mask is None:
        return None
    if not is_tensor(mask) or len(mask.shape) != 2 or not holds_indexes(mask):
        raise UnsupportedLayerError(
            f"Expected a boolean mask of shape (batch, steps) in layer '{name}'. Received: "
            f"{type(mask).__name__} of shape {tuple(np.shape(mask))} and type "
            f"{getattr(mask, 'dtype', 'unknown')}. Turn numbers into truth values by a comparison, "
            "and make a mask that is the same for all samples an input of the model."
        )
    if mask.dtype == "bool":
        return mask
    return IndexOperation(IndexKind.NOT_EQUAL, {"x2": 0}, name=f"{name}_mask_true")(mask)


def mean_of_shown(layer: Any, name: str) -> Decomposed:
    """`GlobalAveragePooling1D` with a mask: products with the inverse of the count of steps.

    A row without steps has mean zero, where Keras has NaN.
    """
    if layer.data_format != "channels_last":
        raise UnsupportedLayerError(
            f"Expected data_format='channels_last' in layer '{name}', whose input has a mask. "
            f"Received: {layer.data_format!r}, with which the steps are the last axis, and a mask "
            "is of the first. Permute the input, or take the mask off it."
        )

    def call(x: Any, mask: Any = None) -> Any:
        shown = truth_of_steps(mask, name)
        if shown is None:
            raise UnsupportedLayerError(
                f"Expected a mask in all calls of layer '{name}' or in none. Received: both. "
                "Use two layers."
            )
        steps, width = x.shape[1:]
        ones = _index(IndexKind.MULTIPLY, shown, 1, f"{name}_ones")
        count = folded(IndexKind.ADD, ones, [1], True, f"{name}_count")
        inverses = np.array([0.0, *(1.0 / n for n in range(1, steps + 1))])
        shape = (1, width) if layer.keepdims else (width,)
        return scaled_sum(x, ones, count, inverses, name, shape)

    return call


def scaled_sum(
    x: Any, shown: Any, count: Any, factors: np.ndarray, name: str, shape: Sequence[int]
) -> Any:
    """The sum over steps times a factor that depends on a count, such as the count's inverse.

    Factors of all counts would be too coarse on one grid, and so would the sums; so counts come in
    groups, each with a product of its own, and the count chooses between the results.

    Args:
        x: quantities `(batch, steps, width)`, or `(batch, rows, steps, width)` with a count of each
            row.
        shown: zeros and ones, `(batch, …, steps)`; `None` if all steps count. Where it is given,
            `factors[0]` is zero.
        count: integers `(batch, …, 1)`.
        factors: one for each count from zero on. From the first that is not zero on they are
            positive and do not grow.
        name: of the last layer; those of the others begin with it.
        shape: of the result, without the batch.
    """
    *outer, steps, width = x.shape[1:]
    least = first_of_groups(factors)
    # One more step of zeros for each group, whose weight is the group's largest: so the range of
    # the weights is right though calibration may see no row of so few steps.
    none = _index(IndexKind.MULTIPLY, count, 0, f"{name}_none")
    if shown is None:
        each = _index(IndexKind.MULTIPLY, count, [1] * steps, f"{name}_counts")
    else:
        each = IndexOperation(IndexKind.MULTIPLY, name=f"{name}_counts")([shown, count])
    # Keras takes a vector that is added behind rows for a bias of the rows.
    larger = IndexKind.MAXIMUM if outer else IndexKind.ADD
    counts = [each, _index(larger, none, least, f"{name}_least")]
    counts = IndexOperation(IndexKind.CONCATENATE, {"axis": -1}, name=f"{name}_all_counts")(counts)
    if outer:
        x = layers.ZeroPadding2D(((0, 0), (0, len(least))), "channels_last", name=f"{name}_padded")(
            x
        )
    else:
        x = layers.ZeroPadding1D((0, len(least)), "channels_last", name=f"{name}_padded")(x)
    flat, chosen = (*outer, width), None
    for first, end in zip(least, [*least[1:], len(factors)], strict=True):
        part = f"{name}_from_{first}"
        table = [[factors[n] if first <= n < end else 0.0] for n in range(len(factors))]
        weights = rows(np.array(table, np.float32), counts, f"{part}_weights", False)
        weights = layers.Reshape((*outer, 1, steps + len(least)), name=f"{part}_row")(weights)
        product = Matmul(name=f"{part}_mean")([weights, x])
        last = first == least[-1] and tuple(shape) == flat
        here = layers.Reshape(flat, name=name if last and chosen is None else part)(product)
        if chosen is not None:
            reaches = _index(IndexKind.GREATER_EQUAL, count, first, f"{part}_reached")
            here = Hold(name=name if last else f"{part}_chosen")([reaches, here, chosen])
        chosen = here
    return chosen if tuple(shape) == flat else layers.Reshape(tuple(shape), name=name)(chosen)


def first_of_groups(factors: np.ndarray) -> list[int]:
    """The least count of each group whose factors one grid serves."""
    least: list[int] = []
    for count, factor in enumerate(factors):
        if factor and (not least or factor * _GROUP <= factors[least[-1]]):
            least.append(count)
    return least


def _index(kind: IndexKind, x: Any, other: Any, name: str) -> Any:
    return IndexOperation(kind, {"x2": other}, name=name)(x)
