"""Attention masks in integers: masked scores are clipped so low that softmax makes them zero.

Keras adds a huge negative number to a masked score. An 8-bit grid cannot hold that number and
the other scores as well. The file adds `arithmetic.HIDDEN` instead, and the range of the sum
ends a little below the smallest unmasked score (`arithmetic.shown_bounds`). The integer kernel
clips masked scores to that lower end.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, holds_indexes, is_tensor
from kqat.grids import HIDDEN
from kqat.parts import ConstantKind, Hide, IndexKind, IndexOperation, WithConstant
from kqat.rewrites.layers.basic import Decomposed
from kqat.rewrites.layers.one_hot import truth


def causal(queries: int, keys: int) -> np.ndarray:
    """The causal mask `(queries, keys)`: each step attends to itself and to earlier steps."""
    return np.tri(queries, keys, dtype=bool)


def window(queries: int, keys: int, size: int) -> np.ndarray:
    """The mask `(queries, keys)` of a sliding window: steps less than `size` away are kept."""
    return np.abs(np.subtract.outer(np.arange(queries), np.arange(keys))) < size


@dataclasses.dataclass(frozen=True)
class Keep:
    """The keys that each query may attend to: those that `constant` and `seen` both allow.

    `constant` has shape `(queries, keys)`. `seen` is a boolean tensor of shape
    `(batch, queries or 1, keys or 1)`. `None` allows all keys.
    """

    constant: np.ndarray | None
    seen: Any

    @classmethod
    def of(
        cls,
        name: str,
        *,
        pairs: Sequence[Any] = (),
        queries: Sequence[Any] = (),
        keys: Sequence[Any] = (),
    ) -> "Keep":
        """All masks of one layer combined; entries that are `None` are skipped.

        Args:
            name: the layer's name.
            pairs: arrays of shape `(queries, keys)`, with or without a batch axis of one, or
                tensors of shape `(batch, queries, keys)`.
            queries: tensors of shape `(batch, queries)`.
            keys: tensors of shape `(batch, keys)`.

        Raises:
            UnsupportedLayerError: if a mask has another shape or is not boolean.
        """
        arrays = [_array(m, name) for m in pairs if m is not None and not is_tensor(m)]
        tensors: list[tuple[Any, int, Any]] = [(m, 3, None) for m in pairs if is_tensor(m)]
        tensors += [(m, 2, (m.shape[1], 1)) for m in queries if m is not None]
        tensors += [(m, 2, (1, m.shape[1])) for m in keys if m is not None]
        seen = None
        for i, (mask, rank, shape) in enumerate(tensors):
            part = f"{name}_mask_{i}" if i else f"{name}_mask"
            more = _checked(mask, rank, shape, part, name)
            both = IndexOperation(IndexKind.LOGICAL_AND, name=f"{part}_and")
            seen = more if seen is None else both([seen, more])
        return cls(np.logical_and.reduce(arrays) if arrays else None, seen)

    def hides_rows(self) -> bool:
        """Whether all keys of some query may be masked."""
        constant = self.constant
        return self.seen is not None or (constant is not None and not constant.any(axis=1).all())


def attended(scores: Any, keep: Keep, name: str, *, zeros: bool) -> Any:
    """`softmax(scores)` over the last axis, with zeros where `keep` masks a key.

    Args:
        scores: `(batch, …, queries, keys)`.
        keep: the masks.
        name: the layer's name.
        zeros: whether a query with all keys masked has weights of zero. If not, its weights
            are equal.
    """
    rank = len(scores.shape)
    if keep.constant is not None:
        bias = np.where(keep.constant, 0.0, HIDDEN)
        scores = _constant(ConstantKind.HIDE, bias, f"{name}_hidden")(scores)
    if keep.seen is not None:
        bias = _quantity(keep.seen, (HIDDEN, 0.0), rank, f"{name}_bias")
        # The bias comes first: Keras treats a vector that comes second as a bias addition.
        scores = Hide(name=f"{name}_masked")([bias, scores])
    weights = layers.Softmax(name=f"{name}_weights")(scores)
    if not zeros or not keep.hides_rows():
        return weights
    if keep.constant is not None:
        weights = _constant(ConstantKind.MULTIPLY, keep.constant, f"{name}_shown")(weights)
    if keep.seen is not None:
        factor = _quantity(keep.seen, (0.0, 1.0), rank, f"{name}_factor")
        weights = layers.Multiply(name=f"{name}_kept")([weights, factor])
    return weights


def softmax(layer: Any, name: str) -> Decomposed | None:
    """`Softmax` over an axis that is not the last, between two permutations."""
    return None if layer.axis == -1 else masked_softmax(layer, name)


def masked_softmax(layer: Any, name: str) -> Decomposed:
    """`Softmax` of scores and a mask that broadcasts with them, as attention computes it."""

    def call(x: Any, mask: Any = None) -> Any:
        rank = len(x.shape)
        axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
        if len(axes) != 1 or axes[0] % rank == 0:
            raise UnsupportedLayerError(
                f"Expected a softmax over one axis behind the batch in layer '{name}'. Received: "
                f"axis={layer.axis}. Reshape so that it is one."
            )
        axis, order = axes[0] % rank, [*range(1, rank)]
        order[axis - 1], order[-1] = order[-1], order[axis - 1]
        moved = axis != rank - 1
        if moved:
            x = layers.Permute(order, name=f"{name}_moved")(x)
        shown = None
        if mask is not None:
            x, shown = _hidden(x, mask, order, name)
        plain = not moved and shown is None
        weights = layers.Softmax(name=name if plain else f"{name}_values")(x)
        if shown is not None:
            # Where all is hidden softmax finds all alike, and Keras says zero.
            weights = shown(weights, name if not moved else f"{name}_shown")
        return layers.Permute(order, name=name)(weights) if moved else weights

    return call


def hidden_scores(scores: Any, mask: Any, name: str) -> Any:
    """Scores, below all others where a mask that broadcasts with them is false."""
    return _hidden(scores, mask, [*range(1, len(scores.shape))], name)[0]


def _hidden(
    scores: Any, mask: Any, order: list[int], name: str
) -> tuple[Any, Callable[[Any, str], Any] | None]:
    """Scores, below all others where a mask is false, and what makes zeros there of weights.

    The latter is `None` where no row is hidden as a whole.
    """
    rank = len(scores.shape)
    if not is_tensor(mask):
        array = np.asarray(mask) > 0.5
        array = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(0, *order)
        scores = _constant(ConstantKind.HIDE, np.where(array, 0.0, HIDDEN), f"{name}_hidden")(
            scores
        )
        if array.any(axis=-1).all():
            return scores, None
        return scores, lambda weights, last: _constant(ConstantKind.MULTIPLY, array, last)(weights)
    if len(mask.shape) != rank:
        raise _wrong(name, f"a tensor of shape {tuple(mask.shape)} and type {mask.dtype}")
    if mask.dtype != "bool":
        limit = 0 if holds_indexes(mask) else 0.5
        mask = IndexOperation(IndexKind.GREATER, {"x2": limit}, name=f"{name}_mask_true")(mask)
    if order != [*range(1, rank)]:
        mask = layers.Permute(order, name=f"{name}_mask_moved")(mask)
    bias = truth(mask, (HIDDEN, 0.0), mask.shape[1:], f"{name}_bias")
    factor = truth(mask, (0.0, 1.0), mask.shape[1:], f"{name}_factor")
    scores = Hide(name=f"{name}_masked")([bias, scores])
    return scores, lambda weights, last: layers.Multiply(name=last)([weights, factor])


def zeroed(x: Any, keep: Keep, name: str) -> Any:
    """`x` of shape `(batch, steps, features)` with zeros at the queries that `keep` masks."""
    factor = _quantity(keep.seen, (0.0, 1.0), 3, f"{name}_factor")
    return layers.Multiply(name=name)([x, factor])


def _constant(kind: ConstantKind, value: np.ndarray, name: str) -> Part:
    layer = WithConstant(kind, list(value.shape), name=name, trainable=False)
    return Part(layer, [value.astype(np.float32)])


def _quantity(seen: Any, values: tuple[float, float], rank: int, name: str) -> Any:
    return truth(seen, values, (*(1,) * (rank - 3), *seen.shape[1:]), name)


def _array(mask: Any, name: str) -> np.ndarray:
    array = np.asarray(mask).astype(bool)
    while array.ndim > 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 2:
        raise _wrong(name, f"a constant of shape {array.shape}")
    return array


def _checked(mask: Any, rank: int, shape: Any, part: str, name: str) -> Any:
    if not holds_indexes(mask) or len(mask.shape) != rank:
        raise _wrong(name, f"a tensor of shape {tuple(mask.shape)} and type {mask.dtype}")
    if mask.dtype != "bool":
        mask = IndexOperation(IndexKind.NOT_EQUAL, {"x2": 0}, name=f"{part}_true")(mask)
    return mask if shape is None else layers.Reshape(shape, name=part)(mask)


def _wrong(name: str, found: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"Expected boolean masks in attention layer '{name}', of shape (batch, queries, keys), or "
        f"(batch, steps) from the layers before. Received: {found}. Use one mask for all heads, "
        "and turn numbers into booleans by a comparison."
    )
