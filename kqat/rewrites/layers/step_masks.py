"""Rewrites layers that make masks of steps, or leave masked steps out of a mean."""

from typing import Any

import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import holds_indexes, is_tensor
from kqat.parts import Hold, IndexKind, IndexOperation, Matmul
from kqat.rewrites.layers.basic import Decomposed
from kqat.rewrites.layers.one_hot import rows
from kqat.rewrites.layers.whole_numbers import folded

# Counts below this times the least of a group have their inverses on one grid: the least inverse is
# then 64 of 255 steps of an 8-bit grid, and so at most 0.8 % off.
_GROUP = 4


def masking(layer: Any, name: str) -> Decomposed:
    """`Masking` of steps that are all zeros: it hands its input on, as they are zeros already.

    The mask itself stands in the graph as the comparisons that Keras makes it of. They read the
    rounded input. Zero is a point of every grid, so a step of zeros is masked in the file as well;
    so is a step in which each number rounds to zero, in training as in the file.

    Raises:
        UnsupportedLayerError: if another value than zero marks the steps.
    """
    if np.size(layer.mask_value) != 1 or float(np.asarray(layer.mask_value).item()) != 0.0:
        raise UnsupportedLayerError(
            f"Expected mask_value=0.0 in Masking layer '{name}'. Received: {layer.mask_value}. "
            "Zero alone is a point of every integer grid; another value is rounded, so that steps "
            "with it would not be found. Pad with zeros."
        )
    return layers.Identity(name=name)


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

    Inverses of all counts would be too coarse on one grid, so counts come in groups, each with a
    product of its own, and the count chooses between the means. A row without steps has mean zero,
    where Keras has NaN.
    """

    def call(x: Any, mask: Any = None) -> Any:
        shown = truth_of_steps(mask, name)
        if shown is None:
            raise UnsupportedLayerError(
                f"Expected a mask in all calls of layer '{name}' or in none. Received: both."
            )
        steps, width = x.shape[1:]
        ones = _index(IndexKind.MULTIPLY, shown, 1, f"{name}_ones")
        count = folded(IndexKind.ADD, ones, [1], True, f"{name}_count")
        least = [_GROUP**group for group in range(steps.bit_length()) if _GROUP**group <= steps]
        # One more step of zeros for each group, whose weight is the group's largest: so the range
        # of the weights is right though calibration may see no row of so few steps.
        none = _index(IndexKind.MULTIPLY, count, 0, f"{name}_none")
        counts = [
            IndexOperation(IndexKind.MULTIPLY, name=f"{name}_counts")([ones, count]),
            _index(IndexKind.ADD, none, least, f"{name}_least"),
        ]
        together = {"axis": -1}
        counts = IndexOperation(IndexKind.CONCATENATE, together, name=f"{name}_all_counts")(counts)
        x = layers.ZeroPadding1D((0, len(least)), name=f"{name}_padded")(x)
        mean = None
        for first in least:
            part = f"{name}_from_{first}"
            inverse = [[1 / n if first <= n < first * _GROUP else 0.0] for n in range(steps + 1)]
            weights = rows(np.array(inverse, np.float32), counts, f"{part}_weights", False)
            weights = layers.Reshape((1, weights.shape[1]), name=f"{part}_row")(weights)
            product = Matmul(name=f"{part}_mean")([weights, x])
            last = first == least[-1] and not layer.keepdims
            here = layers.Reshape((width,), name=name if last and mean is None else part)(product)
            if mean is not None:
                reaches = _index(IndexKind.GREATER_EQUAL, count, first, f"{part}_reached")
                here = Hold(name=name if last else f"{part}_chosen")([reaches, here, mean])
            mean = here
        return layers.Reshape((1, width), name=name)(mean) if layer.keepdims else mean

    return call


def _index(kind: IndexKind, x: Any, other: Any, name: str) -> Any:
    return IndexOperation(kind, {"x2": other}, name=name)(x)
