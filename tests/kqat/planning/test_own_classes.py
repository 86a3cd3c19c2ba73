"""A user's own classes and functions in the place of Keras's: subclasses, models, activations."""

import functools
import warnings
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import kqat
import tflite_export
from kqat.base import ModelError, UnsupportedLayerError
from kqat.graph import trace
from kqat.training import CalibrationWarning
from tests.kqat.graph.test_tracing_of_calls import ROWS, _parts
from tests.newer_keras import needs_keras

FRAMES = np.random.default_rng(1).normal(size=(4, 5, 6, 4)).astype(np.float32)
IMAGES = np.random.default_rng(0).normal(size=(4, 6, 6, 4)).astype(np.float32)


def _twice(kind: Any) -> Any:
    """A subclass whose `call` doubles what the stock `call` computes."""

    def call(self: Any, x: Any) -> Any:
        return 2.0 * kind.call(self, x)

    return type(f"Twice{kind.__name__}", (kind,), {"call": call})


SUBCLASSES = {
    "batch_normalization": (_twice(layers.BatchNormalization), (), IMAGES),
    "layer_normalization": (_twice(layers.LayerNormalization), (), ROWS),
    "separable": (_twice(layers.SeparableConv2D), (3, 3), IMAGES),
    "transposed": (_twice(layers.Conv2DTranspose), (3, 3), IMAGES),
    "time_distributed": (_twice(layers.TimeDistributed), (layers.Dense(3),), ROWS),
    "rescaling": (_twice(layers.Rescaling), (0.5,), IMAGES),
}


def _same(model: Any, data: np.ndarray) -> Any:
    """Checks that the parts of a model compute what it computes; returns them."""
    parts = _parts(model)
    np.testing.assert_allclose(parts(data), model(data), rtol=1e-4, atol=1e-4)
    return parts


@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_subclass_calls_the_stock_layer(name: str) -> None:
    kind, args, data = SUBCLASSES[name]
    model = keras.Sequential([keras.Input(data.shape[1:]), kind(*args, name="own")])
    if name == "batch_normalization":
        model.layers[0].moving_mean.assign([0.1, 0.2, 0.3, 0.4])
    parts = _same(model, data)
    if name == "batch_normalization":  # It trains its averages, as the user's layer does.
        assert any(type(part) is layers.BatchNormalization for part in parts.layers)


class OtherKernel(layers.Dense):
    """A method that the stock call uses, written anew: it is no stock layer beside its call."""

    def call(self, x: Any) -> Any:
        return super().call(x) + 1.0

    def quantized_call(self, x: Any) -> Any:
        raise AssertionError

    @property
    def kernel(self) -> Any:
        return self._kernel * 3.0


def test_a_subclass_that_changes_what_the_stock_call_reads_is_traced() -> None:
    _same(keras.Sequential([keras.Input(ROWS.shape[1:]), OtherKernel(3)]), ROWS)


class Gained(layers.Dense):
    """A subclass with a weight of its own, made before those of the stock layer."""

    def __init__(self, units: int, trains: bool = True, **options: Any) -> None:
        super().__init__(units, **options)
        self.trains = trains

    def build(self, shape: Any) -> None:
        self.gain = self.add_weight(
            shape=(self.units,), name="gain", trainable=self.trains, initializer="random_normal"
        )
        super().build(shape)

    def call(self, x: Any) -> Any:
        return super().call(x) * self.gain


class Normalized(layers.Conv2D):
    """A subclass with a layer of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm = layers.BatchNormalization()

    def call(self, x: Any, training: Any = None) -> Any:
        return ops.relu(self.norm(super().call(x), training=training))


class Scaled(layers.TimeDistributed):
    """A subclass of a layer that holds another, with a weight and a layer of its own."""

    def build(self, shape: Any) -> None:
        super().build(shape)
        self.more = layers.Dense(3)
        self.more.build(shape)
        self.gain = self.add_weight(shape=(), name="gain", initializer="ones")

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(x, training=training) * self.gain + self.more(x)


# With the stock layers that its parts have.
HOLDING_MORE = {
    "weight": (lambda: Gained(3), ROWS, [layers.Dense]),
    "constant": (lambda: Gained(3, trains=False), ROWS, [layers.Dense]),
    "layer": (lambda: Normalized(3, 3), IMAGES, [layers.Conv2D, layers.BatchNormalization]),
    "both": (lambda: Scaled(layers.Conv1D(3, 1)), FRAMES, [layers.Conv1D, layers.Dense]),
}


@pytest.mark.parametrize("name", HOLDING_MORE)
def test_a_subclass_holds_weights_and_layers_besides_those_of_the_stock_layer(name: str) -> None:
    make, data, kinds = HOLDING_MORE[name]
    parts = _same(keras.Sequential([keras.Input(data.shape[1:]), make()]), data)
    for kind in kinds:
        assert sum(type(part) is kind for part in parts.layers) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", HOLDING_MORE)
def test_a_subclass_with_more_ships(name: str) -> None:
    make, data, _ = HOLDING_MORE[name]
    data = np.tile(data, (16, *(1,) * (data.ndim - 1)))
    model = keras.Sequential([keras.Input(data.shape[1:]), make()])
    qat = kqat.quantize_model(model, calibration_data=data)
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, data)
    assert all(part.problem is None for part in report.runtimes)
    assert report.is_full_integer


class SetsKernel(layers.Dense):
    """A call that gives the stock call another kernel."""

    def call(self, x: Any) -> Any:
        kernel = self._kernel
        self._kernel = kernel / ops.norm(kernel, axis=0, keepdims=True)
        try:
            return super().call(x)
        finally:
            self._kernel = kernel


class BuildsItself(layers.Dense):
    """A build that makes other weights than the stock one."""

    def build(self, shape: Any) -> None:
        self._kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")
        self.bias = None

    def call(self, x: Any) -> Any:
        return super().call(x) * 2.0


@pytest.mark.parametrize("kind", [SetsKernel, BuildsItself])
def test_a_stock_call_that_reads_other_weights_is_traced(kind: Any) -> None:
    _same(keras.Sequential([keras.Input(ROWS.shape[1:]), kind(3)]), ROWS)


class DoubledSequential(keras.Sequential):
    """A Sequential whose call is not that of a Sequential."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return 2.0 * super().call(inputs, training=training, mask=mask)


