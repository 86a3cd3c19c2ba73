"""`QuantizeWrapper`: the layer inside computes with rounded weights, and is not touched."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kqat.base.errors import ModelError
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.learned_step import LearnedStep
from kqat.training.weight_wrapper import QuantizeWrapper
from tests.kqat import reference

PER_TENSOR = QuantSpec(symmetric=True, narrow_range=True)
FOUR_BITS = QuantSpec(bits=4, symmetric=True, narrow_range=True)


def per(*axes: int, bits: int = 8) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=True, narrow_range=True, axis=axes)


# Layer, shape of its input, grid.
CASES = (
    (lambda: layers.Dense(5, name="inner"), (4,), per(-1)),
    (lambda: layers.Dense(5, name="inner"), (3, 4), PER_TENSOR),
    (lambda: layers.Dense(5, use_bias=False, name="inner"), (4,), per(-1, bits=2)),
    (lambda: layers.Conv1D(5, 3, name="inner"), (9, 4), per(-1)),
    (lambda: layers.Conv2D(5, 3, padding="same", name="inner"), (6, 6, 4), per(-1)),
    (lambda: layers.Conv2D(5, 3, strides=2, name="inner"), (7, 7, 4), FOUR_BITS),
    (lambda: layers.DepthwiseConv2D(3, name="inner"), (6, 6, 4), per(-2, -1)),
    (lambda: layers.Conv2DTranspose(5, 3, name="inner"), (4, 4, 3), per(-2)),
)
NAMES = tuple(f"{type(make()).__name__}-{spec.bits}-{spec.axis}" for make, _, spec in CASES)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wrapper(make: Any, shape: tuple[int, ...], spec: QuantSpec, **options: Any) -> QuantizeWrapper:
    """Built, with biases that are not zero."""
    wrapped = QuantizeWrapper(make(), {"kernel": spec}, name="outer", **options)
    wrapped(np.zeros((1, *shape), np.float32))
    for index, variable in enumerate(wrapped.weights):
        if "seed" not in variable.path:
            variable.assign(np.abs(normal(*variable.shape, seed=index)) + 0.1 * (index > 1))
    wrapped.layer.kernel.assign(normal(*wrapped.layer.kernel.shape))
    wrapped.correct(None)
    return wrapped


def on_grid(weight: Any, spec: QuantSpec) -> np.ndarray:
    """By the reference."""
    weight = np.asarray(weight)
    axes = spec.axis if isinstance(spec.axis, tuple) else ()
    scale = reference.weight_scale(weight, axes, spec.bits)
    return reference.fake_quantize_weight(weight, scale, spec.bits)


def gradients(call: Any, variables: list[Any], upstream: np.ndarray) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        y = call()
    return [np.asarray(g) for g in tape.gradient(y, [v.value for v in variables], upstream)]


@pytest.mark.parametrize(("make", "shape", "spec"), CASES, ids=NAMES)
def test_layer_sees_the_rounded_weights(make: Any, shape: tuple[int, ...], spec: QuantSpec) -> None:
    """Values and gradients are those of the layer with rounded weights put into it."""
    wrapped, x = wrapper(make, shape, spec), normal(2, *shape)
    kernel = wrapped.layer.kernel.numpy()
    plain = make()
    plain.build((None, *shape))
    plain.set_weights([on_grid(kernel, spec), *wrapped.layer.get_weights()[1:]])
    y = wrapped(x)
    np.testing.assert_array_equal(y, plain(x))
    np.testing.assert_array_equal(wrapped.rounded("kernel"), on_grid(kernel, spec))
    np.testing.assert_array_equal(wrapped.on_grid("kernel"), on_grid(kernel, spec))
    assert tuple(wrapped.compute_output_shape((None, *shape))) == (None, *y.shape[1:])
    upstream = normal(*y.shape, seed=5)
    ours = gradients(lambda: wrapped(x), wrapped.trainable_variables, upstream)
    theirs = gradients(lambda: plain(x), plain.trainable_variables, upstream)
    for got, expected in zip(ours, theirs, strict=True):
        assert np.all(got != 0)
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(wrapped.layer.kernel, kernel)


@pytest.mark.parametrize(("make", "shape", "spec"), CASES, ids=NAMES)
def test_weights_on_the_grid_change_nothing(
    make: Any, shape: tuple[int, ...], spec: QuantSpec
) -> None:
    wrapped, x = wrapper(make, shape, spec), normal(2, *shape)
    kernel = wrapped.layer.kernel
    steps = np.random.default_rng(0).integers(-spec.qmax, spec.qmax + 1, kernel.shape)
    steps[0] = spec.qmax  # Every channel is full, so its scale is the power of two.
    kernel.assign(steps * 2.0**-6)
    np.testing.assert_array_equal(wrapped(x), wrapped.layer(x))


def test_graph_does_what_eager_code_does() -> None:
    make, shape, spec = CASES[4]
    wrapped, x = wrapper(make, shape, spec), normal(2, *shape)
    np.testing.assert_array_equal(tf.function(wrapped)(x), wrapped(x))


class Gain(layers.Layer):
    """A user's layer: one weight to round, one left alone, and state of two kinds."""

    def build(self, input_shape: Any) -> None:
        self.gain = self.add_weight(name="gain", shape=(input_shape[-1],))
        self.offset = self.add_weight(name="offset", shape=(input_shape[-1],))
        self.state = self.add_weight(name="state", shape=(), trainable=False)
        self.calls = self.add_weight(
            name="calls", shape=(), initializer="zeros", dtype="int32", trainable=False
        )

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.calls.assign_add(1)
        return x * self.gain + self.offset


