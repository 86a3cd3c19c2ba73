"""Numerics against the NumPy reference, bit for bit: no test here has a tolerance but where said.

`fused` is TensorFlow's kernel, `spelled` the same formula in `keras.ops`, as other backends use it.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kqat.grids import arithmetic
from kqat.grids.spec import QuantSpec
from tests.kqat import reference

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
GRIDS = [QuantSpec(bits=b, narrow_range=n) for b in BITS for n in (False, True)]
WEIGHT_GRIDS = [QuantSpec(bits=b, symmetric=True, narrow_range=True) for b in BITS]
VECTOR = tf.TensorSpec([None], tf.float32)
SCALAR = tf.TensorSpec([], tf.float32)
FORMS = {"fused": arithmetic.fake_quantize, "spelled": arithmetic._fake_quantize_ops}

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Sizes below, at and above what a vector register holds, with tails.
SIZES = st.sampled_from([1, 3, 8, 17, 1001])


@functools.cache
def compiled(form: str, spec: QuantSpec, jit: bool = False) -> Callable[..., Any]:
    """`(x, low, high, upstream) -> output and its gradients` as one graph."""

    def run(x: Any, low: Any, high: Any, upstream: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((x, low, high))
            y = FORMS[form](x, low, high, spec)
        return y, tape.gradient(y, (x, low, high), upstream)

    return tf.function(run, input_signature=[VECTOR, SCALAR, SCALAR, VECTOR], jit_compile=jit)


def of(spec: QuantSpec) -> tuple[int, bool]:
    """A grid as the reference takes it."""
    return spec.bits, spec.narrow_range


def bits(x: Any) -> np.ndarray:
    """The float32 bits of `x`: -0.0 differs from 0.0, and NaN equals itself."""
    return np.asarray(x, np.float32).view(np.uint32)


def assert_same(got: Any, expected: Any) -> None:
    np.testing.assert_array_equal(bits(got), bits(expected))


@st.composite
def ranges(draw: st.DrawFn) -> tuple[np.float32, np.float32]:
    """Any range of finite float32, widened, and common ones."""
    common = st.floats(-10.0, 10.0, width=32)
    low, high = draw(st.tuples(FINITE, FINITE) | st.tuples(common, common))
    return reference.widen(low, high)


@st.composite
def samples(draw: st.DrawFn, low: np.float32, high: np.float32, spec: QuantSpec) -> np.ndarray:
    """What can go wrong on the grid over `[low, high]`: ties, neighbours, bounds, anything."""
    seed, size = draw(st.integers(0, 2**32 - 1)), draw(SIZES)
    rng = np.random.default_rng(seed)
    scale, zero_point = reference.nudge(low, high, *of(spec))
    steps = rng.integers(spec.qmin - 2, spec.qmax + 3, size) - zero_point
    near = (steps + rng.choice([0.0, 0.5], size)).astype(np.float32) * scale
    toward = rng.choice(np.float32([-np.inf, 0.0, np.inf]), size)
    near = np.where(toward == 0.0, near, np.nextafter(near, toward))
    inside = rng.uniform(1.2 * np.float64(low), 1.2 * np.float64(high), size).astype(np.float32)
    special = np.float32([0.0, -0.0, low, high, np.inf, -np.inf, 1e-40, 3e38])
    drawn = np.float32(draw(st.lists(FINITE, max_size=5)))
    return np.concatenate([near, inside, special, drawn])


def tensors(*arrays: Any) -> tuple[Any, ...]:
    return tuple(tf.constant(a, tf.float32) for a in arrays)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", GRIDS, ids=str)
@settings(max_examples=25)
@given(data=st.data(), range_=ranges())
def test_fake_quantize_is_the_reference(
    spec: QuantSpec, form: str, data: st.DataObject, range_: tuple[np.float32, np.float32]
) -> None:
    x = data.draw(samples(*range_, spec))
    expected = reference.fake_quantize(x, *range_, *of(spec))
    upstream = np.random.default_rng(x.size).integers(-8, 9, x.size).astype(np.float32)
    assert_same(FORMS[form](*tensors(x, *range_), spec), expected)
    y, (dx, dlow, dhigh) = compiled(form, spec)(*tensors(x, *range_, upstream))
    assert_same(y, expected)
    inside = reference.passes_gradient(x, *range_, *of(spec))
    np.testing.assert_array_equal(dx, np.where(inside, upstream, 0.0))
    # What is cut lies on one side of zero; sums of small integers are exact in float32.
    assert dlow == upstream[~inside & (x < 0)].sum()
    assert dhigh == upstream[~inside & (x > 0)].sum()


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(bits=16)], ids=str)
def test_large_tensors_take_the_same_road(spec: QuantSpec) -> None:
    """Enough elements for every vectorized loop and both threads of the kernel."""
    rng = np.random.default_rng(0)
    low, high = np.float32(-1.7), np.float32(2.9)
    scale, _ = reference.nudge(low, high, *of(spec))
    ties = (rng.integers(spec.qmin, spec.qmax, 300_001) + 0.5).astype(np.float32) * scale
    x = np.concatenate([rng.uniform(-3, 4, 300_002).astype(np.float32), ties])
    expected = reference.fake_quantize(x, low, high, *of(spec))
    for form in FORMS:
        assert_same(compiled(form, spec)(*tensors(x, low, high, x))[0], expected)


@pytest.mark.parametrize("spec", [QuantSpec(bits=4, narrow_range=True), QuantSpec()], ids=str)
@settings(max_examples=30)
@given(data=st.data(), range_=ranges())
def test_spelled_form_survives_xla(
    spec: QuantSpec, data: st.DataObject, range_: tuple[np.float32, np.float32]
) -> None:
    """As JAX compiles it. (XLA replaces the fused kernel by a formula of its own.)"""
    x = data.draw(samples(*range_, spec))[:16]
    y = compiled("spelled", spec, jit=True)(*tensors(x, *range_, x))[0]
    assert_same(y, reference.fake_quantize(x, *range_, *of(spec)))


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_nan(form: str) -> None:
    x = np.float32([np.nan, 0.5] * 20)
    y, (dx, _, _) = compiled(form, QuantSpec())(*tensors(x, -1.0, 1.0, np.ones_like(x)))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_array_equal(dx, [0.0, 1.0] * 20)


@example(low=0.0, high=0.0)
@example(low=-3e38, high=3e38)
@example(low=-1e-40, high=1e-35)
@given(low=FINITE, high=FINITE)
def test_widen_is_the_reference_and_makes_every_range_usable(low: float, high: float) -> None:
    widened = [np.float32(bound) for bound in arithmetic.widen(*tensors(low, high))]
    # As numbers, not as bits: the least of 0.0 and -0.0 is either, and does not matter.
    assert tuple(widened) == reference.widen(low, high)
    scale, _ = arithmetic.nudge(*widened, QuantSpec(bits=16))
    assert widened[0] <= 0.0 <= widened[1]
    assert np.finfo(np.float32).tiny < scale < np.inf


@pytest.mark.parametrize("bounds", [(np.nan, 1.0), (-1.0, np.nan), (np.nan, 0.0)])
def test_widen_hides_no_nan(bounds: tuple[float, float]) -> None:
    assert np.isnan(np.float32(arithmetic.widen(*tensors(*bounds)))).any()


def test_widen_leaves_usable_ranges_alone() -> None:
    assert_same(arithmetic.widen(*tensors(-0.25, 3.5)), [-0.25, 3.5])
    assert_same(arithmetic.widen(*tensors(0.5, 3.5)), [0.0, 3.5])
    assert_same(arithmetic.widen(*tensors(-2.0, -0.5)), [-2.0, 0.0])


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@settings(max_examples=50)
@given(range_=ranges())
def test_symmetric_ranges_have_their_zero_at_integer_zero(
    spec: QuantSpec, range_: tuple[np.float32, np.float32]
) -> None:
    low, high = (np.float32(b) for b in arithmetic.symmetrize(*tensors(*range_), spec))
    assert arithmetic.nudge(low, high, spec)[1] == 0
    # The least range that holds the given one, to two float32 roundings of its bounds.
    slack = 2 * 2.0**-23
    wanted = max(range_[1] / spec.qmax, range_[0] / spec.qmin)
    assert abs(low / spec.qmin / wanted - 1) <= slack
    assert abs(high / spec.qmax / wanted - 1) <= slack


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_a_constant_zero_stays_zero(spec: QuantSpec, form: str) -> None:
    low, high = arithmetic.widen(*tensors(0.0, 0.0))
    assert_same(FORMS[form](tf.zeros(5), low, high, spec), np.zeros(5))


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@settings(max_examples=50)
@given(range_=ranges())
def test_nudge_is_the_reference(spec: QuantSpec, range_: tuple[np.float32, np.float32]) -> None:
    scale, zero_point = arithmetic.nudge(*range_, spec)
    expected_scale, expected_zero_point = reference.nudge(*range_, *of(spec))
    assert scale.dtype == np.float32
    assert zero_point.dtype == np.int32
    assert_same(scale, expected_scale)
    assert zero_point == expected_zero_point


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@settings(max_examples=8)
@given(range_=ranges())
def test_nudge_gives_what_the_kernel_uses(
    spec: QuantSpec, range_: tuple[np.float32, np.float32]
) -> None:
    """Counts the kernel's output levels on a sweep four times as dense as the grid."""
    span = np.float64(range_[1]) - np.float64(range_[0])
    sweep = np.linspace(range_[0] - 0.1 * span, range_[1] + 0.1 * span, 6 * 2**spec.bits)
    x = np.append(sweep, 0.0).astype(np.float32)
    levels = np.unique(arithmetic.fake_quantize(*tensors(x, *range_), spec).numpy())
    scale, zero_point = arithmetic.nudge(*range_, spec)
    assert (levels < 0).sum() == zero_point - spec.qmin
    assert (levels > 0).sum() == spec.qmax - zero_point
    assert_same(np.abs(levels[levels != 0]).min(), scale)


