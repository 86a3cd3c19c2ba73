"""Layers with the channels first ship as they are with the channels last, transposed once."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
from kqat.graph import rebuild, run_here
from kqat.planning import transpositions

FIRST: dict[str, Any] = {"data_format": "channels_first"}
IMAGE = (3, 6, 6)

Body = Callable[[Any], Any]


def _conv(filters: int = 4, size: int = 3, **options: Any) -> keras.layers.Layer:
    return layers.Conv2D(filters, size, padding="same", **FIRST, **options)


def _model(body: Body, shape: tuple[int, ...] = IMAGE) -> keras.Model:
    inputs = keras.Input(shape)
    model = keras.Model(inputs, body(inputs))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.uniform(0.2, 1.0, weight.shape))
    return model


def _between(body: Body) -> Body:
    """Two convolutions around what is to be transposed with them; nothing reads it in order."""
    return lambda x: layers.GlobalAveragePooling2D(**FIRST)(_conv()(body(_conv()(x))))


def _scaled(x: Any) -> Any:
    return layers.Rescaling([1.0, 2.0, 3.0])(x)


def _kinds(plan: kqat.Plan) -> list[str]:
    return [layer.kind for layer in plan.layers]


def _computes(plan: kqat.Plan, model: keras.Model) -> None:
    """The graph that is planned computes what the model does."""
    planned = rebuild(plan.graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "m")
    x = np.random.default_rng(1).normal(size=(2, *model.input_shape[1:])).astype(np.float32)
    np.testing.assert_allclose(planned(x), run_here(model, x), rtol=1e-4, atol=1e-4)


CARRIED: dict[str, Body] = {
    "activations": lambda x: layers.ReLU(6.0)(layers.ELU()(layers.LeakyReLU()(x))),
    "batch normalization": lambda x: layers.ReLU()(layers.BatchNormalization(axis=1)(x)),
    "layer normalization": lambda x: layers.LayerNormalization(axis=1)(x),
    "residual": lambda x: layers.Add()([x, _conv()(layers.Activation("gelu")(x))]),
    "dense block": lambda x: layers.Concatenate(axis=1)([x, _conv(2)(x), _conv(3)(x)]),
    "constant of each channel": lambda x: (x - np.ones((4, 1, 1))) * np.arange(24).reshape(4, 6, 1),
    "slopes of each channel": lambda x: layers.PReLU(shared_axes=(2, 3))(x),
    "squeeze and excite": lambda x: (
        x * _conv(4, 1, activation="sigmoid")(ops.mean(x, (2, 3), keepdims=True))
    ),
    "pads": lambda x: ops.pad(x, ((0, 0), (1, 0), (2, 1), (0, 2))),
    "mirrored pads": lambda x: ops.pad(x, ((0, 0), (0, 0), (2, 1), (0, 2)), mode="reflect"),
    "slices": lambda x: x[:, 1:, ::2, :5],
    "shuffled channels": lambda x: ops.take(x, [3, 1, 0, 2], axis=1),
    "statistics": lambda x: ops.square(x - ops.mean(x, 1, keepdims=True)) + x,
    "dropouts": lambda x: layers.Dropout(0.1)(layers.SpatialDropout2D(0.1, **FIRST)(x)),
    "rows and back": lambda x: layers.Reshape((4, 6, 6))(
        layers.Conv1D(4, 1, **FIRST)(layers.Reshape((4, 36))(x))
    ),
    "pooling": lambda x: layers.MaxPooling2D(2, **FIRST)(
        layers.AveragePooling2D(2, 1, padding="same", **FIRST)(x)
    ),
    "operations": lambda x: ops.average_pool(
        ops.max_pool(x, 2, 1, "same", **FIRST), 2, 1, "valid", **FIRST
    ),
    "sizes": lambda x: layers.Cropping2D(1, **FIRST)(
        layers.UpSampling2D(2, **FIRST)(layers.ZeroPadding2D(1, **FIRST)(x))
    ),
    "probabilities of channels": lambda x: ops.softmax(x, axis=1) + ops.sigmoid(x),
}


FAST = ("residual", "squeeze and excite", "slices")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(body, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, body in CARRIED.items()
    ],
)
def test_one_transposition_is_left_at_the_input(body: Body) -> None:
    model = _model(_between(body))
    plan = kqat.plan(model)
    assert _kinds(plan).count("Permute") == 1
    _computes(plan, model)


@pytest.mark.parametrize(
    ("body", "count"),
    [
        # A Flatten of this format has the channels last; one of the other format does not.
        (lambda x: layers.Dense(2)(layers.Flatten(**FIRST)(_conv()(x))), 1),
        (lambda x: layers.Dense(2)(layers.Flatten("channels_last")(_conv()(x))), 2),
        # The places of the largest channels have none.
        (lambda x: ops.argmax(_conv()(x), axis=1), 1),
        # Two branches of the input: it is transposed for both at once.
        (lambda x: _between(lambda y: y)(layers.ReLU()(x)) + _between(lambda y: y)(-x), 1),
        # What stands before the first convolution, and after a transposition by the user.
        (lambda x: layers.Permute((2, 3, 1))(_conv()(layers.Rescaling(2.0)(x))), 1),
        # Patches as a sequence, as vision transformers read them.
        (lambda x: layers.Dense(3)(layers.Permute((2, 1))(layers.Reshape((4, 36))(_conv()(x)))), 1),
    ],
)
def test_transpositions_are_left_where_an_order_is_read(body: Body, count: int) -> None:
    model = _model(body)
    plan = kqat.plan(model)
    assert _kinds(plan).count("Permute") == count
    if plan.graph.outputs[0].dtype == "float32":
        _computes(plan, model)


def test_a_kernel_meets_what_it_can_compute_where_as_many_transpositions_are_left() -> None:
    """The output is read in the user's order; the clamp is fused all the same."""
    plan = kqat.plan(_model(lambda x: layers.ReLU()(_conv()(x))))
    assert _kinds(plan) == ["Permute", "Conv2D", "Activation", "Permute"]
    assert plan.layers[2].into == plan.layers[1].name