def test_other_variables_and_state_stay_the_layers_own() -> None:
    wrapped, x = QuantizeWrapper(Gain(), {"gain": FOUR_BITS}), normal(5, 4)
    wrapped.build(x.shape)
    wrapped.layer.gain.assign(normal(4))
    wrapped.layer.offset.assign(normal(4, seed=1))
    expected = x * on_grid(wrapped.layer.gain, FOUR_BITS) + wrapped.layer.offset.numpy()
    np.testing.assert_array_equal(wrapped(x, training=True), expected)
    np.testing.assert_array_equal(wrapped(x), expected)
    assert int(wrapped.layer.calls) == 1


def test_frozen_weights_are_rounded_for_the_call_only() -> None:
    wrapped, x = QuantizeWrapper(Gain(), {"gain": FOUR_BITS}), normal(5, 4)
    wrapped.build(x.shape)
    wrapped.trainable = False
    gain = normal(4)
    wrapped.layer.gain.assign(gain)
    wrapped.layer.offset.assign(np.zeros(4))
    np.testing.assert_array_equal(wrapped(x), x * on_grid(gain, FOUR_BITS))
    np.testing.assert_array_equal(wrapped.layer.gain, gain)


def test_adapters_beside_the_kernel_are_refused_by_name() -> None:
    """The file has one kernel: training ended in an AttributeError, and inference left them out."""
    wrapped, x = QuantizeWrapper(layers.Dense(3, name="head"), {"kernel": FOUR_BITS}), normal(5, 4)
    wrapped(x)
    wrapped.layer.enable_lora(2)
    with pytest.raises(ModelError, match=r"kernel in layer 'head' of .* LoRA adapters"):
        wrapped(x)


def test_without_grids_the_layer_is_called_as_it_is() -> None:
    layer, x = layers.BatchNormalization(), normal(5, 4)
    wrapped = QuantizeWrapper(layer, {})
    np.testing.assert_array_equal(wrapped(x), layer(x))
    wrapped(x, training=True)
    assert np.all(layer.moving_mean.numpy() != 0)


FOLDED = [
    (make, shape, spec)
    for make, shape, spec in CASES
    if type(make()).__name__ in ("Conv2D", "DepthwiseConv2D", "Dense")
]
FOLDED += [(make, shape, PER_TENSOR) for make, shape, _ in FOLDED if len(shape) > 1]


def folding(make: Any, shape: tuple[int, ...], spec: QuantSpec, **options: Any) -> QuantizeWrapper:
    wrapped = wrapper(make, shape, spec, normalization=layers.BatchNormalization(), **options)
    # Of both signs, and of sizes for which rounding before and after folding differ.
    gamma = normal(*wrapped.normalization.gamma.shape, seed=7) * 3
    wrapped.normalization.gamma.assign(gamma)
    return wrapped


