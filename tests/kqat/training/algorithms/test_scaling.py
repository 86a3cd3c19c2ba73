"""Channels scaled between layers: the float function stays, what rounds badly rounds better."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.graph.tracer import trace
from kqat.training import algorithms
from kqat.training.algorithms.scaling import LARGEST_FACTOR, Statistics, pairs

OUTLIERS = [3, 9]
ALGORITHMS: tuple[Callable[..., keras.Model], ...] = (
    algorithms.smooth_quant,
    algorithms.awq,
    algorithms.equalize,
)
# Each weight of a chain of some six layers is multiplied and divided once more in float32.
ROUNDINGS = 1e-5


def outlying(model: keras.Model) -> keras.Model:
    """Two channels behind the normalization are forty times as large, their weights small."""
    gamma = np.random.default_rng(1).uniform(0.5, 1.5, 16)
    gamma[OUTLIERS] = 40.0
    model.get_layer("norm").gamma.assign(gamma)
    kernel = model.get_layer("wide").kernel.numpy()
    kernel[OUTLIERS] /= 20.0
    model.get_layer("wide").kernel.assign(kernel)
    return model


@pytest.fixture(scope="module")
def block() -> tuple[keras.Model, np.ndarray]:
    """A transformer's feed-forward block and its data."""
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 16))
    y = layers.LayerNormalization(name="norm")(x)
    y = layers.Dense(32, activation="relu", name="wide")(y)
    y = layers.Dense(16, name="narrow")(y)
    model = outlying(keras.Model(x, layers.Add(name="sum")([x, y]), name="block"))
    return model, np.random.default_rng(0).normal(size=(64, 6, 16)).astype(np.float32)