def test_where_only_axes_of_one_number_move_nothing_is_transposed() -> None:
    """As at the input of EEGNet, of shape (1, channels, samples), and behind pooling of all."""
    body = lambda x: layers.Flatten("channels_last")(layers.MaxPooling2D(6, **FIRST)(_conv()(x)))  # noqa: E731
    model = _model(body, (1, 6, 6))
    plan = kqat.plan(model)
    assert "Permute" not in _kinds(plan)
    _computes(plan, model)


def test_dropouts_drop_what_they_did() -> None:
    """Whole channels of an image here, and whole steps of a sequence whose channels are first."""

    def body(x: Any) -> Any:
        x = _conv()(x)
        steps = layers.SpatialDropout1D(0.5)(layers.Reshape((4, 36))(x))
        return layers.ReLU()(layers.SpatialDropout2D(0.5, **FIRST)(x)), layers.ReLU()(steps)

    plan = kqat.plan(_model(body))
    planned = rebuild(plan.graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "m")
    channels, steps = planned(np.ones((16, *IMAGE), np.float32), training=True)
    shown = np.asarray(channels) != 0
    assert np.all(shown == shown[:, :, :1, :1]) and 0.2 < shown.mean() < 0.8
    shown = np.asarray(steps) != 0
    assert np.all(shown == shown[:, :1]) and 0.2 < shown.mean() < 0.8


def test_layers_left_float_are_not_moved() -> None:
    model = _model(_between(layers.Activation("relu", name="act")))
    plan = kqat.plan(model, {"act": None})
    assert plan.float_layers() == ("act",)
    # What it reads and what it makes have the user's order.
    assert _kinds(plan).count("Permute") == 3
    _computes(plan, model)


