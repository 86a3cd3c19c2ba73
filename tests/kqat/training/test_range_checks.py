"""What calibration tells: one warning, the worst tensors by name, and the way out."""

import warnings
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat import CalibrationWarning, Fixed, MinMax, QuantizeConfig
from kqat.base.errors import LoweringError

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (128, 8, 8, 3)).astype(np.float32)


def said(model: keras.Model, data: Any, policy: Any = "int8", **options: Any) -> str:
    """The one warning of calibration, or an empty text."""
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        kqat.quantize_model(model, policy, calibration_data=data, **options)
    texts = [str(w.message) for w in met if issubclass(w.category, CalibrationWarning)]
    assert len(texts) <= 1
    return "".join(texts)


def small(*more: Any) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3), name="image"),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            *more,
            layers.GlobalAveragePooling2D(name="mean"),
            layers.Dense(5, activation="softmax", name="head"),
        ],
        name="small",
    )


def joined(scale: float, *, residual: bool = False) -> keras.Model:
    x = keras.Input((8, 8, 3), name="image")
    boxes = layers.Rescaling(scale, name="boxes")(
        layers.Conv2D(4, 1, activation="sigmoid", name="box")(x)
    )
    scores = layers.Conv2D(4, 1, activation="sigmoid", name="scores")(x)
    join = layers.Add if residual else layers.Concatenate
    return keras.Model(x, join(name="both")([boxes, scores]), name="joined")


def test_good_data_are_silent() -> None:
    assert said(small(), X) == ""


def test_a_mean_that_is_taken_off_may_be_anything() -> None:
    """What is left of a mean behind LayerNormalization's division is but errors of rounding."""
    rows = np.random.default_rng(0).normal(10.0, 1.0, (256, 6, 4)).astype(np.float32)
    model = keras.Sequential([keras.Input((6, 4)), layers.LayerNormalization(name="norm")])
    assert "norm_unit_shift" not in said(model, rows)


def test_few_samples() -> None:
    text = said(small(), X[:5])
    assert text.startswith("Calibration of 'small': 5 samples are few")
    assert "some hundred" in text
    assert said(small(), X[:1]).startswith("Calibration of 'small': 1 sample is few")


def test_halves_that_disagree() -> None:
    louder = np.concatenate([X[:64] * 0.1, X[64:]])
    assert (
        "'image' spreads 10.0 times as far in one half of the samples (the first or the last)"
        in said(small(), louder)
    )
    uneven = X * np.where(np.arange(128) % 2, 1.0, 0.1)[:, None, None, None]
    assert "10.0 times as far in one half of the samples (every other one)" in said(small(), uneven)
    still = X * (np.arange(128) % 2)[:, None, None, None]
    text = said(small(), still)
    assert "'image' is constant in one half of the samples (every other one)" in text
    assert "inf " not in text


def test_inputs_of_one_number_and_dead_values() -> None:
    assert "'image' was zero in all samples" in said(small(), np.zeros_like(X))
    assert "'image' was -2.5 in all samples" in said(small(), np.full_like(X, -2.5))
    dead = small()
    dead.get_layer("conv").bias.assign(np.full(4, -100.0))
    text = said(dead, X)
    assert "'conv" in text
    assert "was zero in all samples" in text


def test_scales_that_a_kernel_refuses_are_told() -> None:
    x = keras.Input((4,), name="x")
    tiny = layers.Dense(3, kernel_initializer=keras.initializers.Constant(1e-9), name="tiny")
    text = said(keras.Model(x, layers.Softmax()(tiny(x))), X[:, 0, :4, 0])
    assert "'tiny' has a scale of " in text and "SOFTMAX, which reads it, takes those above" in text


@pytest.mark.parametrize("function", ["sigmoid", "tanh", "softmax"])
def test_scales_at_which_a_kernel_of_16_bits_overflows_are_told_and_refused(function: str) -> None:
    """Its file was made, and its values were wrong."""
    x = keras.Input((4,), name="large")
    model = keras.Model(x, layers.Activation(function, name="last")(x))
    data = X[:, 0, :4, 0] * (2.0**15 * 6.0 / np.abs(X[:, 0, :4, 0]).max())
    with pytest.warns(kqat.CalibrationWarning, match="'large' has a scale of 6, .* those below 5"):
        qat = kqat.quantize_model(model, "int16x8", calibration_data=data)
    with pytest.raises(LoweringError, match=r"scale below 5\.0 .* for 'large'"):
        tflite_export.convert(qat)


