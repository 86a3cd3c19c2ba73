"""The histogram is that of all values, whatever their order and portions, to the bit."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kqat.grids.histogram import BINS, Histogram

FLOAT = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
PORTIONS = st.lists(st.lists(FLOAT, min_size=1, max_size=6), min_size=1, max_size=6)


def of(*portions: np.ndarray) -> Histogram:
    seen = Histogram()
    for x in portions:
        seen.add(x, float(x.min()), float(x.max()))
    return seen


def state(seen: Histogram) -> tuple[object, ...]:
    return (
        seen.low, seen.high, seen.zeros, seen.exponent, seen.first, seen.counts.tolist()
    )  # fmt: skip


def spread(size: int) -> np.ndarray:
    """Values over many magnitudes, zeros and both extremes among them."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=size) * 10.0 ** draw.uniform(-4, 3, size)
    return np.where(draw.random(size) < 0.1, 0.0, x).astype(np.float32)


@given(PORTIONS)
@example([[34351349760.0], [-1.1754943508222875e-38]])  # a product of them is zero in float32
def test_order_and_portions_do_not_matter(portions: list[list[float]]) -> None:
    arrays = [np.float32(x) for x in portions]
    together = np.concatenate(arrays)
    assert state(of(*arrays)) == state(of(*arrays[::-1])) == state(of(together))


def test_many_values_in_any_order() -> None:
    x = spread(20_000)
    shuffled = np.random.default_rng(1).permutation(x)
    assert state(of(*np.split(np.sort(x), 40))) == state(of(shuffled))


def test_merged_is_the_whole() -> None:
    x = spread(5000)
    merged = of(x[::2])
    merged.merge(of(x[1::2] / 64))
    assert state(merged) == state(of(np.concatenate([x[::2], x[1::2] / 64])))


@given(PORTIONS)
def test_every_value_is_counted_once_and_inside_its_bin(portions: list[list[float]]) -> None:
    x = np.concatenate([np.float32(p) for p in portions])
    seen = of(*(np.float32(p) for p in portions))
    assert seen.total == x.size
    assert seen.zeros == np.count_nonzero(x == 0)
    assert (seen.low, seen.high) == (min(0, x.min()), max(0, x.max()))
    assert len(seen.counts) <= BINS + 1
    some = np.flatnonzero(seen.counts) + seen.first
    width = 2.0**seen.exponent
    if some.size:
        kept = x[x != 0]
        assert some[0] * width <= kept.min() < (some[0] + 1) * width
        assert some[-1] * width <= kept.max() < (some[-1] + 1) * width


@pytest.mark.parametrize("upper", [True, False])
def test_tails_are_the_sums_beyond_a_bound(upper: bool) -> None:
    x = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    tail, side = of(x).tail(upper), x if upper else -x
    bounds = np.array([0.5, 1.0, 2.0, 3.0])
    want = [np.sum(np.maximum(side.astype(np.float64) - b, 0) ** 2) for b in bounds]
    # Values are taken for the middle of bins of 2**-9.
    np.testing.assert_allclose(tail.squares_beyond(bounds), want, rtol=2e-2)
    count = [np.count_nonzero(side > b) for b in bounds]
    np.testing.assert_allclose(tail.count_beyond(bounds), count, rtol=5e-2)
    assert tail.bound_of(500.0) == pytest.approx(np.sort(side)[-500], rel=1e-2)


def test_nothing_but_zero() -> None:
    seen = of(np.zeros(7, np.float32))
    assert seen.is_zero()
    assert (seen.low, seen.high, seen.zeros, seen.total) == (0.0, 0.0, 7, 7)
    assert seen.tail(True).squares_beyond(np.zeros(1)) == 0.0