def noise(qat: keras.Model, model: keras.Model, data: np.ndarray) -> float:
    """Mean square of the difference that rounding makes."""
    rounded, exact = (np.asarray(one(data, training=False)) for one in (qat, model))
    return float(np.mean((rounded - exact) ** 2))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_float_function_stays(algorithm: Any, block: tuple[keras.Model, np.ndarray]) -> None:
    model, data = block
    qat = kqat.quantize_model(model, calibration_data=data)
    before = [np.array(w) for w in qat.get_weights()]
    scaled = algorithm(qat, data)
    expected = np.asarray(model(data, training=False))
    found = np.asarray(kqat.strip(scaled)(data, training=False))
    assert np.abs(found - expected).max() < ROUNDINGS * np.abs(expected).max()
    assert any(not np.array_equal(a, b) for a, b in zip(before, scaled.get_weights(), strict=True))
    for a, b in zip(before, qat.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_smooth_quant_makes_outliers_round_better(block: tuple[keras.Model, np.ndarray]) -> None:
    model, data = block
    qat = kqat.quantize_model(model, calibration_data=data)
    # Two channels of forty times the size cost the others five bits.
    assert noise(algorithms.smooth_quant(qat, data), model, data) < noise(qat, model, data) / 2


@pytest.mark.slow
def test_the_exponent_of_smooth_quant_is_searched(block: tuple[keras.Model, np.ndarray]) -> None:
    model, data = block
    tried = {}
    for policy in ("int8", "w4a8"):
        qat = kqat.quantize_model(model, {"wide": policy}, calibration_data=data)
        for alpha in ("search", 0.0, 1.0):
            smoothed = algorithms.smooth_quant(qat, data, alpha=alpha)  # type: ignore[arg-type]
            tried[policy, alpha] = noise(smoothed, model, data)
    # With 8 bits the weights can take all of it, with 4 bits less.
    assert tried["int8", "search"] < 0.95 * tried["int8", 0.0]
    assert tried["w4a8", "search"] < 0.8 * tried["w4a8", 1.0]
    with pytest.raises(kqat.SpecError, match="or 'search'"):
        algorithms.smooth_quant(qat, data, alpha="best")  # type: ignore[arg-type]


@pytest.mark.slow
def test_awq_makes_four_bits_round_better(block: tuple[keras.Model, np.ndarray]) -> None:
    model, data = block
    qat = kqat.quantize_model(model, "w4a8", calibration_data=data)
    assert noise(algorithms.awq(qat, data), model, data) < noise(qat, model, data) / 2


@pytest.mark.slow
def test_learned_steps_start_anew(block: tuple[keras.Model, np.ndarray]) -> None:
    model, data = block
    scaled = algorithms.smooth_quant(
        kqat.quantize_model(model, "w2a8", calibration_data=data), data
    )
    anew = kqat.quantize_model(kqat.strip(scaled), "w2a8", calibration_data=data)
    for name in ("quant_wide", "quant_narrow"):
        found, expected = scaled.get_layer(name), anew.get_layer(name)
        np.testing.assert_array_equal(found.scale("kernel"), expected.scale("kernel"))


def test_smooth_quant_is_the_papers_formula(block: tuple[keras.Model, np.ndarray]) -> None:
    """Equation 4, in NumPy."""
    model, data = block
    normalized = keras.Model(model.input, model.get_layer("norm").output)
    x = np.abs(np.asarray(normalized(data))).reshape(-1, 16).max(axis=0)
    kernel = model.get_layer("wide").kernel.numpy()
    factor = x**0.75 / np.abs(kernel).max(axis=1) ** 0.25
    qat = kqat.quantize_model(model, calibration_data=data)
    scaled = kqat.strip(algorithms.smooth_quant(qat, data, alpha=0.75))
    wide = scaled.get_layer("wide").kernel.numpy()
    np.testing.assert_allclose(wide, kernel * factor[:, None], rtol=1e-4)


def largest(wrapper: Any, axes: tuple[int, ...]) -> np.ndarray:
    """The largest weights along axes of a kernel, folded."""
    kernel = np.asarray(wrapper.layer.kernel)
    if wrapper.normalization is not None:
        kernel = kernel * np.asarray(wrapper.fold_factor())
    return np.abs(kernel).max(axis=axes)


def test_equalized_layers_have_equal_channels() -> None:
    """Nagel et al. 2019, section 4.1.2: both largest weights are the same, of all pairs at once."""
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(4, 3, use_bias=False, name="first")(x)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.ReLU()(y)
    y = layers.DepthwiseConv2D(3, name="middle")(y)
    y = layers.Dropout(0.5)(y)
    model = keras.Model(x, layers.Conv2D(2, 1, name="last")(y))
    model.get_layer("norm").gamma.assign([0.1, 1.0, 10.0, 100.0])
    data = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
    qat = algorithms.equalize(kqat.quantize_model(model, calibration_data=data), data)
    first, middle, last = (qat.get_layer(f"quant_{n}") for n in ("first", "middle", "last"))
    np.testing.assert_allclose(largest(first, (0, 1, 2)), largest(middle, (0, 1, 3)), rtol=2e-3)
    np.testing.assert_allclose(largest(middle, (0, 1, 3)), largest(last, (0, 1, 3)), rtol=2e-3)


def test_equalization_goes_on_until_nothing_moves() -> None:
    """Nagel et al. 2019, section 4.1.2, in NumPy: of a chain of dense layers, pair after pair."""
    rng = np.random.default_rng(0)
    sizes = (5, 6, 4, 3)
    spreads = (10.0 ** rng.uniform(-1, 1, size) for size in sizes[1:])
    kernels = [
        rng.normal(size=(a, b)) * spread
        for a, b, spread in zip(sizes, sizes[1:], spreads, strict=False)
    ]
    inputs = y = keras.Input((5,))
    for index, size in enumerate(sizes[1:]):
        y = layers.Dense(size, activation="relu" if index < 2 else None, name=f"d{index}")(y)
    model = keras.Model(inputs, y)
    for index, kernel in enumerate(kernels):
        model.get_layer(f"d{index}").kernel.assign(kernel)
    data = rng.normal(size=(16, 5)).astype(np.float32)
    found = algorithms.equalize(kqat.quantize_model(model, calibration_data=data), data)
    for _ in range(1000):
        for index in range(2):
            before = np.abs(kernels[index]).max(axis=0)
            behind = np.abs(kernels[index + 1]).max(axis=1)
            factor = np.sqrt(before * behind) / behind
            kernels[index] = kernels[index] / factor
            kernels[index + 1] = kernels[index + 1] * factor[:, None]
    for index, kernel in enumerate(kernels):
        got = found.get_layer(f"quant_d{index}").layer.kernel
        np.testing.assert_allclose(got, kernel, rtol=1e-2)


@pytest.mark.slow
def test_awq_is_the_papers_search(block: tuple[keras.Model, np.ndarray]) -> None:
    """Lin et al. 2024, equations 4 and 5, in NumPy: of 21 exponents that with the least error."""
    model, data = block
    hidden = keras.Model(model.input, [model.get_layer(n).output for n in ("norm", "wide")])
    config = kqat.QuantizeConfig(
        weights=kqat.QuantSpec(bits=4, symmetric=True, narrow_range=True, axis="channel"),
        weight_step=kqat.MaxAbs(),
    )
    qat = kqat.quantize_model(model, config, calibration_data=data)
    found = kqat.strip(algorithms.awq(qat, data))
    for name, x in zip(("wide", "narrow"), map(np.asarray, hidden(data)), strict=True):
        x = x.reshape(-1, x.shape[-1]).astype(np.float64)
        kernel = model.get_layer(name).kernel.numpy().astype(np.float64)
        errors, scales = [], []
        for alpha in np.arange(21) / 20:
            s = np.maximum(np.abs(x).mean(axis=0), 1e-4) ** alpha
            s = s / np.sqrt(s.max() * s.min())
            scaled = kernel * s[:, None]
            step = np.abs(scaled).max(axis=0) / 7
            rounded = np.sign(scaled) * np.floor(np.abs(scaled) / step + 0.5) * step
            errors.append(np.sum(((x / s) @ rounded - x @ kernel) ** 2))
            scales.append(s)
        best = scales[int(np.argmin(errors))]
        assert not np.allclose(best, 1.0)
        # The kernel's outputs are divided by what the next layer is multiplied by.
        want = kernel * best[:, None]
        got = found.get_layer(name).kernel.numpy()
        if name == "wide":
            below = (got / want)[0]
            np.testing.assert_allclose(got / want, np.broadcast_to(below, got.shape), rtol=1e-3)
        else:
            np.testing.assert_allclose(got, want, rtol=1e-3)
            np.testing.assert_allclose(below, 1.0 / best, rtol=1e-3)


def test_pairs_are_those_that_nothing_else_reads() -> None:
    x = keras.Input((6, 16))
    shared = layers.Dense(16, name="shared")
    y = layers.LayerNormalization(name="pre")(x)
    y = layers.Dense(16, name="read_by_one")(y)
    z = layers.Dense(16, activation="relu6", name="cut")(layers.Dense(16, name="before_cut")(y))
    z = layers.Dense(16, name="after_cut")(z)
    z = shared(shared(z))
    w = layers.LayerNormalization(name="post")(z)  # a residual reads it too
    w = layers.Add()([w, layers.Dense(16, name="after_post")(w)])
    model = keras.Model(x, layers.Dense(16, name="head")(layers.Dense(16, name="tail")(w)))
    data = np.random.default_rng(0).normal(size=(8, 6, 16)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=data)
    assert [pair.name for pair in pairs(trace(qat))] == [
        "pre -> read_by_one",
        "read_by_one -> before_cut",
        "before_cut -> cut",
        "tail -> head",
    ]


@pytest.fixture(scope="module")
def commuting() -> tuple[keras.Model, np.ndarray]:
    """Between four layers stands what commutes with positive factors of channels."""
    keras.utils.set_random_seed(0)
    chain = [
        layers.Conv2D(4, 3, name="a"),
        layers.LeakyReLU(negative_slope=0.2),
        layers.MaxPooling2D(2),
        layers.ZeroPadding2D(1),
        layers.Conv2D(4, 3, name="b"),
        layers.PReLU(shared_axes=[1, 2], alpha_initializer="glorot_uniform"),
        layers.AveragePooling2D(2),
        layers.UpSampling2D(2, interpolation="bilinear"),
        layers.Cropping2D(1),
        layers.SpatialDropout2D(0.5),
        layers.DepthwiseConv2D(2, name="c"),
        layers.Reshape((9, 4)),
        layers.Permute((1, 2)),
        layers.Identity(),
        layers.ReLU(),
        layers.GlobalAveragePooling1D(),
        layers.Dense(3, name="d"),
    ]
    model = keras.Sequential([keras.Input((14, 14, 3)), *chain], name="commuting")
    for name, axis in (("a", -1), ("b", -1), ("c", 2)):
        kernel = model.get_layer(name).kernel.numpy()
        shape = [1] * kernel.ndim
        shape[axis] = -1
        kernel *= np.reshape([1.0, 30.0, 0.1, 1.0], shape)
        model.get_layer(name).kernel.assign(kernel)
    return model, np.random.default_rng(0).normal(size=(32, 14, 14, 3)).astype(np.float32)


@pytest.mark.slow
def test_factors_pass_what_commutes_with_them(
    commuting: tuple[keras.Model, np.ndarray],
) -> None:
    model, data = commuting
    qat = kqat.quantize_model(model, calibration_data=data)
    assert [(pair.name, pair.pads) for pair in pairs(trace(qat))] == [
        ("a -> b", True),
        ("b -> c", False),
        ("c -> d", False),
    ]
    equal = algorithms.equalize(qat, data, absorb_biases=True)
    expected = np.asarray(model(data, training=False))
    found = np.asarray(kqat.strip(equal)(data, training=False))
    assert np.abs(found - expected).max() < ROUNDINGS * np.abs(expected).max()
    assert noise(equal, model, data) < noise(qat, model, data) / 2


BLOCKED: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda y, first: layers.Add(name="skip")([y, first]), r"'skip' \(Add\) reads it"),
    (lambda y, first: layers.Flatten(name="flat")(y), r"'flat' \(Flatten\) reads it"),
    (lambda y, first: layers.ReLU(6.0, name="cut")(y), r"'cut' clamps at a fixed value"),
    (lambda y, first: layers.ReLU(threshold=1.0, name="from_1")(y), r"'from_1.*reads it"),
    (lambda y, first: layers.Activation("tanh", name="curved")(y), r"'curved' \(Activation\)"),
    (lambda y, first: layers.Permute((3, 1, 2), name="turned")(y), r"'turned' \(Permute\)"),
]


