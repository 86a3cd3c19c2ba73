"""Where weights are read, and by what copies of them are known again."""

from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

from kqat.graph import SharedWeight, WeightReads, holders, trace
from kqat.graph.sharing import Read
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
    assert reads.are_told_apart([shared])
    dense.kernel.assign(np.ones((4, 4)))
    assert not reads.are_told_apart([shared])


KERNEL = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)


def _read(numbers: Any) -> Read:
    return Read((id(numbers),), "reader", False, numbers=np.asarray(numbers, np.float32))


def test_parts_without_a_number_in_common_divide_a_weight() -> None:
    def divided(*numbers: Any, weight: np.ndarray = KERNEL) -> bool:
        reads = tuple(map(_read, numbers))
        return SharedWeight(keras.Variable(weight), reads).is_divided

    assert divided(KERNEL[:, :1], KERNEL[:, 1:].T)
    assert divided(KERNEL[0], KERNEL[1, :2])
    assert not divided(KERNEL[0], KERNEL[:, 0])  # Both read the first.
    assert not divided(KERNEL[0], 2.5 * KERNEL[1])  # Computed.
    assert not divided([1.0], [1.0], weight=np.ones(2))  # Nobody knows which they are.
    whole = Read((0,), "reader")
    assert not SharedWeight(keras.Variable(KERNEL), (whole, _read(KERNEL[0]))).is_divided


def test_vectors_are_computed_and_numbers_picked_out() -> None:
    def of_vectors(variable: Any, *reads: Read) -> bool:
        return SharedWeight(keras.Variable(variable), reads).is_of_vectors

    whole = Read((0,), "reader")
    assert of_vectors(KERNEL, _read([3.0]), _read(0.5))
    assert of_vectors(0.5, whole, _read(0.25))
    assert not of_vectors(0.5, whole, Read((1,), "other"))  # One number, which can be tied.
    assert not of_vectors(KERNEL, _read([3.0]), _read([3.0, 4.0]))
    assert not of_vectors(KERNEL, whole, _read([3.0]))
    assert of_vectors(KERNEL[0], whole, _read(1 - KERNEL[:1]))
    assert not of_vectors(KERNEL[0], whole, _read(KERNEL[0, :2]))
    assert not of_vectors(KERNEL, whole, _read(1 - KERNEL))


def test_holders_are_found_by_numbers_in_any_order() -> None:
    x, dense = keras.Input((4,)), L.Dense(3)
    graph = trace(keras.Model(x, dense(x)))
    ((layer, variable),) = holders(graph, np.asarray(dense.kernel).T)
    assert layer is dense and variable is dense.kernel