def test_clipping_tells_share_and_how_far() -> None:
    outlying = X.copy()
    outlying[3, 0, 0, 0] = 50.0
    config = QuantizeConfig(activation_range=kqat.Percentile(95.0))
    text = said(small(), outlying, config)
    assert "is clipped to [" in text
    assert "% of its values lie outside, as far as [" in text
    assert "MinMax()) covers all" in text
    assert "clipped" not in said(small(), X, QuantizeConfig(activation_range=MinMax()))


def test_a_given_range_that_cuts_is_told() -> None:
    config = {"conv": QuantizeConfig(activation_range=Fixed(-0.1, 0.1))}
    conv, image = layers.Conv2D(4, 3, name="conv"), keras.Input((8, 8, 3))
    text = said(keras.Sequential([image, conv], name="cut"), X, config)
    assert "'conv' is clipped to [-0.1, 0.1], which is given" in text
    # The share is that of inference.
    assert said(keras.Sequential([image, layers.Dropout(0.5), conv], name="cut"), X, config) == text


@pytest.mark.parametrize("nested", [False, True])
def test_members_of_unlike_size(nested: bool) -> None:
    model = joined(320.0)
    if nested:
        x = keras.Input((8, 8, 3), name="image")
        model = keras.Model(x, layers.Reshape((64, 8), name="flat")(model(x)))
    text = said(model, X)
    assert "both' has one scale for values of unlike size: " in text
    assert "loses 8.4 of its 8 bits" not in text and "loses all of its 8 bits" in text
    assert "separate outputs" in text
    assert "unlike" not in said(joined(4.0), X)
    # The way out that it names is one: seven of 16 bits are left.
    assert said(model, X, "int16x8") == ""


@pytest.mark.parametrize("behind", [(), (layers.Reshape((-1, 6)),), (layers.ReLU(),)])
def test_channels_of_unlike_size(behind: Any) -> None:
    """Boxes in pixels and scores of one convolution; behind a ReLU some are always small."""
    head = layers.Conv2D(6, 1, name="head")
    model = keras.Sequential([keras.Input((8, 8, 3), name="image"), head, *behind], name="net")
    kernel, bias = head.get_weights()
    head.set_weights([kernel * np.array([300, 300, 300, 1, 1, 1]), bias])
    text = said(model, X)
    if any(isinstance(layer, layers.ReLU) for layer in behind):
        assert text == ""
        return
    assert "'head' has one scale for channels of unlike size: channel" in text
    assert (
        "of its 8 bits. If it matters, train on targets of like size, or let a layer and an output"
        in text
    )
    assert said(model, X, "int16x8") == ""
    # As the prior of rare classes: far from zero, and alike.
    head.set_weights([np.full_like(kernel, 0.01) * [1, 2, 1, 2, 1, 2], bias - 4.6])
    assert "channels" not in said(model, X)


def test_what_adapt_cannot_part_is_no_advice_of_it() -> None:
    x = keras.Input((4,), name="x")
    far = layers.Dense(4, kernel_initializer=keras.initializers.Constant(50.0), name="far")(x)
    near = layers.Dense(4, name="near")(x)
    text = said(keras.Model(x, keras.ops.where(x > 0.5, far, near)), X[:, 0, :4, 0])
    assert "has one scale for values of unlike size: 'near' spans" in text
    assert "Scale them alike before they meet, or give that layer 'int16x8'" in text
    assert "adapt" not in text


def test_addends_of_unlike_size() -> None:
    text = said(joined(3000.0, residual=True), X)
    assert "'both' adds values of unlike size: " in text
    assert "unlike" not in said(joined(4.0, residual=True), X)


@pytest.mark.parametrize(("scale", "residual"), [(3e5, False), (3e6, True)])
def test_16_bits_are_not_advised_where_they_are(scale: float, residual: bool) -> None:
    texts = [said(joined(scale, residual=residual), X, bits) for bits in ("int8", "int16x8")]
    assert "give that layer 'int16x8'" in texts[0]
    assert "of its 16 bits" in texts[1] and "int16x8" not in texts[1]
    assert "kqat.adapt(" in texts[1] or "Scale them alike before they are added." in texts[1]


