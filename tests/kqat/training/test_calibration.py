"""Calibration: what data may be, and the ranges that they give."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import kqat
import tflite_export
from kqat import ActivationQuantizer, MinMax, QuantizeConfig
from kqat.graph.tracer import trace
from kqat.planning.planner import make_plan
from kqat.training import calibration
from kqat.training.build import wrap
from kqat.training.calibration import calibrate

RNG = np.random.default_rng(0)
# Whole numbers of at most 8 bits, so that the same data can come as bytes.
A = RNG.integers(0, 256, (80, 4)).astype(np.float32)
B = RNG.integers(0, 256, (80, 4)).astype(np.float32)
LABELS = np.zeros(80, np.float32)


def uncalibrated(model: keras.Model, config: QuantizeConfig | None = None) -> keras.Model:
    policy = kqat.QuantizePolicy.of(config or "int8")
    return wrap(make_plan(trace(model), policy, model.name))


def one_input() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,), name="a"),
            layers.Dense(6, name="dense"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Dense(2, name="head"),
        ],
        name="model",
    )


def two_inputs() -> keras.Model:
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    return keras.Model([b, a], layers.Subtract(name="difference")([b, a]), name="model")


def ranges(qat: keras.Model) -> dict[str, tuple[float, float]]:
    return {
        layer.name.removesuffix("_quantizer"): layer.range()
        for layer in qat.layers
        if isinstance(layer, ActivationQuantizer)
    }


def batches(*arrays: np.ndarray, size: int = 32) -> Iterator[tuple[np.ndarray, ...]]:
    for start in range(0, len(arrays[0]), size):
        yield tuple(x[start : start + size] for x in arrays)


def dataset(elements: Any) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(elements).batch(32)


ONE_INPUT: dict[str, Callable[[], Any]] = {
    "array": lambda: A,
    "float64": lambda: A.astype(np.float64),
    "bytes": lambda: A.astype(np.uint8),
    "half precision": lambda: A.astype(np.float16),
    "tensor": lambda: tf.constant(A),
    "list of one": lambda: [A],
    "list of lists": lambda: [A.tolist()],
    "dict": lambda: {"a": A},
    "dataset": lambda: dataset(A),
    "labelled dataset": lambda: dataset((A, LABELS)),
    "weighted dataset": lambda: dataset((A, LABELS, LABELS)),
    "dataset of dicts": lambda: dataset(({"a": A}, LABELS)),
    "generator": lambda: (x for (x,) in batches(A)),
    "generator of tuples": lambda: batches(A, LABELS),
    "generator of lists": lambda: ([x] for (x,) in batches(A)),
    "list of batches in a tuple": lambda: tuple((x,) for (x,) in batches(A)),
    "function": lambda: lambda: ([x] for (x,) in batches(A)),
    "an empty batch between": lambda: iter([A[:32], A[:0], A[32:64], A[64:]]),
}

TWO_INPUTS: dict[str, Callable[[], Any]] = {
    "list in the model's order": lambda: [B, A],
    "dict in any order": lambda: {"a": A, "b": B},
    "dataset": lambda: dataset(((B, A), LABELS)),
    "dataset of dicts": lambda: dataset({"a": A, "b": B}),
    "labelled dataset of dicts": lambda: dataset(({"a": A, "b": B}, LABELS)),
    "generator": lambda: ([b, a] for b, a in batches(B, A)),
    "labelled generator": lambda: ((list(pair), None) for pair in batches(B, A)),
    "function": lambda: lambda: ({"a": a, "b": b} for b, a in batches(B, A)),
    "generator of dicts": lambda: ({"a": a, "b": b} for b, a in batches(B, A)),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, tuple[float, float]]]:
    """Ranges after the arrays themselves, which another test compares with NumPy."""
    keras.utils.set_random_seed(0)
    one, two = uncalibrated(one_input()), uncalibrated(two_inputs())
    calibrate(one, A)
    calibrate(two, [B, A])
    return {"one": ranges(one), "two": ranges(two)}


@pytest.mark.parametrize("data", ONE_INPUT.values(), ids=ONE_INPUT)
def test_one_input_may_come_as(data: Callable[[], Any], expected: Any) -> None:
    qat = uncalibrated(one_input())
    calibrate(qat, data())
    assert ranges(qat) == expected["one"]


def test_lists_inside_of_dicts_are_taken_as_fit_takes_them() -> None:
    """Such inputs are called by their own names, which the data do not have."""
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model({"pair": [b], "a": a}, layers.Dense(2)(layers.Concatenate()([a, b])))
    found = []
    for data in (
        {"pair": [B], "a": A},
        dataset(({"pair": (B,), "a": A}, LABELS)),
        {"a": A, "b": B},
    ):
        qat = uncalibrated(model)
        calibrate(qat, data)
        found.append(ranges(qat))
    assert found[0] == found[1] == found[2]
    with pytest.raises(
        kqat.CalibrationError, match=r"for the inputs \['a', 'b'\]. Received: \['pa"
    ):
        calibrate(qat, {"pair": [B], "two": A})


@pytest.mark.parametrize("data", TWO_INPUTS.values(), ids=TWO_INPUTS)
def test_two_inputs_may_come_as(data: Callable[[], Any], expected: Any) -> None:
    qat = uncalibrated(two_inputs())
    calibrate(qat, data())
    assert ranges(qat) == expected["two"]


@pytest.mark.parametrize("method", kqat.grids.CALIBRATION_METHODS)
def test_order_and_batch_size_do_not_matter_to_the_bit(method: str) -> None:
    shuffled = RNG.permutation(A)
    forms = (A, A[::-1], shuffled, (x for (x,) in batches(A, size=7)), (x[None] for x in shuffled))
    found, qat = [], uncalibrated(one_input())
    for data in forms:
        calibrate(qat, data, method=method)
        found.append(ranges(qat))
    assert all(each == found[0] for each in found)


def test_what_enters_and_leaves_the_model_is_covered() -> None:
    qat = uncalibrated(two_inputs())
    calibrate(qat, [B - 100, A], method="percentile")
    difference = B - 100 - A
    assert ranges(qat) == {
        "b": ((B - 100).min(), (B - 100).max()),
        "a": (0.0, A.max()),
        "difference": (difference.min(), difference.max()),
    }


def test_a_config_asks_for_its_own_method() -> None:
    x = np.append(np.ones(9999), 100.0).astype(np.float32).reshape(2500, 4)
    qat = uncalibrated(two_inputs(), QuantizeConfig(activation_range=kqat.Percentile(99.0)))
    calibrate(qat, [x, x])
    assert ranges(qat)["b"][1] == pytest.approx(1.0, rel=0.05)


def test_recurrent_states_are_covered_and_order_does_not_matter() -> None:
    model = keras.Sequential([keras.Input((6, 3)), layers.SimpleRNN(4, activation="relu")])
    x = RNG.normal(size=(48, 6, 3)).astype(np.float32)
    found = []
    for data in (x, x[::-1]):
        qat = kqat.quantize_model(model, calibration_data=data)
        found.append([v.numpy().tolist() for v in qat.weights if "quantizer" in v.path])
    assert found[0] == found[1]


def test_min_max_ranges_are_those_of_all_data() -> None:
    qat = uncalibrated(two_inputs(), QuantizeConfig(activation_range=MinMax()))
    calibrate(qat, [B - 100, A])
    difference = B - 100 - A
    assert ranges(qat) == {
        "b": ((B - 100).min(), (B - 100).max()),
        "a": (0.0, A.max()),
        "difference": (difference.min(), difference.max()),
    }


def test_weights_are_rounded_and_activations_are_not() -> None:
    model = one_input()
    qat = uncalibrated(model, QuantizeConfig(activation_range=MinMax()))
    for layer in ("dense", "head"):
        kernel = qat.get_layer(f"quant_{layer}").rounded("kernel")
        assert np.any(kernel != model.get_layer(layer).kernel)
        model.get_layer(layer).kernel.assign(kernel)
    calibrate(qat, A)
    found = ranges(qat)
    relu = keras.Model(model.inputs[0], model.get_layer("relu").output)
    # Batches of 32 and of 80 are multiplied in another order.
    np.testing.assert_allclose(found["relu"], (0.0, relu(A).numpy().max()), rtol=1e-5)
    out = model(A).numpy()
    np.testing.assert_allclose(found["head"], (min(out.min(), 0.0), max(out.max(), 0.0)), rtol=1e-5)


def test_calibration_trains_nothing() -> None:
    qat = uncalibrated(one_input())
    found = ("correction", "corrected")
    before = {
        v.path: v.numpy()
        for v in qat.weights
        if "quantizer" not in v.path and not v.path.endswith(found)
    }
    calibrate(qat, A)
    np.testing.assert_equal({v.path: v.numpy() for v in qat.weights if v.path in before}, before)
    assert all(
        layer.is_calibrated() for layer in qat.layers if isinstance(layer, ActivationQuantizer)
    )


def test_calibrating_again_replaces_what_was_found() -> None:
    once, twice = uncalibrated(two_inputs()), uncalibrated(two_inputs())
    calibrate(once, [B[:32], A[:32]])
    calibrate(twice, [9 * B, 9 * A])
    calibrate(twice, [B[:32], A[:32]])
    assert ranges(twice) == ranges(once)


@pytest.mark.slow
def test_calibrating_after_training_fits_the_trained_weights() -> None:
    qat = uncalibrated(one_input())
    calibrate(qat, A)
    qat.compile("sgd", "mse")
    qat.fit(A, np.zeros((80, 2)), verbose=0)
    qat.get_layer("quant_head").layer.kernel.assign(100 * np.ones((6, 2), np.float32))
    calibrate(qat, A)
    again = uncalibrated(one_input())
    calibrate(again, A)  # What was never calibrated is taken for the float model.
    for layer, trained in zip(again.layers, qat.layers, strict=True):
        if not isinstance(layer, ActivationQuantizer):
            layer.set_weights(trained.get_weights())
    calibrate(again, A)
    assert ranges(qat) == ranges(again)


def raising() -> Iterator[np.ndarray]:
    yield 9 * A[:32]
    raise OSError("the disk is gone")


class Endless(keras.utils.PyDataset):
    """Says with `None` that it has no last batch."""

    num_batches = None

    def __getitem__(self, index: int) -> np.ndarray:
        return A[:8]


BROKEN: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a generator that raises": (raising, OSError, "the disk is gone"),
    "a generator that ends at once": (lambda: iter([]), kqat.CalibrationError, "at least one samp"),
    "NaN in the second batch": (
        lambda: iter([9 * A[:32], A[:32] * np.nan]), kqat.CalibrationError, "input 'a'. Received",
    ),
    "infinity in one sample of the second batch": (
        lambda: iter([9 * A[:32], np.where(np.arange(32)[:, None] == 5, np.inf, A[:32])]),
        kqat.CalibrationError, r"in sample 37 \(counted from 0\)",
    ),
    "a dataset without an end": (
        lambda: tf.data.Dataset.from_tensor_slices(A).batch(8).repeat(),
        kqat.CalibrationError, "that end. Received: an endless .*take",
    ),
    "a PyDataset without an end": (Endless, kqat.CalibrationError, "an endless Endless"),
    "another shape in the second batch": (
        lambda: iter([9 * A[:32], A[:32, :3]]), kqat.CalibrationError, "of shape .* for input 'a'",
    ),
    "samples without a batch": (
        lambda: tf.data.Dataset.from_tensor_slices(A), kqat.CalibrationError, r"data.batch\(32\)",
    ),
    "a batch of batches": (lambda: A[None], kqat.CalibrationError, r"data.unbatch\(\)"),
    "a list of samples": (lambda: [*A], kqat.CalibrationError, r"np.stack\(data\); batches come"),
    "beyond float32": (lambda: A.astype(np.float64) * 1e300, kqat.CalibrationError, "infinity"),
    "values that overflow inside": (
        lambda: A * np.float32(1e36), kqat.CalibrationError, "values where '.*' rounds. Received",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "error", "message"), BROKEN.values(), ids=BROKEN)
def test_where_data_fail_no_range_has_changed(
    data: Callable[[], Any], error: type[Exception], message: str
) -> None:
    qat = uncalibrated(one_input())
    qat.get_layer("quant_dense").layer.kernel.assign(np.full((4, 6), 4.0))
    calibrate(qat, A)
    before = ranges(qat)
    with pytest.raises(error, match=message):
        calibrate(qat, data())
    assert ranges(qat) == before


def test_a_generator_that_may_never_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted by the user, who reads why: ranges stay as they were."""
    monkeypatch.setattr(calibration, "MANY_SAMPLES", 64)
    qat = uncalibrated(one_input())
    with pytest.raises(kqat.CalibrationWarning, match=r"64 samples of a generator .*islice"):
        calibrate(qat, (A[:32] for _ in itertools.count()))
    calibrate(qat, tuple(batches(A)))
    calibrate(qat, dataset(A))