@pytest.mark.parametrize("narrow_range", [False, True])
def test_nudge_rounds_the_number_below_one_half_down(narrow_range: bool) -> None:
    """`0.49999997 + 0.5` is 1 in float32; the kernel's `std::round` does not add."""
    spec = QuantSpec(narrow_range=narrow_range)
    half = np.nextafter(np.float32(0.5), np.float32(0))
    high = np.float32(spec.qmax - spec.qmin) - np.float32(0.5)
    scale, zero_point = arithmetic.nudge(-half, high, spec)
    assert scale == 1
    assert zero_point == spec.qmin + int(narrow_range)  # 1 + 0.49999997 is 1.5 in float32.
    x = np.float32([-np.inf, np.inf])
    y = arithmetic.fake_quantize(*tensors(x, -half, high), spec).numpy()
    assert_same(y, np.float32([spec.qmin - zero_point, spec.qmax - zero_point]) * scale)


def test_nudge_takes_arrays() -> None:
    low, high = np.float32([-1.0, 0.0, -3.0]), np.float32([1.0, 2.0, 0.0])
    scales, zero_points = arithmetic.nudge(low, high, QuantSpec())
    for index in range(3):
        scale, zero_point = reference.nudge(low[index], high[index], 8, False)
        assert_same(scales[index], scale)
        assert zero_points[index] == zero_point


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@settings(max_examples=25)
@given(data=st.data(), range_=ranges())
def test_properties_of_the_grid(
    spec: QuantSpec, data: st.DataObject, range_: tuple[np.float32, np.float32]
) -> None:
    x = np.sort(data.draw(samples(*range_, spec)))
    y = arithmetic.fake_quantize(*tensors(x, *range_), spec).numpy()
    scale, zero_point = arithmetic.nudge(*range_, spec)
    q = np.rint(y / np.float64(scale)).astype(int) + zero_point
    assert_same((q - zero_point).astype(np.float32) * scale, y)
    assert q.min() >= spec.qmin
    assert q.max() <= spec.qmax
    assert_same(y[x == 0.0], np.zeros(np.sum(x == 0.0)))
    assert np.all(np.diff(y) >= 0)
    assert_same(arithmetic.fake_quantize(*tensors(y, *range_), spec), y)
    inside = reference.passes_gradient(x, *range_, *of(spec))
    error_steps = np.abs(y[inside].astype(np.float64) - x[inside]) / np.float64(scale)
    # Half a step, and six float32 roundings (the nudged bound, the shift, the quotient, two sums,
    # the output) of values up to `qmax - qmin` steps: 1e-4 steps for 8 bits.
    assert np.all(error_steps <= 0.5 + 6 * (spec.qmax - spec.qmin) * 2.0**-24)


