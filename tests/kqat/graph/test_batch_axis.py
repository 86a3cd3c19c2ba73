"""A call may have the batch on another axis, or merged with windows: its parts have it first."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import kqat
from tests.kqat.graph.test_tracing_of_calls import ROWS, Own, _model, _parts


def queries_in_front(own: Any, x: Any) -> Any:
    """Queries, keys and values of one tensor, transposed to the front."""
    b, n, c = ops.shape(x)
    y = ops.reshape(ops.matmul(x, ops.concatenate([own.matrix] * 3, 1)), (b, n, 3, 2, 4))
    q, k, v = ops.unstack(ops.transpose(y, (2, 0, 3, 1, 4)), axis=0)
    a = ops.softmax(ops.matmul(q, ops.swapaxes(k, 2, 3)) + own.position[:, :6])
    return ops.reshape(ops.transpose(ops.matmul(a, v), (0, 2, 1, 3)), (b, n, c))


def picked_in_front(own: Any, x: Any) -> Any:
    """The same by indexes, and products by equations."""
    y = ops.moveaxis(ops.reshape(x, (-1, 6, 2, 2, 2)), 2, 0)
    scores = ops.einsum("bqhd,bkhd->bhqk", y[0], y[1])
    return ops.einsum("bhqk,bkhd->bqhd", ops.softmax(scores, axis=-1), y[1])


def windows(own: Any, x: Any) -> Any:
    """Windows merged into the batch, a mask that differs between windows, and back."""
    b, n, c = ops.shape(x)
    w = own.dense(ops.reshape(x, (-1, 3, c)))
    a = ops.matmul(w, ops.transpose(w, (0, 2, 1))) + own.position[:3, :3]
    a = ops.reshape(a, (ops.shape(a)[0] // 2, 2, 3, 3)) + np.float32([[[1]], [[2]]])
    a = ops.softmax(ops.reshape(a, (-1, 3, 3)))
    w = ops.matmul(a, w) - ops.mean(w, axis=-1, keepdims=True)
    w = ops.pad(ops.roll(w, 1, axis=1), ((0, 0), (1, 0), (0, 0)))[:, 1:, :]
    return ops.reshape(w, (b, n, c))


def windows_outside(own: Any, x: Any) -> Any:
    """Windows outside of the batch, of which sums are made."""
    y = ops.transpose(ops.reshape(x, (ops.shape(x)[0], 3, 2, 8)), (1, 0, 2, 3))
    y = ops.sum(ops.reshape(y, (-1, 2, 8)) @ own.matrix, axis=1)
    return ops.transpose(ops.reshape(y, (3, -1, 8)), (1, 0, 2))


def steps_first(own: Any, x: Any) -> Any:
    """Steps before the batch."""
    y = own.dense(ops.transpose(x, (1, 0, 2))) * own.bias
    y = ops.concatenate([ops.softmax(y, axis=0), ops.take(y, np.array([3, 1]), axis=0)], axis=0)
    return ops.transpose(ops.stack([y, y], axis=2), (1, 0, 2, 3))


def summed_over_windows(own: Any, x: Any) -> Any:
    """An equation of a weight and windows, whose shape Keras foresees by its letters."""
    y = ops.transpose(ops.reshape(x, (-1, 3, 2, 8)), (1, 0, 2, 3))
    y = ops.einsum("nm,mbtf->nbtf", np.tri(3, dtype=np.float32), y)
    return ops.transpose(y, (1, 0, 2, 3))


def nearest(own: Any, x: Any) -> Any:
    """The nearest row of a table for each step, as vector quantization looks them up."""
    flat, table = ops.reshape(x, (-1, 8)), np.eye(8, dtype=np.float32)[::-1].copy()
    found = ops.argmin(ops.matmul(flat, table), axis=1)
    rows = ops.matmul(ops.one_hot(found, 8), table.T.copy())
    return ops.reshape(rows, ops.shape(x))


def distances(own: Any, x: Any) -> Any:
    """The same by distances, of as many rows as there are steps: their squares are no bias."""
    flat, table = ops.reshape(x, (-1, 8)), np.arange(48, dtype=np.float32).reshape(8, 6) / 24 - 1
    squares = ops.sum(flat**2, axis=1, keepdims=True) + np.sum(table**2, axis=0)
    return ops.reshape(squares - 2 * ops.matmul(flat, table), (-1, 6, 6))


def one_by_one(own: Any, x: Any) -> Any:
    """A layer of fixed rank, called for each window."""
    return ops.reshape(own.parts[0](ops.reshape(x, (-1, 3, 8))), (-1, 6, 8))


def equation_beside_a_weight(own: Any, x: Any) -> Any:
    """Heads merged into the batch, an equation of which the weight lacks axes, a scalar beside."""
    y = ops.reshape(ops.transpose(ops.reshape(x, (-1, 6, 2, 4)), (0, 2, 1, 3)), (-1, 6, 4))
    y = ops.einsum("bnc,kc->bnk", y, own.matrix[:, :4]) * tf.constant(0.5)
    return ops.reshape(y, (-1, 2, 6, 8))


def tokens_of_windows(own: Any, x: Any) -> Any:
    """A weight that is joined to each window and stacked beside it, without and with a batch."""
    y = ops.reshape(x, (-1, 3, 8))
    token = ops.tile(own.bias[None, None], (ops.shape(y)[0], 1, 1))
    y = ops.concatenate([token, y, own.token + 0 * y[:, :1]], axis=1)
    beside = ops.broadcast_to(own.position[:5, :1], (ops.shape(y)[0], 5, 1))
    y = ops.concatenate([y, beside], axis=-1)[..., 1:]
    y = ops.sum(ops.stack([y, ops.broadcast_to(own.matrix[:5], ops.shape(y))], axis=2), axis=2)
    return ops.reshape(y, (-1, 10, 8))


def repeated_for_windows(own: Any, x: Any) -> Any:
    """One query of each sample for all of its windows, as in GCViT; steps and features again."""
    b, w = ops.shape(x)[0], ops.reshape(x, (-1, 3, 8))
    query = ops.mean(x, axis=1, keepdims=True)
    w = w * ops.repeat(query, ops.shape(w)[0] // b, axis=0) + own.bias
    w = ops.repeat(ops.repeat(w, 2, axis=0), 2, axis=1) * ops.repeat(query, 4, axis=0)
    return ops.reshape(w, (-1, 24, 8))


def tiled_for_windows(own: Any, x: Any) -> Any:
    """All samples again for each of the windows outside of the batch."""
    y = ops.transpose(ops.reshape(x, (-1, 3, 2, 8)), (1, 0, 2, 3))
    y = ops.reshape(y, (-1, 2, 8)) * ops.tile(x[:, :2], [3, 1, 1]) + own.bias
    y = ops.tile(ops.tile(y, [2, 1, 2]), [2, 1])[..., :8]
    return ops.transpose(ops.reshape(y, (6, -1, 4, 8)), (1, 0, 2, 3))


CALLS = (
    queries_in_front, picked_in_front, windows, windows_outside, steps_first, one_by_one,
    equation_beside_a_weight, summed_over_windows, nearest, distances, tokens_of_windows,
    repeated_for_windows, tiled_for_windows,
)  # fmt: skip


def _own(call: Callable[[Any, Any], Any]) -> Own:
    own = Own(call)
    own.parts = [layers.Conv1D(8, 3, padding="same", name="conv")]
    own.parts[0].build((None, 3, 8))
    return own


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_parts_compute_the_same_with_the_batch_first(call: Callable[[Any, Any], Any]) -> None:
    model = _model(_own(call))
    parts = _parts(model)
    np.testing.assert_allclose(parts(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)
    assert all(
        t.shape[0] is None for layer in parts.layers for t in keras.tree.flatten(layer.output)
    )


@pytest.mark.slow
def test_windows_outside_of_a_layer_are_moved_too() -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 8), name="x")
    y = ops.reshape(x, (-1, 3, 8))
    y = layers.LayerNormalization(name="norm")(layers.Dense(8, name="dense")(y))
    y = layers.MultiHeadAttention(2, 4, name="attention")(y, y)
    y = layers.Flatten(name="flat")(ops.reshape(y, (-1, 6, 8)))
    inside = keras.Model(x, layers.Dense(3, name="head")(y), name="inside")
    z = keras.Input((6, 8), name="z")
    for model in (inside, keras.Model(z, inside(z))):
        parts = _parts(model)
        np.testing.assert_allclose(parts(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)
    names = {layer.name for layer in kqat.quantize_model(inside, calibration_data=ROWS).layers}
    assert any("head" in name for name in names)


def next_sample(own: Any, x: Any) -> Any:
    """The batch itself is rolled: every sample gets another's values."""
    return ops.transpose(ops.roll(ops.transpose(x, (1, 0, 2)), 1, axis=1), (1, 0, 2))


