"""Cases for what users write themselves: functions, layers, and models with a `call`."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

from tests.coverage.cases import INDEXES, Case, functional

IMAGE, ROWS = (6, 6, 3), (4, 8)
register = keras.saving.register_keras_serializable("tests")


def swish_of_its_own(x: Any) -> Any:
    """A function that Keras does not know, and nobody registered."""
    return x * ops.sigmoid(1.7 * x)


@register
class Block(L.Layer):
    """A residual block: layers alone."""

    def __init__(self, filters: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.conv = L.Conv2D(filters, 3, padding="same", use_bias=False)
        self.norm = L.BatchNormalization()
        self.skip = L.Conv2D(filters, 1)

    def build(self, shape: Any) -> None:
        """Builds the layers."""
        self.conv.build(shape)
        self.norm.build((*shape[:-1], self.filters))
        self.skip.build(shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        """The block's output."""
        return ops.relu(self.norm(self.conv(x), training=training) + self.skip(x))

    def get_config(self) -> dict[str, Any]:
        """The number of filters."""
        return {**super().get_config(), "filters": self.filters}


@register
class Projection(L.Layer):
    """A layer with variables of its own, in functions of Keras."""

    def build(self, shape: Any) -> None:
        """Creates kernel, scale and shift."""
        self.matrix = self.add_weight(name="matrix", shape=(shape[-1], 5))
        self.factor = self.add_weight(name="gamma", shape=(5,), initializer="ones")
        self.shift = self.add_weight(name="bias", shape=(4, 5), initializer="ones")

    def call(self, x: Any) -> Any:
        """The projection."""
        return ops.matmul(x, self.matrix) * self.factor + self.shift


@register
class GeneralizedMean(L.Layer):
    """Pooling between the mean and the maximum, by an exponent that is trained."""

    def build(self, shape: Any) -> None:
        """Creates the exponent."""
        three = keras.initializers.Constant(3.0)
        self.exponent = self.add_weight(name="exponent", shape=(), initializer=three)

    def call(self, x: Any) -> Any:
        """The mean of powers of the steps."""
        return ops.mean(ops.sigmoid(x) ** self.exponent, axis=1)


@register
class ClassToken(L.Layer):
    """A weight in front of a sequence, for each sample of a batch of any size."""

    def build(self, shape: Any) -> None:
        """Creates the token."""
        self.token = self.add_weight(name="token", shape=(1, 1, shape[-1]), initializer="ones")

    def call(self, x: Any) -> Any:
        """The longer sequence."""
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, x.shape[-1]))
        return ops.concatenate([token, x], axis=1)


@register
class FusedProjections(L.Layer):
    """Attention whose three projections are parts of one kernel."""

    def build(self, shape: Any) -> None:
        """Creates the kernel."""
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], 3 * shape[-1]))

    def call(self, x: Any) -> Any:
        """The attended values."""
        query, key, value = (ops.matmul(x, w) for w in ops.split(self.kernel, 3, axis=-1))
        scores = ops.softmax(ops.matmul(query, ops.transpose(key, (0, 2, 1))))
        return ops.matmul(scores, value)


@register
class Mixing(L.Layer):
    """FNet's mixing of tokens: the real part of a Fourier transform over both axes."""

    def call(self, x: Any) -> Any:
        """The mixed tokens."""
        return ops.fft2((x, ops.zeros_like(x)))[0]