def weights(rank: int) -> st.SearchStrategy[np.ndarray]:
    """Any weights but the very largest, or common ones among which whole channels are zero.

    The largest float32 may round up to infinity on its grid: `qmax * scale` is an ulp above it.
    """
    largest = float(np.float32(np.finfo(np.float32).max * (1 - 2.0**-20)))
    shapes = hnp.array_shapes(min_dims=rank, max_dims=rank, max_side=4)
    common = st.floats(-4.0, 4.0, width=32) | st.just(0.0)
    return hnp.arrays(
        np.float32, shapes, elements=st.floats(-largest, largest, width=32)
    ) | hnp.arrays(np.float32, shapes, elements=common, fill=st.just(np.float32(0)))


def axes_for(rank: int) -> list[tuple[int, ...] | None]:
    axes: list[tuple[int, ...] | None] = [None, (-1,), (0,)]
    return [*axes, (-2,), (-2, -1)] if rank > 1 else axes


@pytest.mark.parametrize(
    ("rank", "axes"), [(rank, axes) for rank in range(1, 6) for axes in axes_for(rank)]
)
@settings(max_examples=25)
@given(data=st.data(), spec=st.sampled_from(WEIGHT_GRIDS))
def test_weights_are_the_reference(
    rank: int, axes: tuple[int, ...] | None, data: st.DataObject, spec: QuantSpec
) -> None:
    spec = QuantSpec(bits=spec.bits, symmetric=True, narrow_range=True, axis=axes)
    weight = data.draw(weights(rank))
    expected_scale = reference.weight_scale(weight, axes or (), spec.bits)
    expected = reference.fake_quantize_weight(weight, expected_scale, spec.bits)
    variable = tf.constant(weight)
    with tf.GradientTape() as tape:
        tape.watch(variable)
        scale = keras.ops.stop_gradient(arithmetic.weight_scale(variable, spec))
        rounded = arithmetic.fake_quantize_weight(variable, scale, spec)
    upstream = np.arange(1, weight.size + 1, dtype=np.float32).reshape(weight.shape)
    assert_same(scale, expected_scale)
    assert_same(rounded, expected)
    assert_same(tape.gradient(rounded, variable, upstream), upstream)
    assert_channels_are_full(weight, scale.numpy(), rounded.numpy(), spec)


