"""What a user's `call` does is seen whatever it does with its variables, batch size and parts."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import kqat
from kqat.graph.copies import activation_name, clone
from kqat.graph.tracer import rebuild, trace
from kqat.parts.elementwise import Elementwise
from kqat.parts.learned import Learned
from kqat.planning.expansion import expand

ROWS = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)


class Own(layers.Layer):
    """A layer of which each test gives the call; its config is of no use."""

    def __init__(self, call: Callable[[Any, Any], Any], **kwargs: Any) -> None:
        super().__init__(name="own", **kwargs)
        self.what = call
        self.parts: list[Any] = []
        self.dense, self.table = layers.Dense(8, name="dense"), layers.Embedding(6, 8)
        self.unused = layers.Dense(3)

    def build(self, shape: Any) -> None:
        """Creates weights of several shapes."""
        make = {"initializer": "random_normal"}
        self.scale = self.add_weight(name="scale", shape=(), **make)
        self.bias = self.add_weight(name="bias", shape=(8,), **make)
        self.matrix = self.add_weight(name="matrix", shape=(8, 8), **make)
        self.token = self.add_weight(name="token", shape=(1, 1, 8), **make)
        self.position = self.add_weight(name="position", shape=(6, 8), **make)
        self.many = [self.bias, self.scale]
        self.dense.build(shape)
        self.table.build((6,))
        self.unused.build(shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        """What the test says."""
        return self.what(self, x)


class Sub(layers.Layer):
    """A custom layer inside another, which returns a tensor and nothing."""

    def build(self, shape: Any) -> None:
        """Creates a weight."""
        self.gain = self.add_weight(name="gain", shape=(8,), initializer="random_normal")

    def call(self, x: Any) -> Any:
        """Two outputs, of which one is none."""
        return x * self.gain, None


class WithSub(layers.Layer):
    """A custom layer with two custom layers of one name."""

    def __init__(self) -> None:
        super().__init__(name="own")
        self.subs = [Sub(name="sub"), Sub(name="sub")]

    def build(self, shape: Any) -> None:
        """Builds both."""
        for sub in self.subs:
            sub.build(shape)

    def call(self, x: Any) -> Any:
        """One behind the other, with an argument that they do not take."""
        for sub in self.subs:
            x, _ = sub(x, training=False)
        return x


def tokened(own: Any, x: Any) -> Any:
    """A class token, repeated for each sample."""
    return ops.concatenate([ops.tile(own.token, (ops.shape(x)[0], 1, 1)), x], axis=1)


def heads(own: Any, x: Any) -> Any:
    """The batch size in a list of sizes, and out of it again."""
    size = ops.shape(x)
    y = ops.transpose(ops.reshape(x, [size[0], size[1], 2, 4]), (0, 2, 1, 3))
    return ops.reshape(ops.transpose(y, (0, 2, 1, 3)), [size[0], size[1], 8])


def masked(own: Any, x: Any) -> Any:
    """Scores hidden by a constant, as attention of one's own has them."""
    scores = ops.einsum("bqd,bkd->bqk", x, ops.matmul(x, own.matrix))
    return ops.softmax(ops.where(np.tri(6, dtype=bool), scores, -1e9)) @ x


def rows_and_columns(own: Any, x: Any) -> Any:
    """Sums that Keras's `add` takes for those with a bias: along steps, where these are as many."""
    row, column = own.position[:1, :6], own.position[:, :1]
    square = np.ones((6, 1), np.float32) * row + (row + column)
    return (ops.sum(x, axis=-1, keepdims=True) + own.position[:, 0]) + (
        x[..., :6] + column
    ) * square


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "sums of rows and columns": rows_and_columns,
    "left of an operator": lambda own, x: own.scale * x + own.bias,
    "right of an array": lambda own, x: np.arange(8.0) * x - np.eye(6, dtype="float32")[::-1] @ x,
    "a power": lambda own, x: ops.absolute(x) ** own.scale + ops.exp(own.scale) ** x,
    "a transposed convolution": lambda own, x: ops.conv_transpose(
        x, ops.tile(own.matrix[None], (3, 1, 1)), 2
    ),
    "right of a matrix product": lambda own, x: x @ own.matrix,
    "left of a matrix product": lambda own, x: ops.matmul(
        own.position, ops.transpose(x, (0, 2, 1))
    ),
    "einsum, the weight first": lambda own, x: ops.einsum("de,bsd->bse", own.matrix, x),
    "a cast": lambda own, x: x * ops.cast(own.scale, x.dtype),
    "a computed weight": lambda own, x: x * ops.exp(own.scale) + 2.0 * own.bias,
    "a division": lambda own, x: x / (1.0 + ops.square(own.bias)),
    "a value of a variable": lambda own, x: x + own.bias.value,
    "variables in a list": lambda own, x: (x + own.many[0]) * own.many[1],
    "a slice": lambda own, x: x + ops.slice(own.position, (0, 0), (1, 8)),
    "positions": lambda own, x: x + ops.broadcast_to(own.position, ops.shape(x)),
    "positions looked up": lambda own, x: x + own.table(ops.arange(ops.shape(x)[1])),
    "another layer's variable": lambda own, x: ops.matmul(x, own.dense.kernel) + own.dense.bias,
    "a computed variable of another": lambda own, x: ops.matmul(x, own.dense.kernel * 2.0),
    "training for a layer without": lambda own, x: own.dense(x, training=False),
    "class token": tokened,
    "batch in a list": heads,
    "own attention": masked,
    "zeros of its shape": lambda own, x: ops.concatenate([x, ops.zeros_like(x)], axis=1),
    "ones of the batch": lambda own, x: x + ops.ones((ops.shape(x)[0], 1, 8)),
    "only weights": lambda own, x: ops.broadcast_to(own.position, ops.shape(x)),
    "a slice by one key": lambda own, x: x + own.position[2:3],
    "an axis before": lambda own, x: x + own.position[None],
    "all of it": lambda own, x: x[...] + own.position[...],
    "reversed": lambda own, x: x + own.position[::-1],
    "an integer of NumPy": lambda own, x: x[:, np.int64(1) :] + own.position[np.int64(1)],
    "rows by truth values": lambda own, x: x[:, :3] + own.position[np.arange(6) % 2 == 0],
    "a selection": lambda own, x: ops.where(x > 0.0, x, own.bias),
    "a mode of padding in capitals": lambda own, x: ops.pad(x, ((0, 0), (1, 1), (0, 0)), "REFLECT"),
}


