"""The layers that quantize: observing, rounding, gradients, saving.

Outputs equal `kqat.grids.arithmetic`, which equals the NumPy reference, bit for bit.
"""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from kqat.base.errors import FreezeError
from kqat.grids import arithmetic
from kqat.grids.methods import RangeMethod
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.learned_range import LearnedRange
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import MovingAverage
from kqat.grids.spec import QuantSpec
from kqat.parts.markers import PrecisionBoundary
from kqat.training.activation_quantizer import ActivationQuantizer, SiteRange

INT8 = QuantSpec()
CLAMPS = (None, "relu", "relu6")


def quantizer(method: RangeMethod | None = None, **options: Any) -> ActivationQuantizer:
    return ActivationQuantizer(INT8, method or MinMax(), **options)


def normal(*shape: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(0).normal(scale=scale, size=shape).astype(np.float32)


def rounded(x: Any, low: float, high: float, spec: QuantSpec = INT8) -> np.ndarray:
    bounds = tf.constant(low, tf.float32), tf.constant(high, tf.float32)
    return arithmetic.fake_quantize(tf.constant(x, tf.float32), *bounds, spec).numpy()


def gradient(call: Any, x: np.ndarray) -> np.ndarray:
    """Of `call(x)` with an upstream that differs for every element."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(x)
    upstream = np.arange(1, np.size(x) + 1, dtype=np.float32).reshape(x.shape)
    return tape.gradient(y, x, upstream).numpy()


def clamp_layer(clamp: str | None) -> Any:
    return keras.layers.Activation(clamp or "linear")


@pytest.mark.parametrize("clamp", CLAMPS)
def test_unseen_quantizer_lets_values_pass_but_for_the_clamp(clamp: str | None) -> None:
    layer, x = quantizer(clamp=clamp), normal(50, scale=9.0)
    np.testing.assert_array_equal(layer(x), clamp_layer(clamp)(x))
    np.testing.assert_array_equal(gradient(layer, x), gradient(clamp_layer(clamp), x))
    assert not layer.is_calibrated()


def test_unseen_quantizer_has_no_range() -> None:
    layer = quantizer(name="act")
    layer.build((None, 4))
    with pytest.raises(FreezeError, match=r"quantizer 'act', which has seen none\. Give calibr"):
        layer.range()


def test_training_observes_and_rounds_to_what_it_observed() -> None:
    layer, x = quantizer(), normal(50)
    np.testing.assert_array_equal(layer(x, training=True), rounded(x, x.min(), x.max()))
    assert layer.range() == (x.min(), x.max())
    assert layer.is_calibrated()
    np.testing.assert_array_equal(layer(9 * x), rounded(9 * x, x.min(), x.max()))


def test_each_batch_moves_the_range_by_the_method() -> None:
    layer, batches = quantizer(MovingAverage(0.5)), normal(6, 20)
    # Arrays, as NumPy before 2 computes with numbers in float64.
    low = high = np.zeros(1, np.float32)
    for count, x in enumerate(batches):
        layer(x, training=True)
        seen = [np.array([end], np.float32) for end in (min(x.min(), 0), max(x.max(), 0))]
        low, high = MovingAverage(0.5).update(low, high, np.full(1, count, np.float32), *seen)
        assert layer.range() == (float(low[0]), float(high[0]))
    assert float(layer.count[0]) == 6


@pytest.mark.filterwarnings("error:__array__ implementation")
def test_asking_for_ranges_warns_of_nothing() -> None:
    """NumPy warns where it is asked to copy a Keras variable."""
    layer = quantizer()
    layer(normal(64), training=True)
    assert layer.range()[0] < 0.0 < layer.range()[1]
    assert layer.widths() is None


def test_range_always_holds_zero() -> None:
    positive, negative = quantizer(), quantizer()
    positive(np.float32([2, 3]), training=True)
    negative(np.float32([-3, -2]), training=True)
    assert positive.range() == (0, 3)
    assert negative.range() == (-3, 0)
    # Already the batch's range does, so that a batch above zero pulls no average up to it.
    average = quantizer(MovingAverage(0.5))
    average(np.float32([2, 3]), training=True)
    average(np.float32([-3, 3]), training=True)
    assert average.range() == (np.float32(-2), 3)


def test_constant_zero_is_seen_and_stays_zero() -> None:
    layer = quantizer()
    np.testing.assert_array_equal(layer(np.zeros(5, np.float32), training=True), np.zeros(5))
    assert layer.is_calibrated()
    assert layer.range() == (0, 1)


def test_frozen_quantizer_rounds_and_does_not_move() -> None:
    layer, x = quantizer(), normal(50)
    layer(x, training=True)
    layer.trainable = False
    np.testing.assert_array_equal(layer(9 * x, training=True), rounded(9 * x, x.min(), x.max()))
    assert layer.range() == (x.min(), x.max())
    layer.trainable = True
    layer(9 * x, training=True)
    assert layer.range() == ((9 * x).min(), (9 * x).max())


@pytest.mark.parametrize("options", [{"training": False}, {"training": True, "observe": False}])
def test_inference_and_unobserved_sites_move_nothing(options: dict[str, bool]) -> None:
    layer, x = quantizer(), normal(50)
    layer(x, training=True)
    np.testing.assert_array_equal(layer(9 * x, **options), rounded(9 * x, x.min(), x.max()))
    assert layer.range() == (x.min(), x.max())


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", [MinMax(), MovingAverage()], ids=str)
def test_one_exploding_batch_does_not_poison_the_range(
    method: RangeMethod, value: float, clamp: str | None
) -> None:
    layer, x = quantizer(method, clamp=clamp), normal(64)
    layer(x, training=True)
    before = layer.range()
    broken = x.copy()
    broken[[3, 40]] = value
    layer(broken, training=True)
    # A clamp makes some infinities harmless: the batch counts then, cut by the clamp.
    cut = {(None, -np.inf): None, ("relu6", np.inf): 6.0, ("relu", -np.inf): x.max(),
           ("relu6", -np.inf): min(x.max(), 6.0)}.get((clamp, value))  # fmt: skip
    if cut is None:
        assert layer.range() == before
    else:
        assert before[1] <= layer.range()[1] <= cut
    assert np.isfinite(layer.range()).all()
    layer(x, training=True)
    assert np.isfinite(layer(x)).all()


def test_observe_shapes_the_range_as_training_does() -> None:
    trained, observed, x = quantizer(), quantizer(), normal(50)
    trained(x, training=True)
    observed.build(x.shape)
    observed.observe(x)
    assert observed.range() == trained.range()


def test_sites_share_the_union_of_their_ranges() -> None:
    layer = quantizer(MovingAverage(0.5), sites=3)
    first, second = np.float32([-1, 0.5]), np.float32([-0.25, 4])
    layer(first, site=0, training=True)
    y = layer(second, site=2, training=True)
    np.testing.assert_array_equal(y, rounded(second, -1, 4))
    assert layer.range() == (-1, 4)
    np.testing.assert_array_equal(layer.count, [1, 0, 1])
    np.testing.assert_array_equal(layer(first, site=1), rounded(first, -1, 4))


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "sites",
    [((-1.0, 2.0),), ((0.25, 3.0), (-0.1, 0.7)), ((0.0, 0.0),), ((-4e38, 1e38), (0.0, 3.3e38))],
    ids=str,
)
def test_the_union_of_numbers_is_that_of_tensors(
    sites: tuple[tuple[float, float], ...], symmetric: bool, clamp: str | None
) -> None:
    """Bounds near the largest float32, ranges off zero, and a value that is always zero."""
    spec = QuantSpec(bits=16, symmetric=True) if symmetric else QuantSpec(bits=8)
    layer = ActivationQuantizer(spec, MovingAverage(), sites=len(sites), clamp=clamp)
    lows, highs = np.clip(np.float64(sites), -3.4e38, 3.4e38).astype(np.float32).T
    np.testing.assert_array_equal(
        np.float32(layer.union_of(lows, highs)), np.float32(layer.union(lows, highs))
    )


@pytest.mark.parametrize("clamp", ["relu", "relu6"])
@pytest.mark.parametrize("high", [2.0, 0.0])
def test_a_range_below_zero_does_not_undo_the_clamp(clamp: str, high: float) -> None:
    """Calibration of a recurrence once left such ranges, and saved models have them."""
    layer, x = quantizer(clamp=clamp), normal(50, scale=0.2)
    layer(x)
    layer.start({0: SiteRange(-3.0, high, -3.0, high, (0.0, 0.0), 1)})
    top = high or arithmetic.UNSEEN_WIDTH
    assert layer.range() == pytest.approx((0.0, top))
    for training in (True, False):
        found = layer(x, training=training, observe=False)
        np.testing.assert_array_equal(found, rounded(np.maximum(x, 0.0), 0.0, top))


@pytest.mark.parametrize("clamp", ["relu", "relu6"])
@pytest.mark.parametrize("scale", [0.5, 5.0])
def test_merged_clamp_is_clamp_then_rounding(clamp: str, scale: float) -> None:
    """Gradient included, but where `x` is exactly 0 or 6: there Keras's clamps pass none."""
    x = normal(400, scale=scale)
    merged, after = quantizer(clamp=clamp), quantizer()
    separate = keras.Sequential([clamp_layer(clamp), after])
    np.testing.assert_array_equal(merged(x, training=True), separate(x, training=True))
    assert merged.range() == after.range()
    for training in (True, False):
        np.testing.assert_array_equal(
            gradient(lambda x, t=training: merged(x, training=t), x),
            gradient(lambda x, t=training: separate(x, training=t), x),
        )


@pytest.mark.parametrize("clamp", CLAMPS)
def test_fixed_range_is_never_observed(clamp: str | None) -> None:
    layer, x = quantizer(Fixed(-1.0, 3.0), clamp=clamp), normal(50, scale=5.0)
    expected = rounded(clamp_layer(clamp)(x), -1.0, 3.0)
    np.testing.assert_array_equal(layer(x, training=True), expected)
    layer.observe(x)
    np.testing.assert_array_equal(layer(x), expected)
    assert layer.range() == (-1.0, 3.0)
    assert layer.is_calibrated()
    assert layer.weights == []


@pytest.mark.parametrize("method", [MinMax(), Fixed(-1.0, 3.0)], ids=str)
def test_gradient_is_one_inside_and_zero_outside(method: RangeMethod) -> None:
    layer, x = quantizer(method), np.linspace(-3, 5, 101, dtype=np.float32)
    if isinstance(method, MinMax):
        layer(np.float32([-1, 3]), training=True)
    low, high = rounded([-9, 9], -1, 3)
    expected = np.where((x >= low) & (x <= high), np.arange(1, 102), 0)
    np.testing.assert_array_equal(gradient(layer, x), expected)


@pytest.mark.parametrize("method", [MovingAverage(0.9), Fixed(-1.0, 6.0)], ids=str)
def test_config_comes_back(method: RangeMethod) -> None:
    layer = quantizer(method, clamp="relu6", sites=2, name="q")
    config = layer.get_config()
    copy = ActivationQuantizer.from_config(config.copy())
    assert copy.get_config() == config
    assert (copy.spec, copy.range_method, copy.clamp, copy.sites, copy.name) == (
        INT8, method, "relu6", 2, "q",
    )  # fmt: skip


def test_a_learned_range_is_the_trained_one_however_it_was_frozen() -> None:
    layer, later = quantizer(LearnedRange()), np.array([3.0, 2.0])
    layer(normal(50), training=True)
    start = layer.range()
    layer.moved.assign([1.0, -1.0])
    trained, weights = layer.range(), layer.get_weights()
    assert trained != start
    layer.trainable = False
    assert layer.range() == trained
    layer.trainable = True
    layer.freeze()
    layer.moved.assign(later)
    assert layer.range() == trained
    # Weights of an epoch before, as EarlyStopping restores them: nothing had been kept.
    layer.set_weights(weights)
    layer.moved.assign(later)
    frozen = layer.range()
    layer.frozen = False
    assert frozen == layer.range() != trained


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_kept_and_the_range_is_float32(dtype: str) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    layer, x = quantizer(), tf.cast(normal(64), dtype)
    for training in (True, False):
        y = layer(x, training=training)
        assert y.dtype == dtype
        exact = tf.cast(x, tf.float32)
        expected = tf.cast(rounded(exact, *layer.range()), dtype)
        np.testing.assert_array_equal(tf.cast(y, tf.float32), tf.cast(expected, tf.float32))
    assert layer.site_low.dtype == "float32"


def test_graph_does_what_eager_code_does() -> None:
    eager, graph = quantizer(MovingAverage(0.9)), quantizer(MovingAverage(0.9))
    graph.build((None,))
    step = tf.function(lambda x, training: graph(x, training=training))
    for x in normal(5, 40):
        np.testing.assert_array_equal(step(x, True), eager(x, training=True))
        np.testing.assert_array_equal(step(x, False), eager(x))
    assert graph.range() == eager.range()


def model() -> keras.Model:
    inputs = keras.Input((4,), name="x")
    x = quantizer(name="x_quantizer")(inputs)
    x = keras.layers.Dense(3, name="dense")(x)
    x = quantizer(clamp="relu", sites=2, name="dense_quantizer")(x, site=1)
    return keras.Model(inputs, PrecisionBoundary(name="boundary")(x))


def test_fit_moves_the_range_and_the_weights_before_it() -> None:
    network, x = model(), normal(32, 4)
    kernel = network.get_layer("dense").kernel.numpy()
    network.compile("sgd", "mse")
    network.fit(x, normal(32, 3), batch_size=16, epochs=2, shuffle=False, verbose=0)
    layer = network.get_layer("x_quantizer")
    assert layer.range() == (x.min(), x.max())
    np.testing.assert_array_equal(layer.count, [4])
    np.testing.assert_array_equal(network.get_layer("dense_quantizer").count, [0, 4])
    assert np.all(network.get_layer("dense").kernel.numpy() != kernel)


def test_saved_model_loads_without_custom_objects(tmp_path: Path) -> None:
    network, x = model(), normal(32, 4)
    network(x, training=True)
    network.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), network(x))
    for name in ("x_quantizer", "dense_quantizer"):
        assert loaded.get_layer(name).range() == network.get_layer(name).range()
    loaded(9 * x, training=True)
    assert loaded.get_layer("x_quantizer").range() == ((9 * x).min(), (9 * x).max())


def test_boundary_computes_nothing() -> None:
    x = normal(3, 4)
    np.testing.assert_array_equal(PrecisionBoundary()(x), x)
    assert PrecisionBoundary().compute_output_shape((None, 4)) == (None, 4)
    assert quantizer().compute_output_shape((None, 4)) == (None, 4)


@pytest.mark.parametrize(
    "layer",
    [
        ActivationQuantizer(QuantSpec(), MovingAverage()),
        ActivationQuantizer(QuantSpec(bits=16, symmetric=True), MovingAverage(), sites=2),
        ActivationQuantizer(QuantSpec(), Fixed(0.0, 0.1)),
        ActivationQuantizer(QuantSpec(bits=4), LearnedRange()),
    ],
)
def test_the_scale_as_a_number_is_the_scale(layer: ActivationQuantizer) -> None:
    layer.build((None, 3))
    if not isinstance(layer.range_method, Fixed):
        assert layer.scale_now() == 0.0
    found = SiteRange(-0.3, 0.7, -0.4, 0.9, (0.0, 0.0), 3)
    layer.start(dict.fromkeys(range(layer.sites), found))
    assert np.asarray(layer.scale(), np.float32) == layer.scale_now()
