"""Range methods: what one batch, many batches and the user make of a range."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kqat.base.errors import CalibrationError, SpecError
from kqat.grids import arithmetic
from kqat.grids.histogram import Histogram
from kqat.grids.methods import (
    CALIBRATION_METHODS,
    RANGE_METHODS,
    RangeMethod,
    calibration_method,
    range_method_from_dict,
    range_method_to_dict,
)
from kqat.grids.ranges.entropy import Entropy
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.last_value import LastValue
from kqat.grids.ranges.learned_clip import LearnedClip
from kqat.grids.ranges.learned_range import LearnedRange
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import Anchor, MovingAverage
from kqat.grids.ranges.mse import MSE
from kqat.grids.ranges.percentile import Percentile
from kqat.grids.spec import INT8_ACTIVATION, INT16_ACTIVATION, QuantSpec
from kqat.grids.trained_threshold import TrainedThreshold

# One method or more for every row of the table.
CALIBRATING = (MinMax(), Percentile(), Percentile(99.0), MSE(), Entropy())
LEARNED = (LearnedRange(), LearnedClip(), LearnedClip(0.0), TrainedThreshold())
OBSERVED = (MovingAverage(), MovingAverage(0.5), LastValue())
METHODS = (*CALIBRATING, *OBSERVED, Fixed(-1.0, 6.0), *LEARNED)
OBSERVING = (MinMax(), MovingAverage(), MovingAverage(0.5), LastValue())
DECAYS = (1e-12, 0.5, 0.9, 0.99, 0.999, 0.9999999)
# TensorFlow flushes subnormal floats to zero.
FLOAT = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def run(method: Any, batches: list[tuple[float, float]]) -> tuple[float, float]:
    """The range after all batches, starting as a quantizer does: from zeros."""
    low, high = tf.zeros(()), tf.zeros(())
    for count, (batch_low, batch_high) in enumerate(batches):
        low, high = method.update(
            low, high, tf.constant(float(count)), tf.constant(batch_low), tf.constant(batch_high)
        )
    return float(low), float(high)


def test_every_row_of_the_table_is_tested() -> None:
    assert {type(method) for method in METHODS} == set(RANGE_METHODS.values())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_dict_comes_back_through_json(method: RangeMethod) -> None:
    config = json.loads(json.dumps(range_method_to_dict(method)))
    assert config["name"] in RANGE_METHODS
    assert range_method_from_dict(config) == method


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods_are_values(method: RangeMethod) -> None:
    assert method == dataclasses.replace(method)
    assert hash(method) == hash(dataclasses.replace(method))


@pytest.mark.parametrize("config", [{"name": "median"}, {"decay": 0.9}, {"name": None}], ids=str)
def test_unknown_names_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"Expected one of \['entropy'.* as range method. Received"):
        range_method_from_dict(config)


def test_reading_leaves_the_dict_alone() -> None:
    config = {"name": "moving_average", "decay": 0.9}
    range_method_from_dict(config)
    assert config == {"name": "moving_average", "decay": 0.9}


def test_foreign_methods_are_not_written() -> None:
    with pytest.raises(SpecError, match=r"Expected one of .* Received: 'minmax'"):
        range_method_to_dict("minmax")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", OBSERVING, ids=str)
@given(low=FLOAT, high=FLOAT)
def test_first_batch_is_taken_whole(method: Any, low: float, high: float) -> None:
    assert run(method, [(min(low, 0.0), max(high, 0.0))]) == (min(low, 0.0), max(high, 0.0))


@given(st.lists(st.tuples(FLOAT, FLOAT), min_size=1, max_size=8))
def test_minmax_keeps_the_extremes(batches: list[tuple[float, float]]) -> None:
    lows, highs = zip(*batches, strict=True)
    assert run(MinMax(), batches) == (min(0.0, *lows), max(0.0, *highs))


@given(st.lists(st.tuples(FLOAT, FLOAT), min_size=1, max_size=8))
def test_last_value_keeps_the_last(batches: list[tuple[float, float]]) -> None:
    assert run(LastValue(), batches) == batches[-1]


@pytest.mark.parametrize("decay", DECAYS)
def test_moving_average_is_adams(decay: float) -> None:
    """m_t == ema_t / (1 - d**t), Kingma & Ba 2015, section 3, in float64."""
    values = np.random.default_rng(0).uniform(-5.0, 5.0, (200, 2)).astype(np.float32)
    average = np.zeros(2)
    mean = tf.zeros(()), tf.zeros(())
    for count, batch in enumerate(values):
        mean = MovingAverage(decay).update(*mean, tf.constant(float(count)), *batch)
        average = decay * average + (1.0 - decay) * batch
        expected = average / -math.expm1((count + 1) * math.log(decay))
        # A step rounds four times (weight, difference, product, sum) values up to 10, and hands
        # the error on undiminished at worst.
        bound = 4 * (count + 1) * 10.0 * 2.0**-24
        np.testing.assert_allclose(np.array(mean), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("decay", DECAYS)
def test_moving_average_of_a_constant_is_the_constant(decay: float) -> None:
    assert run(MovingAverage(decay), [(-1.1, 3.3)] * 50) == (np.float32(-1.1), np.float32(3.3))


@pytest.mark.parametrize("decay", DECAYS)
def test_moving_average_after_years_weighs_by_the_decay(decay: float) -> None:
    """(1 - d) / (1 - d**t) at t = 2**24, where float32 stops counting."""
    low, _ = MovingAverage(decay).update(
        tf.zeros(()), tf.zeros(()), tf.constant(2.0**24), tf.ones(()), tf.ones(())
    )
    expected = (1.0 - decay) / -math.expm1(2.0**24 * math.log(decay))
    # 2**24 roundings of log(d) times t are one: the weight is off by some units in its last place.
    np.testing.assert_allclose(float(low), expected, rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_decay_lies_inside_zero_and_one(decay: float) -> None:
    with pytest.raises(SpecError, match=r"Expected a decay inside \(0, 1\). Received: decay="):
        MovingAverage(decay)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (-math.inf, 1.0, r"Expected a finite range. Received: \[-inf, 1.0\]"),
        (0.0, math.nan, r"Expected a finite range. Received: \[0.0, nan\]"),
        (0.5, 1.0, r"Expected low <= 0 <= high .* Received: \[0.5, 1.0\]"),
        (-1.0, -0.5, r"Expected low <= 0 <= high .* Received: \[-1.0, -0.5\]"),
        (1.0, -1.0, r"Expected low <= 0 <= high .* Received: \[1.0, -1.0\]"),
        (0.0, 0.0, r"Expected .* low < high, so that zero is exact. Received: \[0.0, 0.0\]"),
        (0.0, 1e-40, r"Expected a range of 7.9e-31 at least, .* Received: \[0.0, 1e-40\]"),
        (0.0, 1e39, r"inside ±8.5e\+37. Received: \[0.0, 1e\+39\]"),
        (-1e38, 0.0, r"inside ±8.5e\+37. Received: \[-1e\+38, 0.0\]"),
    ],
)
def test_fixed_ranges_that_are_no_ranges_are_refused(low: float, high: float, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Fixed(low, high)


@given(
    low=st.floats(-arithmetic.LARGEST_BOUND, 0.0, width=32),
    high=st.floats(arithmetic.SMALLEST_RANGE, arithmetic.LARGEST_BOUND, width=32),
)
def test_fixed_ranges_need_no_widening(low: float, high: float) -> None:
    fixed = Fixed(np.float32(low), np.float32(high))
    assert json.loads(json.dumps(range_method_to_dict(fixed))) == {
        "name": "fixed", "low": low, "high": high,
    }  # fmt: skip
    widened = arithmetic.widen(tf.constant(fixed.low), tf.constant(fixed.high))
    assert tuple(float(bound) for bound in widened) == (low, high)


SYMMETRIC = QuantSpec(symmetric=True)
SPECS = (INT8_ACTIVATION, SYMMETRIC, INT16_ACTIVATION)
DRAW = np.random.default_rng(0)
DISTRIBUTIONS = {
    "normal": DRAW.normal(size=20_000),
    "heavy tails": DRAW.standard_t(3, 20_000),
    "after ReLU": np.maximum(DRAW.normal(size=20_000), 0.0),
    "below zero": -DRAW.exponential(size=20_000),
    "one outlier": np.append(DRAW.normal(size=20_000), 500.0),
    "even": DRAW.uniform(-1.0, 3.0, 20_000),
    "zero": np.zeros(100),
    "tiny": 1e-20 * DRAW.normal(size=20_000),
    "huge": 1e20 * DRAW.normal(size=20_000),
}


def seen_of(x: np.ndarray) -> Histogram:
    seen = Histogram()
    x = x.astype(np.float32)
    seen.add(x, float(x.min()), float(x.max()))
    return seen


def error(x: np.ndarray, low: float, high: float, spec: QuantSpec) -> float:
    """Mean squared error on the grid over a range, by the arithmetic that ships."""
    bounds = arithmetic.widen(tf.constant(low, tf.float32), tf.constant(high, tf.float32))
    if spec.symmetric:
        bounds = arithmetic.symmetrize(*bounds, spec)
    got = arithmetic.fake_quantize(tf.constant(x, tf.float32), *bounds, spec)
    return float(np.mean((np.float64(x) - np.float64(got)) ** 2))


@pytest.mark.parametrize("x", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("spec", SPECS, ids=["int8", "symmetric", "int16"])
@pytest.mark.parametrize("method", CALIBRATING, ids=str)
def test_calibrated_ranges_hold_zero_and_go_no_further_than_the_data(
    method: Any, spec: QuantSpec, x: np.ndarray
) -> None:
    low, high = method.calibrated(seen_of(x), spec)
    x = x.astype(np.float32)
    assert min(x.min(), 0.0) <= low <= 0.0 <= high <= max(x.max(), 0.0)


@pytest.mark.parametrize("name", sorted(set(DISTRIBUTIONS) - {"zero", "tiny", "huge"}))
@pytest.mark.parametrize("spec", SPECS, ids=["int8", "symmetric", "int16"])
def test_mse_is_the_least_error_that_any_cut_gives(spec: QuantSpec, name: str) -> None:
    x = DISTRIBUTIONS[name]
    found = error(x, *MSE().calibrated(seen_of(x), spec), spec)
    cuts = np.linspace(1.0, 0.02, 25)
    tried = [
        error(x, min(x.min(), 0.0) * a, max(x.max(), 0.0) * b, spec) for a in cuts for b in cuts
    ]
    # The search takes the error of rounding for step**2 / 12, which is more than it is where a step
    # is as wide as the bulk of the values ("one outlier"); a tenth is half a decibel.
    assert found <= 1.1 * min(tried)


def test_mse_leaves_an_outlier_out_and_even_values_in() -> None:
    low, high = MSE().calibrated(seen_of(DISTRIBUTIONS["even"]), INT8_ACTIVATION)
    assert (low, high) == pytest.approx((-1.0, 3.0), rel=1e-2)
    x = np.append(np.tile(DISTRIBUTIONS["normal"], 200), 30.0)
    assert MSE().calibrated(seen_of(x), INT8_ACTIVATION)[1] < 10.0


def test_percentile_is_numpys() -> None:
    x = DISTRIBUTIONS["normal"]
    low, high = Percentile(98.0).calibrated(seen_of(x), INT8_ACTIVATION)
    assert (low, high) == pytest.approx(tuple(np.percentile(x, [1.0, 99.0])), rel=1e-2)
    assert Percentile(100.0).calibrated(seen_of(x), INT8_ACTIVATION) == MinMax().calibrated(
        seen_of(x), INT8_ACTIVATION
    )


def test_entropy_leaves_far_outliers_out() -> None:
    x = np.append(DISTRIBUTIONS["normal"], [40.0, -40.0])
    low, high = Entropy().calibrated(seen_of(x), INT8_ACTIVATION)
    assert high < 10.0
    assert low > -10.0


@pytest.mark.parametrize("percent", [50.0, 100.1, -1.0, math.nan])
def test_percent_lies_above_a_half(percent: float) -> None:
    with pytest.raises(SpecError, match=r"Expected a percentile inside \(50, 100\]. Received"):
        Percentile(percent)


def test_methods_have_names() -> None:
    assert {name: type(calibration_method(name)) for name in CALIBRATION_METHODS} == {
        "minmax": MinMax, "percentile": Percentile, "mse": MSE, "entropy": Entropy,
    }  # fmt: skip
    assert calibration_method(Percentile(99.0)) == Percentile(99.0)


@pytest.mark.parametrize("method", ["median", MovingAverage(), None, Fixed(0.0, 1.0)], ids=str)
def test_other_calibration_methods_are_refused(method: Any) -> None:
    with pytest.raises(CalibrationError, match=r"or one of .* as calibration method"):
        calibration_method(method)


def moved(
    batches: Any,
    *,
    noise: tuple[float, float] = (0.0, 0.0),
    calibrated: tuple[float, float] = (0.5, 1.5),
) -> np.ndarray:
    """The range after batches, calibrated to [-0.5, 1.5] where [-1, 2] was seen."""
    rows = Anchor.rows(calibrated, (1.0, 2.0), noise)
    anchor = tf.constant(np.float32(rows)[:, :, None])
    extremes, bounds = tf.constant([[1.0], [2.0]]), tf.zeros((2, 1))
    step = tf.function(lambda *now: Anchor.moved(MovingAverage(), anchor, *now))
    for count, batch in enumerate(batches, start=100):
        extremes, bounds = step(extremes, tf.constant([float(count)]), tf.constant(batch)[:, None])
    return bounds.numpy()[:, 0]


@pytest.mark.parametrize("batch", [(1.0, 2.0), (0.3, 0.6), (1.15, 2.15)], ids=str)
def test_batches_near_what_was_seen_move_nothing(batch: tuple[float, float]) -> None:
    np.testing.assert_array_equal(moved([batch] * 200), [0.5, 1.5])


@pytest.mark.slow
def test_quiet_batches_narrow_a_range_late_and_slowly() -> None:
    np.testing.assert_array_equal(moved([(0.0, 0.0)] * 1000), [0.5, 1.5])
    assert np.all(moved([(0.0, 0.0)] * 3000) < [0.25, 0.75])
    # As soon as they are loud again, the range is what it was.
    loud = [(0.0, 0.0)] * 1500 + [(1.0, 2.0)] * 100
    np.testing.assert_array_equal(moved(loud), [0.5, 1.5])


def test_a_range_follows_values_that_outgrow_it() -> None:
    found = moved([(10.0, 20.0)] * 200)
    # What was seen and a sixteenth of the width more is what 0.5 and 1.5 stand for.
    np.testing.assert_allclose(found, [0.5 + 10.0 - 1.1875, 1.5 + 20.0 - 2.1875], rtol=1e-3)


@pytest.mark.parametrize("batch", [(1.4, 2.4), (10.0, 20.0)], ids=str)
def test_a_range_that_clips_nothing_goes_on_to_clip_nothing(batch: tuple[float, float]) -> None:
    found = moved([batch] * 200, calibrated=(1.0, 2.0))
    np.testing.assert_allclose(found, batch, rtol=1e-3)


def test_the_largest_of_many_batches_decide() -> None:
    """Small batches have small extremes; the data have the largest of them."""
    found = moved([(2.0, 3.0), *[(0.5, 1.0)] * 4] * 100, calibrated=(1.0, 2.0))
    assert np.all(found > 0.9 * np.array([2.0, 3.0]))


def test_one_huge_batch_widens_by_a_few_percent() -> None:
    assert np.all(moved([(1e30, 1e30)]) <= [0.5 + 0.16, 1.5 + 0.16])


@pytest.mark.parametrize("batch", [(10.0, 20.0), (1.0, 2.0), (3.0, 6.0)], ids=str)
def test_what_dropout_adds_moves_nothing(batch: tuple[float, float]) -> None:
    """Nor do batches that are smaller than those of calibration."""
    found = moved([batch] * 500, noise=(9.0, 18.0), calibrated=(1.0, 2.0))
    np.testing.assert_array_equal(found, [1.0, 2.0])


def test_what_outgrows_dropout_widens() -> None:
    found = moved([(12.0, 24.0)] * 300, noise=(9.0, 18.0), calibrated=(1.0, 2.0))
    np.testing.assert_allclose(found, [3.0, 6.0], rtol=1e-2)


def test_the_anchor_of_an_older_file_means_the_same() -> None:
    new = np.float32(Anchor.rows((0.5, 1.5), (1.0, 2.0), (9.0, 18.0)))[:, :, None]
    old = new.copy()
    old[Anchor.ADDED] = 0.1
    np.testing.assert_allclose(Anchor.of_older(old), new, rtol=1e-5)
    np.testing.assert_array_equal(Anchor.of_older(new), new)
    unset = np.zeros((Anchor.ROWS, 2, 1), np.float32) + np.float32(Anchor.UNSET)[:, None, None]
    older = unset.copy()
    older[Anchor.ADDED] = 1.0
    np.testing.assert_array_equal(Anchor.of_older(older), unset)


def test_a_side_that_only_noise_reaches_stays_empty() -> None:
    rows = Anchor.rows((0.0, 2.0), (0.0, 2.0), (1.0, 0.5))
    anchor = tf.constant(np.float32(rows)[:, :, None])
    shown = Anchor.without_noise(anchor, tf.constant([[0.9], [2.5]]))
    np.testing.assert_array_equal(shown, [[0.0], [2.0]])
