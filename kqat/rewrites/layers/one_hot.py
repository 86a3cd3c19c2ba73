"""Rewrites layers that turn indexes into quantities: embedding rows and one-hot codes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import layers, ops

from kqat.base import UnsupportedLayerError
from kqat.graph import Part
from kqat.parts import ConstantRows, Reduce, ReduceKind, total
from kqat.rewrites.layers.basic import Decomposed


def rows(table: np.ndarray, indices: Any, name: str, trained: bool) -> Any:
    """The rows of a matrix at `indices`, an integer tensor."""
    kind = layers.Embedding if trained else ConstantRows
    return Part(kind(*table.shape, name=name, trainable=trained), [table])(indices)


def truth(x: Any, values: tuple[float, float], shape: Sequence[int], name: str) -> Any:
    """Quantities of `shape`: `values[0]` where `x` is false and `values[1]` where it is true."""
    table = np.array([[v] for v in values], np.float32)
    return layers.Reshape(tuple(shape), name=name)(rows(table, x, f"{name}_rows", False))


def one_hot(indices: Any, classes: int, name: str) -> Any:
    """A one at each index, along a new last axis."""
    return rows(np.eye(classes, dtype=np.float32), indices, name, False)


def multi_hot(indices: Any, classes: int, name: str) -> Any:
    """A one at every index that occurs along the last axis; the classes replace that axis."""
    codes = one_hot(indices, classes, f"{name}_codes")
    return Reduce(ReduceKind.MAX, [len(codes.shape) - 2], False, name=name)(codes)


def category_encoding(layer: Any, name: str) -> Decomposed:
    """`CategoryEncoding` of indexes below its `num_tokens`."""
    if layer.sparse:
        raise UnsupportedLayerError(
            f"Expected a dense CategoryEncoding in layer '{name}'. Received: sparse=True. TFLite "
            "has no sparse tensors; use sparse=False."
        )

    def call(x: Any, count_weights: Any = None) -> Any:
        if count_weights is not None:
            raise UnsupportedLayerError(
                f"Expected layer '{name}' without count_weights. Received: some. Multiply one-hot "
                "codes by the weights and sum them."
            )
        if layer.output_mode == "multi_hot":
            return multi_hot(x, layer.num_tokens, name)
        codes = one_hot(x, layer.num_tokens, f"{name}_codes")
        if layer.output_mode == "count":
            return total(codes, [len(codes.shape) - 2], False, name)
        shape = layer.compute_output_shape(x.shape)
        return layers.Reshape(shape[1:], name=name)(codes)

    return call


def reversible_embedding(layer: Any, name: str) -> Decomposed:
    """`ReversibleEmbedding` as an `Embedding`, and backwards as a `Dense`.

    Where one table serves both ways, planning makes one layer of them: see
    `kqat.planning.tied_weights`.
    """
    table = layers.Embedding(
        layer.input_dim,
        layer.output_dim,
        embeddings_regularizer=layer.embeddings_regularizer,
        embeddings_constraint=layer.embeddings_constraint,
        trainable=layer.trainable,
        dtype=layer.dtype_policy,
        name=name,
    )
    forwards = Part(table, [np.asarray(layer.embeddings)])
    kernel = np.asarray(layer.embeddings).T if layer.tie_weights else layer.reverse_embeddings
    kernel = np.asarray(kernel)
    capped = layer.logit_soft_cap is not None
    logits = layers.Dense(
        kernel.shape[1],
        use_bias=False,
        trainable=layer.trainable,
        dtype=layer.dtype_policy,
        name=f"{name}_logits" if capped else name,
    )
    backwards = Part(logits, [kernel])

    def call(x: Any, reverse: bool = False) -> Any:
        if not reverse:
            return forwards(x)
        y = backwards(x)
        if not capped:
            return y
        bent = ops.tanh(ops.divide(y, layer.logit_soft_cap))
        return layers.Rescaling(layer.logit_soft_cap, name=name)(bent)

    return call
