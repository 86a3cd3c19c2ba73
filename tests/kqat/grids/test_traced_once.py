"""`traced_once`: one trace for all calls with tensors of the same shapes, and the same numbers."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from kqat.grids import traced_once


def test_calls_in_graphs_share_a_trace() -> None:
    shapes = []

    @traced_once
    def widest(x: Any, y: Any) -> tuple[Any, Any, None]:
        shapes.append(tuple(x.shape))
        return ops.maximum(x, y) * 2.0, ops.minimum(x, y), None

    variable = keras.Variable(np.float32([1.0, 5.0]), trainable=False)

    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for _ in range(3):
                high, low, nothing = widest(variable.value, tf.stop_gradient(y))
                assert nothing is None
                y = y + high - low
        return y, tape.gradient(y, x)

    graphs = [tf.function(step, autograph=False) for _ in range(2)]
    y = tf.constant([3.0, 2.0])
    expected, gradient = step(y)
    np.testing.assert_array_equal(gradient, np.ones(2))
    eager = len(shapes)
    for graph in graphs:
        found = graph(y)
        np.testing.assert_array_equal(found[0], expected)
        np.testing.assert_array_equal(found[1], gradient)
    assert (eager, len(shapes)) == (3, 4)
    # The variable is read when it is called, not when it was traced.
    variable.assign([7.0, 7.0])
    np.testing.assert_array_equal(graphs[0](y)[0], step(y)[0])
    graph = graphs[0].get_concrete_function(y).graph
    kinds = [operation.type for operation in graph.get_operations()]
    assert kinds.count("PartitionedCall") == 3  # Without a second for its gradient.
    assert "Maximum" not in kinds
    # Another shape is another trace; the same one again is none.
    for _ in range(2):
        tf.function(lambda x: widest(x, x)[0], autograph=False)(tf.zeros((4, 1)))
    assert shapes.count((4, 1)) == 1


def test_numbers_alone_have_the_type_of_their_time() -> None:
    @traced_once
    def number(x: Any) -> Any:
        return ops.where(x > 0.0, 1.0, 2.0)

    def dtype() -> str:
        return tf.function(number, autograph=False)(tf.zeros(2)).dtype.name

    assert dtype() == "float32"
    keras.config.set_floatx("float16")
    assert dtype() == "float16"
