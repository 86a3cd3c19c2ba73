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

from kqat.base.errors import SpecError
from kqat.grids import arithmetic
from kqat.grids.methods import (
    RANGE_METHODS,
    RangeMethod,
    range_method_from_dict,
    range_method_to_dict,
)
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.last_value import LastValue
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import MovingAverage

# One method or more for every row of the table.
METHODS = (MinMax(), MovingAverage(), MovingAverage(0.5), LastValue(), Fixed(-1.0, 6.0))
OBSERVING = tuple(method for method in METHODS if not isinstance(method, Fixed))
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
    with pytest.raises(SpecError, match=r"Expected one of \['fixed'.* as range method. Received"):
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