def assert_channels_are_full(
    weight: np.ndarray, scale: np.ndarray, rounded: np.ndarray, spec: QuantSpec
) -> None:
    """The largest weight of a channel is `qmax` steps; a channel of nothing is zero at scale 1."""
    q = np.rint(rounded / np.float64(scale)).astype(int)
    np.testing.assert_array_equal(q, reference.quantize_weight(weight, scale, spec.bits))
    assert_same(q.astype(np.float32) * scale, rounded)
    reduced = tuple(np.flatnonzero(np.array(scale.shape) == 1))
    largest = np.abs(weight).max(axis=reduced, keepdims=True)
    nothing = largest * np.float32(1 / spec.qmax) < np.float32(2.0**-100)
    steps = np.abs(q).max(axis=reduced, keepdims=True)
    np.testing.assert_array_equal(steps, np.where(nothing, 0, spec.qmax))
    assert np.all(scale[nothing] == 1.0)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("spec", WEIGHT_GRIDS, ids=str)
def test_graphs_round_weights_as_eager_code_does(spec: QuantSpec, jit: bool) -> None:
    """Training runs in a graph, freezing does not: one ulp of scale is another integer."""
    spec = QuantSpec(bits=spec.bits, symmetric=True, narrow_range=True, axis=-1)

    def run(weight: Any) -> Any:
        scale = arithmetic.weight_scale(weight, spec)
        return scale, arithmetic.fake_quantize_weight(weight, scale, spec)

    weight = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)
    expected_scale = reference.weight_scale(weight, (-1,), spec.bits)
    scale, rounded = tf.function(run, jit_compile=jit)(tf.constant(weight))
    assert_same(scale, expected_scale)
    assert_same(rounded, reference.fake_quantize_weight(weight, expected_scale, spec.bits))


def test_weights_round_half_away_from_zero() -> None:
    spec = QuantSpec(symmetric=True, narrow_range=True)
    weight = tf.constant([-2.5, -1.5, -0.5, -0.25, 0.25, 0.5, 1.5, 2.5])
    rounded = arithmetic.fake_quantize_weight(weight, tf.constant(1.0), spec)
    assert_same(rounded, [-3.0, -2.0, -1.0, 0.0, 0.0, 1.0, 2.0, 3.0])


def test_weights_beyond_the_grid_saturate() -> None:
    spec = QuantSpec(bits=4, symmetric=True, narrow_range=True)
    weight = tf.constant([-9.0, 9.0, 1e9])
    assert_same(arithmetic.fake_quantize_weight(weight, tf.constant(0.5), spec), [-3.5, 3.5, 3.5])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_weights_show_in_the_scale(value: float) -> None:
    weight = np.ones((40, 3), np.float32)
    weight[7, 1] = value
    spec = QuantSpec(symmetric=True, narrow_range=True, axis=-1)
    scale = arithmetic.weight_scale(tf.constant(weight), spec).numpy()
    np.testing.assert_array_equal(np.isfinite(scale), [[True, False, True]])


@pytest.mark.parametrize("unseen", [1.0, 20.0])
def test_a_range_of_numbers_is_widened_as_one_of_tensors(
    unseen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The width of a range that nothing was seen for is one number, for all of them."""
    monkeypatch.setattr(arithmetic, "UNSEEN_WIDTH", unseen)
    assert_same(arithmetic.widen(*tensors(0.0, 0.0)), [0.0, unseen])
    generator = np.random.default_rng(0)
    sizes = np.float32(10.0) ** generator.uniform(-6, 4, (400, 3)).astype(np.float32)
    sizes[:100, 0], sizes[50:150, 1] = 0.0, 0.0
    for low, high, width in sizes.tolist():
        want = tuple(float(x) for x in arithmetic.no_narrower(-low, high, width))
        assert arithmetic.no_narrower_number(-low, high, width) == want
        empty = low == high == 0.0 and width <= unseen
        assert empty or want[1] - want[0] == pytest.approx(max(width, high + low), rel=1e-5)
        assert not empty or want == (0.0, 0.0)