def test_values_beyond_float16_are_refused_where_the_input_is_float16() -> None:
    a = keras.Input((4,), name="a", dtype="float16")
    qat = uncalibrated(keras.Model(a, layers.Dense(2, dtype="float32")(a)))
    with pytest.raises(kqat.CalibrationError, match=r"'a'.*infinity"):
        calibrate(qat, A * 1000)


def test_constant_tensors_have_a_range() -> None:
    for constant in (0.0, 3.0, -3.0):
        qat = uncalibrated(two_inputs())
        calibrate(qat, [np.full_like(B, constant), A])
        low, high = ranges(qat)["b"]
        assert low <= constant <= high
        assert np.isfinite(qat.predict([B, A], verbose=0)).all()


def noisy(*noise: Any) -> tuple[keras.Model, np.ndarray]:
    model = keras.Sequential(
        [keras.Input((12, 4)), layers.Dense(32, activation="relu"), *noise, layers.Flatten(),
         layers.Dense(16, activation="relu"), layers.Dense(3)]
    )  # fmt: skip
    return model, RNG.normal(size=(64, 12, 4)).astype(np.float32)


@pytest.mark.parametrize("size", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 32))])
@pytest.mark.parametrize(
    "noise",
    [layers.Dropout(0.5), layers.Dropout(0.8), layers.Dropout(0.99), layers.SpatialDropout1D(0.8),
     layers.GaussianNoise(1.0), layers.GaussianDropout(0.9)],
    ids=lambda layer: layer.name,
)  # fmt: skip
def test_training_without_learning_moves_no_range(noise: Any, size: int) -> None:
    """Neither small batches nor what noise layers do in training."""
    model, x = noisy(noise)
    qat = uncalibrated(model)
    calibrate(qat, x)
    before = ranges(qat)
    # Few steps cost less than a trace.
    qat.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=size > 1)
    qat.fit(x, np.zeros((64, 3)), batch_size=size, verbose=0)
    widths = {name: high - low for name, (low, high) in ranges(qat).items()}
    for name, (low, high) in before.items():
        # A quarter of a bit; most do not move at all.
        assert 0.999 < widths[name] / (high - low) < 1.19, name


