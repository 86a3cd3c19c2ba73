"""What layers hand on besides values: constants without a batch, and models built in training."""

from collections import Counter
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
from kqat.graph import copies
from kqat.graph.tracer import trace
from kqat.planning.expansion import expand
from tests.kqat.graph.test_tracing_of_calls import ROWS, _parts


class Angles(layers.Layer):
    """Sine and cosine of positions: constants that the shape of the input tells."""

    def call(self, x: Any) -> Any:
        """Two arrays without a batch, of shape (steps, channels)."""
        steps, channels = ops.shape(x)[1:]
        angles = np.outer(np.arange(steps), 1.0 / (1 + np.arange(channels))).astype(np.float32)
        return ops.cos(angles), ops.sin(angles)


class Positions(layers.Layer):
    """A weight, handed on as it is."""

    def build(self, shape: Any) -> None:
        """Creates the weight."""
        self.table = self.add_weight(name="table", shape=shape[1:], initializer="random_normal")

    def call(self, x: Any) -> Any:
        """The weight."""
        return ops.convert_to_tensor(self.table)


class Rotated(layers.Layer):
    """Reads both."""

    def call(self, x: Any, cos: Any, sin: Any) -> Any:
        """The input, half of it turned."""
        first, second = ops.split(x, 2, axis=-1)
        turned = ops.concatenate([-second, first], axis=-1)
        return x * ops.expand_dims(cos, 0) + turned * ops.expand_dims(sin, 0)


def rotary(x: Any) -> Any:
    """Angles of one layer, read by another."""
    return Rotated(name="rotated")(x, *Angles(name="angles")(x))


def of_operations(x: Any) -> Any:
    """Angles read by functions."""
    cos, sin = Angles(name="angles")(x)
    return x * ops.expand_dims(cos * 2.0, 0) + sin


def of_a_weight(x: Any) -> Any:
    """A weight read by a function."""
    return x + Positions(name="positions")(x)