class DoubledFunctional(keras.Model):
    """A Functional model whose call is not that of a Functional model."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return 2.0 * super().call(inputs, training=training, mask=mask)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", [DoubledSequential, DoubledFunctional])
def test_a_model_with_a_call_of_its_own(kind: Any, inside: bool) -> None:
    if kind is DoubledSequential:
        model = kind([keras.Input(ROWS.shape[1:]), layers.Dense(3)])
    else:
        x = keras.Input(ROWS.shape[1:])
        model = kind(x, layers.Dense(3)(x))
    if inside:
        x = keras.Input(ROWS.shape[1:])
        model = keras.Model(x, model(layers.Activation("relu")(x)))
    _same(model, ROWS)


class TwoArguments(keras.Model):
    """A model that is called on two arguments."""

    def call(self, left: Any, right: Any) -> Any:
        return left + right


def test_a_model_of_two_arguments_is_named_with_them() -> None:
    model = TwoArguments()
    model(ROWS, ROWS)
    with pytest.raises(ModelError, match=r"TwoArguments, whose call takes left, right\. Use"):
        trace(model)


class Sharp:
    """A callable that no config can name."""

    def __call__(self, x: Any) -> Any:
        return ops.relu(x) * 2.0


class Beta(layers.Layer):
    """An activation with a weight."""

    def build(self, shape: Any) -> None:
        self.beta = self.add_weight(shape=(), initializer="ones")

    def call(self, x: Any) -> Any:
        return x * ops.sigmoid(self.beta * x)


ACTIVATIONS = {
    "mish_of_tensorflow": lambda x: x * tf.math.tanh(tf.math.softplus(x)),
    "capped_of_tensorflow": lambda x: tf.minimum(tf.maximum(x, -0.5), 0.5) * 2.0,
    "squeezed": lambda x: ops.squeeze(ops.expand_dims(ops.tanh(x), -1), -1) * 2.0,
    "moved": lambda x: ops.moveaxis(ops.moveaxis(x, -1, 1) * 2.0, 1, -1) + 1.0,
    "constants": lambda x: ops.abs(x) * np.full(4, 2.0, np.float32) + 1.0,
    "partial": functools.partial(ops.leaky_relu, negative_slope=0.3),
    "object": Sharp(),
    "prelu": layers.PReLU(alpha_initializer="ones"),
    "own_layer": Beta(),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, function in ACTIVATIONS.items()
        for kind in ("Activation", "Dense", "Lambda")
        if kind != "Lambda" or not isinstance(function, layers.Layer)  # Lambdas have no weights.
    ],
)
def test_an_own_function_is_the_activation(name: str, kind: str) -> None:
    function = ACTIVATIONS[name]
    if isinstance(function, layers.Layer):
        function = type(function).from_config(function.get_config())
    layer: Any = {
        "Activation": lambda: layers.Activation(function),
        "Dense": lambda: layers.Dense(4, activation=function),
        "Lambda": lambda: layers.Lambda(function),
    }[kind]()
    _same(keras.Sequential([keras.Input(IMAGES.shape[1:]), layer, layers.Dense(2)]), IMAGES)


class Pair(layers.Layer):
    """Weights in a tuple, which TensorFlow keeps in a proxy."""

    def build(self, shape: Any) -> None:
        options = {"shape": shape[-1:], "initializer": "random_normal"}
        self.pair = (self.add_weight(**options), self.add_weight(**options))

    def call(self, x: Any) -> Any:
        return x * self.pair[0] + self.pair[1]


def test_weights_in_a_tuple() -> None:
    _same(keras.Sequential([keras.Input(ROWS.shape[1:]), Pair()]), ROWS)


def gentle(weights: Any) -> Any:
    """A regularizer that is a function."""
    return 1e-3 * ops.sum(ops.square(weights))


@pytest.mark.parametrize("regularizer", [gentle, lambda w: 1e-3 * ops.sum(w**2)])
def test_a_recurrent_layer_keeps_a_regularizer_that_is_a_function(regularizer: Any) -> None:
    needs_keras("3.13", "a regularizer that is a function")
    layer = layers.GRU(3, kernel_regularizer=regularizer, recurrent_regularizer=regularizer)
    model = keras.Sequential([keras.Input(ROWS.shape[1:]), layer])
    parts = _same(model, ROWS)
    np.testing.assert_allclose(sum(parts.losses), sum(model.losses), rtol=1e-5)


class Shapes(layers.Layer):
    """Values that are moved, and weights where only tensors stood."""

    def build(self, shape: Any) -> None:
        self.low = self.add_weight(shape=shape[-1:], initializer="random_normal")
        self.high = self.add_weight(shape=(), initializer="ones")

    def call(self, x: Any) -> Any:
        mean = ops.mean(x, axis=(1, 3), keepdims=True)
        spread = ops.broadcast_to(mean, ops.shape(x))
        turned = [ops.rot90(x, k=k, axes=(1, 2)) for k in (-1, 0, 1, 2)]
        bounded = ops.minimum(ops.maximum(x, self.low), self.high)
        return ops.concatenate([spread, *turned, bounded], axis=-1)


def test_moved_values_and_bounds_that_are_weights() -> None:
    _same(keras.Sequential([keras.Input(IMAGES.shape[1:]), Shapes()]), IMAGES)


@pytest.mark.parametrize("kind", [layers.Average, layers.Maximum, layers.Minimum])
def test_a_merge_with_a_constant_array(kind: Any) -> None:
    x = keras.Input(IMAGES.shape[1:])
    constant = np.linspace(-1, 1, 4, dtype=np.float32).reshape(1, 1, 1, 4)
    model = keras.Model(x, kind()([x, np.broadcast_to(constant, (1, 6, 6, 4)).copy()]))
    data = np.tile(IMAGES, (8, 1, 1, 1))
    _same(model, data)
    with warnings.catch_warnings():  # Of the zero that holds the constant: no data can change it.
        warnings.simplefilter("error", CalibrationWarning)
        kqat.quantize_model(model, calibration_data=data)


def test_a_power_of_two_tensors_is_named() -> None:
    x = keras.Input(ROWS.shape[1:])
    with pytest.raises(UnsupportedLayerError, match="one tensor, and numbers, in operation"):
        _parts(keras.Model(x, ops.power(ops.abs(x) + 1.0, ops.tanh(x))))


def _over_root_of_channels(x: Any) -> Any:
    return ops.tanh(x / x.shape[-1] ** 0.5) * 2.0 + 0.1


def _by_number_of_axes(x: Any) -> Any:
    return ops.tanh(x) * 2.0 + 0.1 if len(x.shape) == 3 else ops.sigmoid(x) * 0.3 + 0.2


def _over_counted_channels(x: Any) -> Any:
    count = ops.sum(ops.ones_like(x), axis=-1, keepdims=True)
    return ops.tanh(x / count) * 2.0 + 0.1


def _over_root_in_tensorflow(x: Any) -> Any:
    return tf.math.erf(x / tf.sqrt(tf.cast(tf.shape(x)[-1], "float32"))) * 2.0


class _Applied(layers.Layer):
    def __init__(self, function: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


@pytest.mark.parametrize("kind", [layers.Lambda, layers.Activation, _Applied])
@pytest.mark.parametrize(
    "function",
    [
        _over_root_of_channels,
        _by_number_of_axes,
        _over_counted_channels,
        _over_root_in_tensorflow,
    ],
)
def test_a_function_of_each_number_may_read_the_shape(kind: Any, function: Any) -> None:
    """Its table would be that of one channel and two axes."""
    model = keras.Sequential([keras.Input(ROWS.shape[1:]), kind(function)])
    _same(model, ROWS)


def _times_samples(x: Any) -> Any:
    return x * ops.cast(ops.shape(x)[0], "float32")


@pytest.mark.parametrize("kind", [layers.Lambda, layers.Activation, _Applied])
def test_a_function_of_the_number_of_samples_is_refused(kind: Any) -> None:
    model = keras.Sequential([keras.Input(ROWS.shape[1:]), kind(_times_samples, name="own")])
    with pytest.raises(UnsupportedLayerError, match=r"(?s)'own'.*number of samples.*'own': None"):
        kqat.plan(model)


def test_advice_about_a_function_inside_a_layer_names_the_layer() -> None:
    dense = layers.Dense(3, activation=_times_samples, name="own")
    model = keras.Sequential([keras.Input(ROWS.shape[1:]), dense])
    with pytest.raises(UnsupportedLayerError, match=r"policy=\{'own': None\}"):
        kqat.plan(model)