def test_training_on_sorted_data_moves_no_range() -> None:
    model, x = noisy()
    x = x * 2.0 ** -np.arange(64, dtype=np.float32)[:, None, None]
    qat = uncalibrated(model)
    calibrate(qat, x)
    before = ranges(qat)
    qat.compile(keras.optimizers.SGD(0.0), "mse")
    qat.fit(x, np.zeros((64, 3)), batch_size=4, epochs=4, shuffle=False, verbose=0)
    assert ranges(qat) == before


def test_calibration_leaves_the_seeds_of_noise_alone() -> None:
    dropout = layers.Dropout(0.5, seed=7)
    model, x = noisy(dropout)
    qat = uncalibrated(model)
    seeds = [v.numpy().tolist() for v in qat.variables if "seed" in v.path]
    assert seeds
    calibrate(qat, x)
    assert [v.numpy().tolist() for v in qat.variables if "seed" in v.path] == seeds


def test_the_users_own_objects_stay_as_they_are() -> None:
    data = {"a": A.copy()}
    calibrate(uncalibrated(one_input()), data)
    np.testing.assert_array_equal(data["a"], A)


def test_auto_takes_what_serves_the_outputs() -> None:
    """A huge value that nobody reads is cut; where all values count, none is."""
    inputs = keras.Input((64,))
    hidden = layers.Dense(64, activation="relu", name="copy")(inputs)
    model = keras.Model(inputs, layers.Dense(8, name="read")(hidden))
    # The first channel is huge where its input is far out, and zero elsewhere.
    model.get_layer("copy").kernel.assign(np.diag([300.0] + [1.0] * 63))
    model.get_layer("copy").bias.assign([-1050.0] + [0.0] * 63)
    kernel = RNG.normal(size=(64, 8))
    kernel[0] = 0.0
    model.get_layer("read").kernel.assign(kernel)
    outlying = RNG.normal(size=(1024, 64)).astype(np.float32)
    outlying[:, 0] = np.minimum(outlying[:, 0], 3.0)
    outlying[100, 0] = 5.0
    qat = kqat.quantize_model(model, calibration_data=outlying)
    assert ranges(qat)["copy_relu"][1] < 10.0
    even = RNG.uniform(-1, 1, (256, 64)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=even)
    assert ranges(qat)["copy_relu"] == pytest.approx((0.0, 1.0), rel=1e-3)