@pytest.mark.slow
def test_weights_keep_their_paths_and_shapes() -> None:
    body = _between(lambda x: layers.BatchNormalization(axis=1, name="norm")(x))
    model = _model(body)
    x = np.random.default_rng(0).normal(size=(8, *IMAGE)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    assert qat.input_shape == model.input_shape
    ours = [(v.path.split("/", 1)[1], tuple(v.shape)) for v in qat.trainable_weights]
    assert ours == [(v.path, tuple(v.shape)) for v in model.trainable_weights]
    stripped = kqat.strip(qat)
    np.testing.assert_allclose(stripped(x), run_here(model, x), rtol=1e-4, atol=1e-5)


def test_a_transposition_that_does_not_pay_stays_as_it_is() -> None:
    """Behind `relu` both readers would transpose, which one does now."""

    def body(x: Any) -> Any:
        turned = layers.Permute((2, 1), name="turned")(layers.Dense(4)(x))
        return layers.Dense(2)(turned), layers.Dense(2)(layers.ReLU()(turned))

    plan = kqat.plan(_model(body, (5, 3)))
    assert [layer.name for layer in plan.layers if layer.kind == "Permute"] == ["turned"]


@pytest.mark.slow
def test_a_graph_that_would_compute_another_thing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(carried: Any, node: Any, order: Any) -> Any:
        return order, lambda: node.layer

    monkeypatch.setitem(transpositions._COMMUTES, layers.Concatenate, wrong)
    body = _between(lambda x: layers.Concatenate(axis=2)([x, x]))
    model = _model(body)
    plan = kqat.plan(model)
    assert _kinds(plan).count("Permute") > 1
    _computes(plan, model)


@pytest.fixture
def channels_first_setting() -> Iterator[None]:
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format(before)


@pytest.mark.slow
@pytest.mark.usefixtures("channels_first_setting")
@pytest.mark.parametrize(
    ("shape", "body"),
    [
        (IMAGE, lambda x: layers.Flatten()(layers.Conv2D(2, 3)(_scaled(x)))),
        ((2, 4, 4, 4), lambda x: layers.MaxPooling3D(2)(layers.Conv3D(2, 3, padding="same")(x))),
        ((4, 4, 4, 2), layers.Conv3D(2, 3, padding="same", data_format="channels_last")),
        ((4, 6), lambda x: layers.Conv1DTranspose(2, 3)(layers.UpSampling1D(2)(x))),
    ],
)  # fmt: skip
def test_layers_that_kqat_makes_know_their_format(shape: tuple[int, ...], body: Body) -> None:
    """Keras's setting decides about layers that do not say: the user's, not those of rewrites."""
    model = _model(body, shape)
    _computes(kqat.plan(model), model)


@pytest.mark.parametrize("width", [4, 6])
def test_a_bias_that_keras_adds_to_columns_is_added_to_them(width: int) -> None:
    """As it does on TensorFlow where the output is as wide as it has channels, here 4."""
    model = _model(lambda x: _conv(activation="softmax")(x), (3, 5, width))
    bias = np.arange(4, dtype=np.float32)
    alike = np.array_equal(
        ops.add(np.zeros((1, 4, 1, 4)), bias.reshape(1, 4, 1, 1))[0, :, 0, 0], bias
    )
    wrong = width == 4 and not alike
    warns = pytest.warns(UserWarning, match="'conv2d.*' of type Conv2D along the width and not to")
    with warns if wrong else contextlib.nullcontext():
        plan = kqat.plan(model)
    assert ("WithConstant" in _kinds(plan)) == wrong
    _computes(plan, model)


def test_recurrent_convolutions_are_refused_by_name() -> None:
    body = layers.ConvLSTM2D(2, 3, name="steps", **FIRST)
    with pytest.raises(kqat.UnsupportedLayerError, match=r"'steps' of type ConvLSTM2D.*Permute"):
        kqat.plan(_model(body, (2, 3, 6, 6)))