@pytest.mark.parametrize(("between", "words"), BLOCKED)
def test_what_does_not_commute_is_named(between: Callable[[Any, Any], Any], words: str) -> None:
    x = keras.Input((3, 3, 3))
    y = between(layers.Conv2D(3, 1, name="first")(x), x)
    y = layers.Flatten(name="last_flat")(y)
    model = keras.Model(x, layers.Dense(2, name="head")(y), name="blocked")
    with pytest.warns(kqat.RangeWarning):
        qat = kqat.quantize_model(model)
    with pytest.raises(kqat.ModelError, match=rf"'blocked', .*'first': {words}.*'head': it is an"):
        algorithms.equalize(qat, np.zeros((2, 3, 3, 3), np.float32))


@pytest.mark.slow
def test_scaled_model_trains_and_ships(block: tuple[keras.Model, np.ndarray]) -> None:
    model, data = block
    qat = algorithms.smooth_quant(kqat.quantize_model(model, calibration_data=data), data)
    qat.compile("sgd", "mse", run_eagerly=True)  # Two steps: a trace costs more.
    qat.fit(data, data, epochs=1, verbose=0)
    report = tflite_export.verify(
        qat, tflite_export.convert(qat), data, runtimes=["litert_reference"]
    )
    (part,) = report.runtimes
    assert report.is_full_integer
    assert part.problem is None
    assert part.max_steps <= 1


