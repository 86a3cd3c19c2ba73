"""Where weights are read, and by what copies of them are known again."""

from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

from kqat.graph import WeightReads, holders, trace
from kqat.graph.values import fingerprint


def test_the_order_of_numbers_leaves_a_fingerprint_as_it_is() -> None:
    array = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    assert fingerprint(array) == fingerprint(array.T) == fingerprint(array.reshape(-1)[::-1])
    other = array.copy()
    other[0, 0] = np.nextafter(other[0, 0], np.float32(9))
    assert fingerprint(array) != fingerprint(other)
    assert fingerprint(array) != fingerprint(array[:4])


def _reads(x: Any, y: Any) -> WeightReads:
    reads = WeightReads()
    reads.note_model(trace(keras.Model(x, y)), lambda node: False)
    return reads


def test_a_layer_called_twice_is_one_place() -> None:
    x, dense = keras.Input((4,)), L.Dense(4)
    assert not _reads(x, dense(dense(x))).shared()


def test_an_operation_that_reads_a_kernel_is_another() -> None:
    x, dense = keras.Input((4,)), L.Dense(4, name="dense")
    reads = _reads(x, ops.matmul(dense(x), dense.kernel))
    (shared,) = reads.shared()
    assert shared.variable is dense.kernel
    assert shared.readers == "'dense' and 'matmul' read"
    assert reads.are_told_apart()
    dense.kernel.assign(np.ones((4, 4)))
    assert not reads.are_told_apart()


def test_holders_are_found_by_numbers_in_any_order() -> None:
    x, dense = keras.Input((4,)), L.Dense(3)
    graph = trace(keras.Model(x, dense(x)))
    ((layer, variable),) = holders(graph, np.asarray(dense.kernel).T)
    assert layer is dense and variable is dense.kernel