def test_auto_does_not_depend_on_order() -> None:
    x = RNG.standard_t(3, (300, 4)).astype(np.float32)
    qat = uncalibrated(one_input())
    calibrate(qat, x)
    before = ranges(qat)
    calibrate(qat, (row[None] for row in RNG.permutation(x)))
    assert ranges(qat) == before


def cancelling() -> keras.Model:
    """Sums whose values cancel: what floats leave of them is 1e-7 of a step of their inputs."""
    x = keras.Input((12, 8), name="x")
    centered = layers.Subtract(name="centered")([x, ops.mean(x, axis=1, keepdims=True)])
    outputs = [
        layers.GlobalAveragePooling1D(name="pooled")(centered),
        layers.ReLU(name="clamped")(
            layers.Subtract(name="same")([ops.sigmoid(x), 1.0 - ops.sigmoid(-x)])
        ),
        layers.Rescaling(12.0, name="sum")(layers.GlobalAveragePooling1D()(centered)),
        layers.Multiply(name="square")([(alike := x - x * 1.0000001), alike]),
    ]
    return keras.Model(x, outputs, name="model")


@pytest.mark.parametrize("calibrated", [True, False])
def test_no_grid_is_finer_than_what_a_sum_resolves(calibrated: bool) -> None:
    x = np.random.default_rng(0).normal(size=(64, 12, 8)).astype(np.float32)
    qat = uncalibrated(cancelling())
    if calibrated:
        calibrate(qat, x)
    # Zero batches pull every range to zero.
    for batch in (x, *[np.zeros_like(x)] * 5):
        qat(batch, training=True)
    scale = {
        layer.name.removesuffix("_quantizer"): float(layer.scale())
        for layer in qat.layers
        if isinstance(layer, ActivationQuantizer)
    }
    assert scale["pooled"] >= scale["centered"] / 12 * 0.999
    assert scale["sum"] >= scale["centered"] / 16 * 0.999
    assert scale["clamped"] >= 1 / 256 / 16 * 0.999
    assert scale["square"] >= (scale["x"] / 16) ** 2 * 0.999
    clamped = qat.get_layer("clamped_quantizer")
    assert clamped.range()[0] == 0.0