def test_statistics_are_those_of_all_batches() -> None:
    values = np.random.default_rng(0).normal(size=(7, 5, 3))
    statistics = Statistics(3)
    for batch in (values[:2], values[2:]):
        statistics.add(batch)
    rows = values.reshape(-1, 3)
    np.testing.assert_allclose(statistics.largest, np.abs(rows).max(axis=0))
    np.testing.assert_allclose(statistics.mean_magnitude, np.abs(rows).mean(axis=0))
    np.testing.assert_allclose(statistics.products, rows.T @ rows / len(rows))


def test_a_dead_channel_is_scaled_within_bounds() -> None:
    x = keras.Input((4, 16))
    y = layers.LayerNormalization(name="norm")(x)
    model = outlying(keras.Model(x, layers.Dense(8, name="wide")(y)))
    norm, wide = model.get_layer("norm"), model.get_layer("wide")
    norm.gamma.assign(norm.gamma * np.r_[0.0, np.ones(15)])
    wide.kernel.assign(wide.kernel * np.r_[1.0, 0.0, np.ones(14)][:, None])
    data = np.random.default_rng(0).normal(size=(32, 4, 16)).astype(np.float32)
    scaled = algorithms.smooth_quant(kqat.quantize_model(model, calibration_data=data), data)
    assert all(np.isfinite(w).all() for w in scaled.get_weights())
    ratio = kqat.strip(scaled).get_layer("norm").gamma.numpy() / norm.gamma.numpy().clip(1e-9)
    assert ratio[1:].max() <= LARGEST_FACTOR


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_to_scale_is_an_error(algorithm: Any) -> None:
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(x), name="single")
    data = np.ones((4, 4), np.float32)
    qat = kqat.quantize_model(model, calibration_data=data)
    with pytest.raises(kqat.ModelError, match=r"right before layers with weights.*'single'"):
        algorithm(qat, data)
    with pytest.raises(kqat.ModelError, match="Received: 'single', which is float"):
        algorithm(model, data)


def test_alpha_outside_is_an_error(block: tuple[keras.Model, np.ndarray]) -> None:
    with pytest.raises(kqat.SpecError, match=r"alpha inside \[0, 1\].* Received: alpha=1.5"):
        algorithms.smooth_quant(block[0], block[1], alpha=1.5)