@pytest.mark.parametrize("build", [rotary, of_operations, of_a_weight])
def test_layers_hand_on_constants_without_a_batch(build: Any) -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 8), name="x")
    model = keras.Model(x, layers.Dense(3, name="head")(build(x)))
    parts = _parts(model)
    np.testing.assert_allclose(parts(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)
    assert len(parts.trainable_variables) == len(model.trainable_variables)


def test_a_constant_without_a_batch_is_no_output() -> None:
    x = keras.Input((6, 8), name="x")
    model = keras.Model(x, [layers.Dense(2)(x), Positions(name="positions")(x)])
    with pytest.raises(kqat.ModelError, match=r"batch as their first axis.*'positions'"):
        kqat.plan(model)


class Sequences(layers.Layer):
    """A Sequential inside, which builds itself at its first call."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = keras.Sequential(
            [layers.Dense(8), layers.BatchNormalization(), layers.Dropout(0.5)], name="inner"
        )

    def call(self, x: Any) -> Any:
        """What the Sequential makes of it."""
        return self.inner(x)


def test_a_sequential_that_was_built_in_training_ships_as_in_inference() -> None:
    keras.utils.set_random_seed(0)
    layer = Sequences(name="own")
    layer.inner(ROWS, training=True)
    for operation in layer.inner._functional.operations:
        for call in operation._inbound_nodes:  # As Keras records where training is on.
            call.arguments.kwargs |= {"training": True} if call.arguments.kwargs else {}
    x = keras.Input((6, 8), name="x")
    for outer in (layer, layer.inner):
        model = keras.Model(x, layers.Dense(3)(outer(x)))
        expected = model(ROWS, training=False)
        np.testing.assert_allclose(
            _parts(model)(ROWS, training=False), expected, rtol=1e-4, atol=1e-5
        )


class Relative(layers.Layer):
    """Scores of relative positions: a product of values and of a projected weight."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.EinsumDense("bsd,dhe->bshe", (None, 2, 4), name="dense")

    def build(self, shape: Any) -> None:
        """Creates the weight."""
        self.table = self.add_weight(name="table", shape=(1, 5, 8), initializer="random_normal")
        self.dense.build(shape)

    def call(self, x: Any) -> Any:
        """The scores."""
        keys = self.dense(ops.repeat(self.table, ops.shape(x)[0], axis=0))
        return ops.einsum("bkhe,bqhe->bhqk", keys, self.dense(x))


def test_a_product_with_what_is_computed_of_weights_ends() -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 8), name="x")
    model = keras.Model(x, Relative(name="own")(x))
    np.testing.assert_allclose(_parts(model)(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)


class Learned(layers.Layer):
    """A learned query, which is computed before any input is read."""

    def build(self, shape: Any) -> None:
        """Creates the query."""
        self.query = self.add_weight(name="query", shape=(3, 8), initializer="random_normal")

    def call(self, x: Any) -> Any:
        """What each query finds."""
        scores = ops.matmul(ops.tanh(self.query) * 2.0, ops.swapaxes(x, 1, 2))
        return ops.matmul(ops.softmax(scores), x)


def test_what_is_computed_of_weights_may_come_first() -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 8), name="x")
    model = keras.Model(x, Learned(name="own")(x))
    np.testing.assert_allclose(_parts(model)(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)


class TrainsByDefault(layers.Layer):
    """Adds noise where nothing is said, as Keras's augmenting layers change images."""

    def __init__(self, function: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function

    def call(self, x: Any, training: bool = True) -> Any:
        """The function of what may be noisy."""
        return self.function(x + keras.random.normal(ops.shape(x)) if training else x)


def test_layers_that_train_by_default_are_tried_as_they_infer() -> None:
    """What stands for them does not train, and functions of each number are found."""
    tf = pytest.importorskip("tensorflow")
    x = keras.Input((2, 4, 4, 1))
    brightness = layers.RandomBrightness(1.0, value_range=(0.0, 1.0))
    y = layers.TimeDistributed(brightness)(x)
    y = TrainsByDefault(lambda v: ops.tanh(v) * v + ops.sin(v), name="waves")(y)
    y = TrainsByDefault(lambda v: tf.raw_ops.Erfc(x=v), name="tail")(y)
    parts = {layer.name: layer for layer in _parts(keras.Model(x, y)).layers}
    for name in ("waves", "tail"):
        assert type(parts[name]).__name__ == "Elementwise"


def test_what_a_wrapped_layer_is_refused_for_is_said() -> None:
    """Not what Keras says of the shape that it has in inference."""
    x = keras.Input((2, 4, 4, 1))
    model = keras.Model(x, layers.TimeDistributed(layers.RandomCrop(2, 2), name="steps")(x))
    with pytest.raises(kqat.UnsupportedLayerError, match=r"'steps_.*' .* resizes in inference"):
        kqat.plan(model)


class Logarithm(layers.Layer):
    """Minus infinity where a value is below zero, and a guarded logarithm in the parts."""

    def call(self, x: Any) -> Any:
        """The logarithm of what a ReLU leaves."""
        return ops.log(ops.relu(x))


def test_what_is_infinite_may_be_far_below() -> None:
    x = keras.Input((4,), name="x")
    kqat.plan(keras.Model(x, layers.Dense(2)(Logarithm(name="logarithm")(x))))


def test_a_layer_is_copied_once_however_many_rounds_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copying is most of what a plan costs, and a part that is composite takes a further round."""
    copied: Counter[str] = Counter()
    whole = copies.clone

    def counted(layer: Any, *args: Any, **changes: Any) -> Any:
        copied[layer.name] += 1
        return whole(layer, *args, **changes)

    monkeypatch.setattr(copies, "clone", counted)
    x = keras.Input((6, 8), name="x")
    shared = layers.Dense(8, name="shared")
    y = layers.BatchNormalization(name="norm")(shared(shared(x)))
    y = layers.Add(name="sum")([x, layers.Dense(8, activation="silu", name="composite")(y)])
    model = keras.Model(x, y)
    simple, origins = expand(trace(model), lambda node: False, "model")
    assert set(origins.values()) >= {"shared", "norm", "sum", "composite"}
    assert [copied[name] for name in ("shared", "norm", "sum")] == [1, 1, 1]
    own = {id(v) for v in model.variables}
    assert not any(
        id(v) in own for node in simple.nodes for v in getattr(node.layer, "variables", ())
    )