def test_what_was_zero_beside_large_inputs_has_a_grid_that_kernels_compute() -> None:
    """A range that was not found is a guess, of a width of one: too narrow beside inputs of 1e4."""

    def ones() -> layers.Layer:
        return layers.Dense(4, kernel_initializer="ones")

    x = keras.Input((8,), name="x")
    outputs = [
        layers.Activation("hard_silu", name="dead")(x),
        ops.square(layers.Subtract()([ones()(x), ones()(x)])),
    ]
    data = np.float32(-1e4) * RNG.uniform(0.1, 1.0, (64, 8)).astype(np.float32)
    with pytest.warns(kqat.CalibrationWarning, match="zero in all samples"):
        qat = kqat.quantize_model(keras.Model(x, outputs, name="model"), calibration_data=data)
    scale = {name: float(qat.get_layer(f"{name}_quantizer").scale()) for name in ("x", "dead")}
    assert scale["dead"] == pytest.approx(scale["x"] / 64, rel=1e-5)
    report = tflite_export.verify(qat, tflite_export.convert(qat), data, samples=4)
    assert all(part.is_right and part.problem is None for part in report.runtimes)


def test_what_a_sum_resolves_is_known_after_loading(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(64, 12, 8)).astype(np.float32)
    qat = kqat.quantize_model(cancelling(), calibration_data=x)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    assert ranges(loaded) == ranges(qat)
    calibrate(loaded, x)
    assert ranges(loaded) == ranges(qat)