def of_all(own: Any, x: Any) -> Any:
    """A softmax over the samples."""
    return ops.transpose(ops.softmax(ops.transpose(x, (1, 2, 0)), axis=-1), (2, 0, 1))


@pytest.mark.parametrize("call", [next_sample, of_all])
def test_who_mixes_samples_is_named(call: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(kqat.UnsupportedLayerError, match=r"'own'.*(Roll|Softmax) of shapes"):
        kqat.plan(_model(_own(call)))


def test_a_weight_beside_moved_axes_is_trained() -> None:
    qat = kqat.quantize_model(_model(_own(windows)), calibration_data=ROWS)
    assert {v.name for v in qat.trainable_variables} >= {"kernel", "bias", "value"}


class Heads(layers.Layer):
    """Heads of an equation that was built for steps of no size, beside a mask's own batch axis."""

    def __init__(self) -> None:
        super().__init__(name="heads")
        self.split = layers.EinsumDense("bqm,mnh->bqnh", (None, 2, 4))
        self.split.build((None, None, 8))

    def call(self, x: Any) -> Any:
        """Attention whose scores get a bias of places, which are computed with the batch behind."""
        y = self.split(x)
        places = ops.cumsum(ops.cast(x[..., 0] > 0, "int32"), axis=-1)[:, None, :]
        slopes = ops.convert_to_tensor([[0.5], [0.25]])
        bias = ops.expand_dims(slopes * ops.cast(places, "float32"), 0)
        scores = ops.einsum("bqnh,bknh->bnqk", y, y) + ops.transpose(bias, [1, 2, 0, 3])
        return ops.einsum("bnqk,bknh->bqnh", ops.softmax(scores), y)


def test_equations_beside_a_moved_batch_know_the_sizes() -> None:
    """EinsumDense told the shape that it was built for: the next equation failed on a size None."""
    x = keras.Input((6, 8))
    plan = kqat.plan(keras.Model(x, layers.Dense(3)(Heads()(x))))
    assert plan.float_layers() == ()