def test_calibration_needs_data_and_a_name() -> None:
    with pytest.raises(kqat.CalibrationError, match=r"Expected calibration_data for calibration="):
        kqat.quantize_model(small(), calibration="mse")
    with pytest.raises(kqat.CalibrationError, match=r"Expected 'auto' or one of .* Received: 'm'"):
        kqat.quantize_model(small(), calibration_data=X, calibration="m")


def test_an_output_of_which_little_is_left() -> None:
    """Nothing was clipped, drowned or uneven, and the file was useless, in silence."""
    x = keras.Input((16,), name="x")
    y = layers.Dense(8, kernel_initializer=keras.initializers.RandomNormal(seed=0), name="dense")(x)
    far = np.random.default_rng(0).normal(1000.0, 0.1, (128, 16)).astype(np.float32)
    less = layers.LayerNormalization(name="norm", center=False, scale=False)(x)
    text = said(keras.Model(x, [y, less], name="two"), far)
    assert "output 'norm' has an SQNR of" in text
    assert "'norm_centered' is the first value below 10 dB" in text
    assert "output 'dense'" not in text
    assert "kqat.diagnose" in text


def test_few_bits_lose_as_much_before_training() -> None:
    assert said(small(), X, "ternary") == ""


def test_quotients_of_large_divisors() -> None:
    """Lengths that are floats: 1/200 is one step of a grid that holds 1."""
    x, length = keras.Input((4,), name="x"), keras.Input((1,), name="length")
    model = keras.Model([x, length], keras.ops.divide(x, length), name="net")
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 201, (128, 1)).astype(np.float32)
    values = generator.normal(size=(128, 4)).astype(np.float32)
    text = said(model, [values * lengths, lengths])
    assert "holds inverses up to" in text and "quotients of large divisors are lost" in text
    assert "Divide both by the number of steps first" in text
    assert "inverses" not in said(model, [values, 1.0 + lengths / 200.0])


def test_a_lost_output_is_named_with_what_computes_it() -> None:
    """A value that only another output reads may be lost as well."""
    x = keras.Input((16,), name="x")
    low = keras.initializers.Constant(-12.0)
    rare = layers.Dense(4, activation="sigmoid", bias_initializer=low, name="rare")(x)
    sound = layers.Dense(4, name="sound")(x) + rare
    far = layers.Dense(4, bias_initializer=keras.initializers.Constant(3000.0), name="far")(x)
    less = far - keras.ops.mean(far, -1, keepdims=True)
    rows = np.random.default_rng(0).normal(size=(128, 16)).astype(np.float32)
    text = said(keras.Model(x, [sound, less], name="two"), rows)
    assert "has an SQNR of" in text
    assert "'rare" not in text


def rare_scores(prior: float = -4.6) -> keras.Model:
    start, narrow = keras.initializers.Constant(prior), keras.initializers.RandomNormal(stddev=0.1)
    scores = layers.Dense(
        20, "sigmoid", kernel_initializer=narrow, bias_initializer=start, name="scores"
    )
    return keras.Sequential([keras.Input((16,)), scores])


def many_classes(classes: int = 300) -> keras.Model:
    return keras.Sequential(
        [keras.Input((16,)), layers.Dense(classes, activation="softmax", name="scores")]
    )


def long_attention(steps: int = 256) -> keras.Model:
    x = keras.Input((steps, 8))
    return keras.Model(x, layers.MultiHeadAttention(1, 4, name="scores")(x, x))


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        (rare_scores, lambda: rare_scores(0.0)),
        (many_classes, lambda: many_classes(10)),
        pytest.param(long_attention, lambda: long_attention(16), marks=pytest.mark.slow),
    ],
    ids=["rare scores", "many classes", "long attention"],
)
def test_values_that_are_few_steps_of_a_kernels_grid_are_named(coarse: Any, fine: Any) -> None:
    def about(model: keras.Model, policy: Any = "int8") -> str:
        rng = np.random.default_rng(0)
        return said(model, rng.normal(size=(64, *model.input_shape[1:])), policy)

    keras.utils.set_random_seed(0)
    model = coarse()
    text = about(model)
    assert "'scores" in text and "the grid of 1/256 that its kernel demands leaves" in text
    assert "Give the layer that makes it 'int16x8'" in text
    assert "demands" not in about(model, {"scores": "int16x8"})
    assert "demands" not in about(fine())