def test_files_of_before_anchors_load(tmp_path: Path) -> None:
    qat = uncalibrated(one_input())
    calibrate(qat, A)
    layer = next(la for la in qat.layers if isinstance(la, ActivationQuantizer))
    old = {"0": [-2.0], "1": [3.0], "2": [5.0]}
    layer.load_own_variables(old)
    assert layer.range() == (-2.0, 3.0)
    # Without an anchor the range is the plain average: one sixth of the way as the sixth batch.
    layer(np.full((1, 4), 9.0, np.float32), training=True)
    assert layer.range()[1] == pytest.approx(3.0 + (9.0 - 3.0) * 0.01 / (1 - 0.99**6), rel=1e-5)
    qat.save(tmp_path / "qat.keras")
    again = keras.models.load_model(tmp_path / "qat.keras")
    for ours, theirs in zip(qat.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_are_rounded_once_and_anew_for_the_next_calibration() -> None:
    """Though the data come in many batches, and three methods are tried on them."""
    qat = uncalibrated(one_input())
    wrapper = qat.get_layer("quant_dense")
    rounded = []
    fake_quantize = wrapper.weight_step.fake_quantize

    class Counting(type(wrapper.weight_step)):
        def fake_quantize(self, *args: Any) -> Any:
            rounded.append(args)
            return fake_quantize(*args)

    wrapper.weight_step = Counting()
    calibrate(qat, np.concatenate([A] * 8))
    assert len(rounded) == 1
    before = ranges(qat)
    wrapper.layer.kernel.assign(2.0 * wrapper.layer.kernel)
    calibrate(qat, np.concatenate([A] * 8))
    assert len(rounded) == 2 and ranges(qat) != before
    # Outside, each call rounds: weights may have been trained.
    wrapper.rounded("kernel")
    wrapper.rounded("kernel")
    assert len(rounded) == 4


def test_data_are_augmented_in_training_alone() -> None:
    """Keras's layers that augment do so by default, wherever one of them is called by itself."""
    x = RNG.uniform(size=(32, 2, 2, 1)).astype(np.float32)
    augmenting = layers.RandomBrightness(1.0, value_range=(0.0, 1.0), seed=0)
    rest = [layers.Flatten(), layers.Dense(2, "relu"), layers.Dense(2)]
    model = keras.Sequential([keras.Input((2, 2, 1)), augmenting, *rest])
    qat = kqat.quantize_model(model, calibration_data=x)
    wanted = np.asarray(model(x, training=False))
    noise = np.abs(np.asarray(qat(x, training=False)) - wanted).mean()
    assert noise < 0.02 * np.abs(wanted).mean()
    assert np.abs(np.asarray(qat(x, training=True)) - wanted).mean() > 10 * noise


def test_columns_are_looked_up_in_tables_of_their_own() -> None:
    """An index is held against the tables that read it, not those that read its neighbours."""
    columns = keras.Input((2,), dtype="int32", name="columns")
    rows = [
        layers.Embedding(size, 3, name=name)(columns[:, i])
        for i, (size, name) in enumerate([(4, "users"), (9, "films")])
    ]
    model = keras.Model(columns, layers.Multiply()(rows))
    data = np.stack([np.arange(32) % 4, np.arange(32) % 9], axis=1).astype(np.int32)
    kqat.quantize_model(model, calibration_data=data)
    with pytest.raises(kqat.CalibrationError, match=r"from 0 to 3 for 'users', .* Received: 4"):
        kqat.quantize_model(model, calibration_data=data[:, ::-1])


def test_only_what_leads_to_a_table_is_computed_to_check_its_rows() -> None:
    """A mask of whole numbers does not: for 200 steps it was a tenth of calibration."""
    ids = keras.Input((4,), dtype="int32")
    rows = layers.Embedding(8, 3)(ops.add(ids, 1))
    shown = ops.cast(ops.not_equal(ids, 0), "float32")
    graph = trace(keras.Model(ids, rows * ops.expand_dims(shown, -1)))

    def computed(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was computed")

    nodes = [
        dataclasses.replace(n, layer=computed) if n.outputs[0].dtype == "bool" else n
        for n in graph.nodes
    ]
    assert [n.layer for n in nodes].count(computed) == 1
    graph = dataclasses.replace(graph, nodes=tuple(nodes))
    calibration.as_tensors([np.full((2, 4), 6, np.int32)], graph)
    with pytest.raises(kqat.CalibrationError, match=r"8 rows\. Received: 8, computed"):
        calibration.as_tensors([np.full((2, 4), 7, np.int32)], graph)