def normalization_factor(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    mean, variance, gamma, beta = (
        np.asarray(v, np.float64)
        for v in (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
    )
    factor = gamma / np.sqrt(variance + norm.epsilon)
    return factor, beta - mean * factor


@pytest.mark.parametrize(("make", "shape", "spec"), FOLDED)
def test_folded_inference_is_the_layer_with_rounded_folded_weights(
    make: Any, shape: tuple[int, ...], spec: QuantSpec
) -> None:
    wrapped, x = folding(make, shape, spec), normal(2, *shape)
    assert wrapped.folds_before("kernel") == (spec.axis is None)
    factor, offset = normalization_factor(wrapped.normalization)
    kernel = wrapped.layer.kernel.numpy()
    # A depthwise kernel ends in (channels, 1), any other in (channels,).
    over_kernel = factor.reshape(kernel.shape[2:]) if kernel.shape[-1] == 1 else factor
    bias = np.asarray(wrapped.layer.bias) if wrapped.layer.use_bias else 0.0
    plain = make()
    plain.use_bias = True
    plain.build((None, *shape))
    plain.set_weights([on_grid(np.float32(kernel * over_kernel), spec), bias * factor + offset])
    expected = plain(x).numpy()
    # A thousandth of an output step: some 40 products and the normalization, each rounded in
    # float32 to 2**-24 of values that span 255 steps (measured: 3e-5 steps).
    step = (expected.max() - expected.min()) / 255
    assert np.abs(wrapped(x) - expected).max() < 1e-3 * step


@pytest.mark.parametrize("spec", [per(-1), PER_TENSOR], ids=["channel", "tensor"])
def test_integers_are_those_of_the_folded_weights(spec: QuantSpec) -> None:
    """Per channel they are those of the weights before folding too, but for gamma's sign."""
    make, shape, _ = CASES[4]
    wrapped = folding(make, shape, spec)
    factor, _ = normalization_factor(wrapped.normalization)
    kernel = wrapped.layer.kernel.numpy()
    scale = np.asarray(wrapped.scale("kernel"))
    integers = np.rint(np.asarray(wrapped.on_grid("kernel")) / scale)
    shipped = integers if wrapped.folds_before("kernel") else integers * np.sign(factor)

    def expected(weight: np.ndarray) -> np.ndarray:
        axes = spec.axis if isinstance(spec.axis, tuple) else ()
        return reference.quantize_weight(weight, reference.weight_scale(weight, axes, 8), 8)

    np.testing.assert_array_equal(shipped, expected((kernel * factor).astype(np.float32)))
    assert np.array_equal(integers, expected(kernel)) == (spec.axis is not None)


@pytest.mark.parametrize("spec", [per(-1), PER_TENSOR], ids=["channel", "tensor"])
def test_a_gamma_of_zero_spoils_nothing(spec: QuantSpec) -> None:
    make, shape, _ = CASES[4]
    wrapped, x = folding(make, shape, spec), normal(2, *shape)
    gamma = wrapped.normalization.gamma.numpy()
    gamma[2] = 0.0
    wrapped.normalization.gamma.assign(gamma)
    for training in (False, True):
        y = wrapped(x, training=training).numpy()
        assert np.isfinite(y).all()
        assert np.all(y[..., 2] == wrapped.normalization.beta.numpy()[2])


@pytest.mark.parametrize("spec", [per(-1), PER_TENSOR], ids=["channel", "tensor"])
def test_frozen_statistics_do_not_move(spec: QuantSpec) -> None:
    make, shape, _ = CASES[4]
    wrapped, x = folding(make, shape, spec, freeze_statistics=True), normal(2, *shape)
    norm = wrapped.normalization
    before = norm.moving_mean.numpy(), norm.moving_variance.numpy()
    np.testing.assert_array_equal(wrapped(x, training=True), wrapped(x))
    np.testing.assert_array_equal((norm.moving_mean, norm.moving_variance), before)
    wrapped.freeze_statistics = False
    assert not np.array_equal(wrapped(x, training=True), wrapped(x))
    assert np.all(norm.moving_mean.numpy() != before[0])
    assert np.all(norm.moving_variance.numpy() != before[1])


@pytest.mark.parametrize("spec", [per(-1), PER_TENSOR], ids=["channel", "tensor"])
@pytest.mark.parametrize("freeze", [False, True])
def test_gradient_reaches_everything_through_the_fold(spec: QuantSpec, freeze: bool) -> None:
    make, shape, _ = CASES[5]
    wrapped = folding(make, shape, spec, freeze_statistics=freeze)
    names = {v.name for v in wrapped.trainable_variables}
    assert names == {"kernel", "bias", "gamma", "beta"}
    x, upstream = normal(2, *shape), normal(2, 3, 3, 5, seed=3)
    found = gradients(lambda: wrapped(x, training=True), wrapped.trainable_variables, upstream)
    # Gamma is so small in one channel that its folded weights round to zero per tensor.
    alive = np.any(wrapped.rounded("kernel") != 0.0, axis=(0, 1, 2))
    assert np.all(alive) == (spec.axis is not None)
    for variable, gradient in zip(wrapped.trainable_variables, found, strict=True):
        # The mean over the batch takes away what a bias adds, and what comes from no weight.
        moving = freeze or variable.name not in ("gamma", "bias")
        expected = np.full(5, True) if moving else alive & (variable.name == "gamma")
        assert np.all((gradient != 0) | ~expected), variable.path


@pytest.mark.parametrize("folded", [False, True])
def test_config_comes_back(folded: bool) -> None:
    norm = layers.BatchNormalization(epsilon=0.01, name="norm") if folded else None
    wrapped = QuantizeWrapper(
        layers.Conv2D(5, 3, dilation_rate=2, name="inner"),
        {"kernel": per(-1)},
        norm,
        freeze_statistics=folded,
        name="outer",
    )
    config = wrapped.get_config()
    copy = QuantizeWrapper.from_config(config.copy())
    assert copy.get_config() == config
    assert copy.layer.dilation_rate == (2, 2)
    assert copy.weight_specs == {"kernel": per(-1)}
    assert (copy.normalization is not None) == folded
    assert not folded or copy.normalization.epsilon == 0.01
    assert copy.freeze_statistics == folded


def test_fit_save_and_load_without_custom_objects(tmp_path: Path) -> None:
    make, shape, spec = CASES[4]
    inputs = keras.Input(shape)
    wrapped = QuantizeWrapper(make(), {"kernel": spec}, layers.BatchNormalization(), name="outer")
    network = keras.Model(inputs, wrapped(inputs))
    # Calibration alone changes a correction.
    trained = [v for v in network.weights if not v.path.endswith(("/correction", "/corrected"))]
    before = [v.numpy() for v in trained]
    network.compile("adam", "mse")
    x = normal(8, *shape)
    y = network(x).numpy() + 1.0
    network.fit(x, y, batch_size=4, verbose=0)
    after = [v.numpy() for v in trained]
    assert len(after) == 6
    assert all(np.any(a != b) for a, b in zip(after, before, strict=True))
    network.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), network(x))
    for copy in (network, loaded):
        copy.fit(x, y, batch_size=4, verbose=0, shuffle=False)
    for a, b in zip(network.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_mixed_precision_trains_the_integers_that_freezing_ships(policy: str) -> None:
    """Under Keras's autocasting, `rounded` is asked inside of a call and outside of one."""
    keras.config.set_dtype_policy(policy)
    wrapped = QuantizeWrapper(layers.Dense(64, use_bias=False), {"kernel": per(-1)})
    eye = np.eye(64, dtype=np.float32)
    wrapped(eye)
    wrapped.layer.kernel.assign(normal(64, 64))
    scale = np.asarray(wrapped.scale("kernel"))
    assert scale.dtype == np.float32
    called = np.rint(np.asarray(tf.cast(wrapped(eye), tf.float32)) / scale)
    np.testing.assert_array_equal(called, np.rint(np.asarray(wrapped.on_grid("kernel")) / scale))


def test_mixed_precision_keeps_the_layers_state() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    wrapped = QuantizeWrapper(Gain(), {"gain": FOUR_BITS})
    wrapped.build((None, 4))
    wrapped.layer.state.assign(1.0001)
    wrapped(normal(5, 4))
    assert wrapped.layer.state.numpy() == np.float32(1.0001)


@pytest.mark.parametrize("lacking", ["nothing", "widths", "correction", "widths and correction"])
def test_files_of_older_releases_load(lacking: str) -> None:
    wrapped = QuantizeWrapper(
        layers.Dense(2), {"kernel": per(-1, bits=4)}, weight_step=LearnedStep()
    )
    wrapped.build((None, 3))
    held = [np.full((1, 2), 0.5, np.float32)]
    held += [] if "widths" in lacking else [np.int32([8])]  # Of a stage of FallingBits.
    held += [] if "correction" in lacking else [np.float32([3.0, 4.0]), np.int32(5)]
    wrapped.load_own_variables({str(index): value for index, value in enumerate(held)})
    np.testing.assert_array_equal(wrapped.steps["kernel"], held[0])
    np.testing.assert_array_equal(wrapped.step_bits, [4 if "widths" in lacking else 8])
    assert wrapped.asks_step_bits == ("widths" not in lacking)
    np.testing.assert_array_equal(
        wrapped.correction, [0.0, 0.0] if "correction" in lacking else [3.0, 4.0]
    )