@register
class TokensAndPositions(L.Layer):
    """The usual first layer of a text transformer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens, self.positions = L.Embedding(INDEXES, 4), L.Embedding(8, 4)

    def build(self, shape: Any) -> None:
        """Builds both tables."""
        self.tokens.build(shape)
        self.positions.build(shape)

    def call(self, x: Any) -> Any:
        """The sum of both rows."""
        return self.tokens(x) + self.positions(ops.arange(x.shape[-1]))


class Subclassed(keras.Model):
    """A model with a `call`, of a dict, to a dict."""

    def __init__(self) -> None:
        super().__init__(name="net")
        self.block = Block(name="block")
        self.left, self.right = L.Dense(4, name="left_in"), L.Dense(4, name="right_in")
        self.head = L.Dense(2, name="head")

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> dict[str, Any]:
        """Scores and what they are made of."""
        image = ops.mean(self.block(inputs["image"], training=training), axis=(1, 2))
        if training:
            image = image * 1.0
        both = self.left(image) + self.right(inputs["age"])
        return {"score": self.head(both), "mix": both}


def _subclassed() -> keras.Model:
    model = Subclassed()
    model({"image": np.zeros((1, *IMAGE), np.float32), "age": np.zeros((1, 3), np.float32)})
    return model


class Tower(keras.Model):
    """A model with a `call` that stands inside another, twice."""

    def __init__(self) -> None:
        super().__init__(name="tower")
        self.first, self.second = L.Dense(4, "relu"), L.Dense(4)

    def call(self, x: Any) -> Any:
        """Two layers."""
        return self.second(self.first(x))


def _inside() -> keras.Model:
    tower = Tower()
    left, right = keras.Input((6,), name="left"), keras.Input((6,), name="right")
    return keras.Model([left, right], L.Dense(2)(tower(left) * tower(right)))


def _case(name: str, shape: tuple[int, ...], call: Callable[[Any], Any], **counts: int) -> Case:
    return Case(name=name, build=lambda: functional(shape, call), ops=counts)


CASES: tuple[Case, ...] = (
    _case(
        "activation_function",
        (8,),
        lambda x: L.Activation(swish_of_its_own)(x),
        ADD=1,
        CAST=1,
        GATHER=1,
    ),
    _case(
        "dense_function",
        (8,),
        lambda x: L.Dense(4, activation=swish_of_its_own)(x),
        ADD=1,
        CAST=1,
        FULLY_CONNECTED=1,
        GATHER=1,
    ),
    _case(
        "dense_relu_function",
        (8,),
        lambda x: L.Dense(4, activation=lambda t: ops.relu(t))(x),
        FULLY_CONNECTED=1,
    ),
    _case(
        "lambda_elementwise", ROWS, lambda x: L.Lambda(swish_of_its_own)(x), ADD=1, CAST=1, GATHER=1
    ),
    _case(
        "lambda_identity",
        ROWS,
        lambda x: L.Dense(3)(L.Lambda(lambda t: t)(x)),
        FULLY_CONNECTED=1,
    ),
    _case(
        "lambda_centered",
        ROWS,
        lambda x: L.Lambda(lambda t: t - ops.mean(t, axis=1, keepdims=True))(x),
        MEAN=1,
        SUB=1,
    ),
    _case(
        "lambda_of_two",
        ROWS,
        lambda x: L.Lambda(lambda t: t[0] * t[1])([x, L.Dense(8)(x)]),
        FULLY_CONNECTED=1,
        MUL=1,
    ),
    _case(
        "lambda_of_one_value_twice",
        ROWS,
        lambda x: L.Lambda(lambda t: t[0] * ops.max(t[1], axis=1, keepdims=True))([x, x]),
        MUL=1,
        REDUCE_MAX=1,
    ),
    _case("block", IMAGE, lambda x: Block()(x), ADD=1, CONV_2D=2),
    _case(
        "blocks", IMAGE, lambda x: Block(name="second")(Block(name="first")(x)), ADD=2, CONV_2D=4
    ),
    _case(
        "projection",
        (4, 6),
        lambda x: Projection()(x),
        ADD=1,
        FULLY_CONNECTED=1,
    ),
    _case(
        "grayscale",
        IMAGE,
        lambda x: ops.image.rgb_to_grayscale(x),
        FULLY_CONNECTED=1,
    ),
    _case("fourier", ROWS, lambda x: Mixing()(x), FULLY_CONNECTED=4, SUB=1, TRANSPOSE=3),
    _case(
        "fused_projections",
        ROWS,
        lambda x: FusedProjections()(x),
        BATCH_MATMUL=2,
        FULLY_CONNECTED=3,
        SOFTMAX=1,
        TRANSPOSE=1,
    ),
    _case(
        "generalized_mean",
        ROWS,
        lambda x: GeneralizedMean()(x),
        ADD=1,
        CAST=1,
        GATHER=1,
        LOGISTIC=1,
        MEAN=1,
    ),
    _case("class_token", ROWS, lambda x: ClassToken()(x), CONCATENATION=1),
    Case(
        name="tokens_and_positions",
        build=lambda: functional((6,), lambda x: L.Dense(3)(TokensAndPositions()(x)), "int32"),
        ops={"ADD": 1, "FULLY_CONNECTED": 1, "GATHER": 1},
    ),
    Case(
        name="subclassed",
        build=_subclassed,
        ops={"ADD": 2, "CONV_2D": 2, "FULLY_CONNECTED": 3, "MEAN": 1},
    ),
    Case(name="subclassed_inside", build=_inside, ops={"FULLY_CONNECTED": 5, "MUL": 1}),
)