def _model(layer: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 8), name="x")
    return keras.Model(x, layers.Dense(3, name="head")(layer(x)), name="net")


def _parts(model: keras.Model) -> keras.Model:
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    return rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "parts")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_parts_compute_what_the_call_computes(call: Callable[[Any, Any], Any]) -> None:
    model = _model(Own(call))
    before = {id(v): np.asarray(v) for v in model.variables}
    parts = _parts(model)
    np.testing.assert_allclose(parts(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)
    assert not any(type(layer) is Own for layer in parts.layers)
    own = model.get_layer("own")
    # The user's layer is as it was.
    assert isinstance(own.bias, keras.Variable)
    assert "symbolic_call" not in vars(own)
    assert own.dense.name == "dense"
    assert all(np.array_equal(before[id(v)], v) for v in model.variables)


def test_layers_inside_bear_their_paths() -> None:
    model = _model(WithSub())
    assert {"own", "own_multiply"} <= {node.layer.name for node in trace(_parts(model)).nodes}
    np.testing.assert_allclose(_parts(model)(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)


def test_a_weight_that_stands_alone_is_trained() -> None:
    qat = kqat.quantize_model(_model(Own(tokened)), calibration_data=ROWS)
    qat.compile("sgd", "mse")
    learned = next(layer for layer in qat.layers if isinstance(layer, Learned))
    before = np.asarray(learned.value)
    qat.fit(ROWS, np.ones((4, 7, 3)), verbose=0)
    assert learned.trainable
    assert np.abs(np.asarray(learned.value) - before).max() > 0


def test_a_function_of_tensorflow_is_a_table_that_saves(tmp_path: Any) -> None:
    model = _model(Own(lambda own, x: tf.linalg.band_part(x, -1, 0), trainable=False))
    with pytest.raises(kqat.UnsupportedLayerError, match=r"line \d+ of test_tracing_of_calls"):
        kqat.plan(model)
    layer = Plain(name="own")
    model = _model(layer)
    qat = kqat.quantize_model(model, calibration_data=ROWS)
    assert any(isinstance(part, Elementwise) for part in qat.layers)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.saving.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(loaded(ROWS), qat(ROWS))


class Plain(layers.Layer):
    """A function of each number alone, in TensorFlow."""

    def call(self, x: Any) -> Any:
        """A smooth step."""
        return 0.5 * x * (1.0 + tf.math.erfcinv(0.1 + 0.5 * tf.math.tanh(x) ** 2))


class Branches(layers.Layer):
    """A layer that branches on a value, and tells its shape without a call."""

    def compute_output_shape(self, shape: Any) -> Any:
        """The input's shape."""
        return shape

    def call(self, x: Any) -> Any:
        """Twice the input, or the input."""
        if ops.sum(x) > 0:
            return 2.0 * x
        return x


class Assigns(layers.Layer):
    """A layer with a side effect."""

    def build(self, shape: Any) -> None:
        """Creates what it changes."""
        self.seen = self.add_weight(name="seen", shape=(), trainable=False)

    def call(self, x: Any) -> Any:
        """The input; counts."""
        self.seen.assign(self.seen + 1.0)
        return x


@pytest.mark.parametrize(
    ("layer", "line"),
    [(Branches(name="own"), r"if ops.sum\(x\) > 0"), (Assigns(name="own"), r"self.seen.assign")],
)
def test_what_cannot_be_seen_is_refused_by_its_line(layer: Any, line: str) -> None:
    with pytest.raises(kqat.UnsupportedLayerError, match=rf"'own' of type.*{line}"):
        kqat.plan(_model(layer))


def relu(x: Any) -> Any:
    """A function that bears a name of Keras."""
    return ops.maximum(x, 0.2 * x)


def test_a_function_is_known_by_what_it_is() -> None:
    assert activation_name(relu) is None
    assert activation_name(keras.activations.relu) == "relu"
    assert activation_name(keras.activations.silu) == "silu"


class Gentle(keras.regularizers.Regularizer):
    """A regularizer without a config."""

    def __call__(self, x: Any) -> Any:
        """A small penalty."""
        return 1e-4 * ops.sum(x)


def small(shape: Any, dtype: Any = None) -> Any:
    """An initializer that is a function."""
    return ops.ones(shape)


def test_copies_share_objects_that_no_config_can_hold() -> None:
    gentle = Gentle()
    layer = layers.Conv2D(2, 1, kernel_initializer=small, kernel_regularizer=gentle)
    layer.build((None, 4, 4, 3))
    copy = clone(layer)
    assert copy.kernel_regularizer is gentle
    assert layer.kernel_regularizer is gentle
    assert layer.kernel_initializer is small
    assert isinstance(copy.kernel_initializer, keras.initializers.Zeros)
    nested = layers.LSTM(2, recurrent_regularizer=gentle)
    nested.build((None, 4, 3))
    assert clone(nested).cell.recurrent_regularizer is gentle


class _EndsMask(layers.Layer):
    """A layer that takes a mask and hands none on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """None, as the steps are gone."""


class _MaskedMean(_EndsMask):
    """The mean of the steps that a mask shows, which Keras hands on or the user gives."""

    def call(self, x: Any, mask: Any = None) -> Any:
        shown = ops.expand_dims(ops.cast(mask, x.dtype), -1)
        return ops.sum(x * shown, axis=1) / (ops.sum(shown, axis=1) + 1.0)


class _MaskedAttention(_EndsMask):
    """One head whose scores a mask pushes down, as users write it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.query, self.key, self.value = (layers.Dense(8) for _ in range(3))

    def build(self, shape: Any) -> None:
        """Builds the parts, since Keras tries `call` without a mask."""
        for part in (self.query, self.key, self.value):
            part.build(shape)

    def call(self, x: Any, mask: Any = None) -> Any:
        scores = ops.matmul(self.query(x), ops.transpose(self.key(x), (0, 2, 1))) / 3.0
        scores += (1.0 - ops.cast(mask[:, None, :], scores.dtype)) * -1e9
        return ops.mean(ops.matmul(ops.softmax(scores), self.value(x)), axis=1)


@pytest.mark.parametrize("by_keras", [True, False])
@pytest.mark.parametrize("kind", [_MaskedMean, _MaskedAttention])
def test_a_custom_layer_reads_its_mask_as_a_tensor(kind: Any, by_keras: bool) -> None:
    words = keras.Input((6,), dtype="int32")
    rows = layers.Embedding(9, 4, mask_zero=by_keras)(words)
    given = {} if by_keras else {"mask": ops.not_equal(words, 0)}
    model = keras.Model(words, layers.Dense(3)(kind()(rows, **given)))
    data = np.random.default_rng(0).integers(1, 9, (128, 6), dtype=np.int32)
    data[:64, 4:] = 0
    qat = kqat.quantize_model(model, calibration_data=data)
    expected, found = np.asarray(model(data)), np.asarray(qat(data))
    assert np.max(np.abs(expected - found)) < 0.05 * np.max(np.abs(expected))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.zeros_like(x) + 3.0,
        lambda x: x * (ops.ones_like(x) * 2.0 + 1.0),
        lambda x: x + ops.concatenate([ops.zeros_like(x[:, :4]), ops.ones_like(x[:, 4:]) * 2.0], 1),
    ],
)
def test_constants_of_a_shape_are_computed_with(call: Callable[[Any], Any]) -> None:
    """The first of them ended in an error of Keras."""
    x = keras.Input((8,))
    model = keras.Model(x, [layers.Dense(8)(x), layers.Lambda(call)(x)])
    data = ROWS[:, 0]
    qat = kqat.quantize_model(model, calibration_data=np.repeat(data, 32, 0))
    for expected, found in zip(model(data), qat(data), strict=True):
        np.testing.assert_allclose(found, expected, atol=0.05 * float(np.max(np.abs(expected))))


class _NamesInCalls(layers.Layer):
    """A block whose call makes a layer of a fixed name, as keras-tcn's residual blocks do."""

    def build(self, shape: Any) -> None:
        self.dense = layers.Dense(shape[-1])
        self.dense.build(shape)

    def call(self, x: Any) -> Any:
        return layers.Activation("relu", name="end")(layers.add([x, self.dense(x)], name="sum"))


class _Blocks(layers.Layer):
    def build(self, shape: Any) -> None:
        self.blocks = [_NamesInCalls(name=f"block_{i}") for i in range(3)]
        for block in self.blocks:
            block.build(shape)

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


def test_calls_may_make_layers_of_one_name() -> None:
    x = keras.Input((8,))
    model = keras.Model(x, layers.Dense(3)(_Blocks()(x)))
    data = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=data)
    expected = np.asarray(model(data))
    np.testing.assert_allclose(qat(data), expected, atol=0.05 * float(np.max(np.abs(expected))))
