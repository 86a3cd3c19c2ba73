"""Ways to find the step of a weight, against NumPy: values, gradients, folding, saving."""

import json
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kqat
from kqat.base.errors import PolicyError, SpecError
from kqat.grids.methods import STEP_METHODS, StepMethod, step_method_from_dict, step_method_to_dict
from kqat.grids.spec import QuantSpec
from kqat.grids.weight_steps.binary import Binary
from kqat.grids.weight_steps.learned_method import LearnedMethod
from kqat.grids.weight_steps.learned_step import LearnedStep
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.max_abs import MaxAbs
from kqat.grids.weight_steps.ternary import Ternary
from tests.kqat import reference
from tests.kqat.step_cases import CASES, MEAN_ERROR, METHODS, grid, normal

# Shape of a weight and the axes that keep a scale of their own.
SHAPES = (((3, 3, 4, 5), (-1,)), ((3, 3, 4, 1), (-2, -1)), ((7, 5), ()), ((6,), (0,)))
WEIGHTS = hnp.arrays(
    np.float32, (9, 3), elements=st.floats(-4.0, 4.0, width=32, allow_subnormal=False)
)


def found(method: Any, weight: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    """The scale, and the integers that it makes of the weight."""
    step = np.asarray(method.step(tf.constant(weight), spec))
    rounded = np.asarray(method.fake_quantize(tf.constant(weight), step, spec))
    if isinstance(method, LearnedMethod):
        step = np.asarray(method.grid_scale(step, spec))
    integers = np.rint(rounded / step)
    np.testing.assert_array_equal(rounded, integers.astype(np.float32) * step)
    return step, integers


def test_every_row_of_the_table_is_tested() -> None:
    assert {name: type(method) for name, (method, _) in METHODS.items()} == STEP_METHODS


@pytest.mark.parametrize(
    "method", [*(m for m, _ in METHODS.values()), LeastSquares(7), LearnedStep()], ids=str
)
def test_dict_comes_back_through_json(method: StepMethod) -> None:
    assert step_method_from_dict(json.loads(json.dumps(step_method_to_dict(method)))) == method
    hash(method)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(SpecError, match=r"Expected one of \['binary'.* as step method. Received"):
        step_method_from_dict({"name": "minmax"})
    with pytest.raises(PolicyError, match=r"Expected weight_step to be one of .* Received: 4"):
        kqat.QuantizeConfig(weight_step=4)
    with pytest.raises(PolicyError, match=r"weight_step: .* Received: 'lsk'. Did you mean 'lsq'"):
        kqat.QuantizeConfig(weight_step="lsk")
    with pytest.raises(PolicyError, match=r"Received: 'xnor'. Did you mean 'binary'"):
        kqat.QuantizeConfig(weight_step="xnor")
    for candidates in (0, 2.0, True):
        with pytest.raises(SpecError, match=r"Expected a number of candidates .* Received"):
            LeastSquares(candidates)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_widths_that_are_none_for_the_method_are_refused(name: str) -> None:
    method, widths = METHODS[name]
    allowed = {1} if name == "binary" else {2} if name == "ternary" else set(range(2, 9))
    assert set(widths) <= allowed
    for bits in set(range(1, 9)) - allowed:
        with pytest.raises(SpecError, match=f"Expected a grid of .* Received: bits={bits}. Use"):
            kqat.QuantizeConfig(weights=grid(bits), weight_step=method)


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_max_abs_is_the_reference(shape: tuple[int, ...], axes: tuple[int, ...], bits: int) -> None:
    weight = normal(shape)
    step, integers = found(MaxAbs(), weight, grid(bits, axes))
    np.testing.assert_array_equal(step, reference.weight_scale(weight, axes, bits))
    np.testing.assert_array_equal(integers, reference.quantize_weight(weight, step, bits))


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_starts_and_rounds_as_the_reference(
    shape: tuple[int, ...], axes: tuple[int, ...], bits: int
) -> None:
    weight = normal(shape)
    step, integers = found(LearnedStep(start="mean"), weight, grid(bits, axes))
    expected = reference.learned_start(weight, axes, bits)
    np.testing.assert_allclose(step, expected, rtol=MEAN_ERROR)
    np.testing.assert_array_equal(integers, reference.quantize_weight(weight, step, bits))


def test_lsq_starts_at_the_least_squared_error() -> None:
    weight, spec = normal((9, 3)), grid(3)
    start, best = (m.step(tf.constant(weight), spec) for m in (LearnedStep(), LeastSquares()))
    np.testing.assert_array_equal(start, best)
    with pytest.raises(SpecError, match=r"Expected start 'mse' or 'mean'. Received: start='max'"):
        LearnedStep(start="max")  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_lsq_gradients_are_the_papers(
    shape: tuple[int, ...], axes: tuple[int, ...], bits: int, sign: int
) -> None:
    weight, upstream, method, spec = (
        normal(shape),
        normal(shape, 1),
        LearnedStep(),
        grid(bits, axes),
    )
    variable = sign * reference.learned_start(weight, axes, bits).astype(np.float32)
    w, s = tf.Variable(weight), tf.Variable(variable)
    with tf.GradientTape() as tape:
        rounded = method.fake_quantize(w + 0.0, method.scale(s + 0.0, spec), spec)
    got = tape.gradient(rounded, [w, s], upstream)
    expected = reference.learned_gradients(weight, np.abs(variable), axes, bits, upstream)
    # w: multiplied by the step and divided by it. s: a sum of up to 180 terms, near qmax at most,
    # of which each is rounded some four times.
    np.testing.assert_allclose(got[0], expected[0], rtol=2.0**-22)
    bound = 4 * MEAN_ERROR * (2 ** (bits - 1)) * np.abs(upstream).max()
    np.testing.assert_allclose(got[1], sign * expected[1], rtol=0, atol=bound)
    assert np.all(expected[1] != 0)
    np.testing.assert_array_equal(
        rounded, reference.fake_quantize_weight(weight, np.abs(variable), bits)
    )


@tf.function
def least_squares_step(weight: Any, bits: int) -> Any:
    """Compiled: the loop over the candidates is slow in eager code."""
    return LeastSquares().step(weight, grid(bits))


@hypothesis.settings(max_examples=30)
@given(weight=WEIGHTS, bits=st.sampled_from([2, 3, 4, 8]))
def test_mse_step_loses_no_more_than_any_other(weight: np.ndarray, bits: int) -> None:
    step = least_squares_step(tf.constant(weight), bits).numpy()
    largest = reference.weight_scale(weight, (-1,), bits)
    lost = reference.squared_error(weight, step, (-1,), bits)
    # Float32 sums of nine squares, in units of the largest step.
    slack = 32 * 2.0**-24 * largest.astype(np.float64) ** 2 * 9
    for fraction in np.arange(1, 41) / 40:
        other = largest * np.float32(fraction)
        assert np.all(lost <= reference.squared_error(weight, other, (-1,), bits) + slack)


def test_mse_gains_where_one_weight_sticks_out() -> None:
    weight = np.append(normal((500,)), np.float32(12.0))
    spec = grid(4, ())
    steps = [np.asarray(m.step(tf.constant(weight), spec)) for m in (MaxAbs(), LeastSquares())]
    worst, least = (float(reference.squared_error(weight, s, (), 4)[0]) for s in steps)
    dense = [
        float(reference.squared_error(weight, np.float32([s]), (), 4)[0])
        for s in np.linspace(0.05, 1.0, 2000) * steps[0]
    ]
    # Between the candidates, a fortieth apart, the error is smooth up to single roundings.
    assert least < 1.02 * min(dense)
    assert least < 0.8 * worst


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize(
    ("method", "oracle", "bits"),
    [(Ternary(), reference.ternary, 2), (Binary(), reference.binary, 1)],
    ids=["ternary", "binary"],
)
def test_ternary_and_binary_are_the_papers(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    method: Any,
    oracle: Callable[..., Any],
    bits: int,
) -> None:
    weight = normal(shape)
    weight.flat[0] = 0.0
    step, integers = found(method, weight, grid(bits, axes))
    expected_step, expected = oracle(weight, axes)
    np.testing.assert_allclose(step, expected_step, rtol=MEAN_ERROR)
    np.testing.assert_array_equal(integers, expected)
    assert set(np.unique(integers)) <= ({-1, 0, 1} if bits == 2 else {-1, 1})


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("lsq", "tqt", "ttq")])
def test_other_gradients_are_straight_through(name: str) -> None:
    method, widths = METHODS[name]
    spec, upstream = grid(widths[0]), normal((7, 5), 1)
    w = tf.Variable(normal((7, 5)))
    with tf.GradientTape() as tape:
        rounded = method.fake_quantize(w + 0.0, tf.stop_gradient(method.step(w, spec)), spec)
    np.testing.assert_array_equal(tape.gradient(rounded, w, upstream), upstream)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_nothing_but_zero_stays_zero(name: str, bits: int) -> None:
    weight = normal((7, 3))
    weight[:, 1] = 0.0
    step, integers = found(METHODS[name][0], weight, grid(bits))
    assert np.all(np.isfinite(step)) and np.all(step > 0)
    # One bit has no zero; what stands there is 2**-100.
    assert np.all(np.abs(integers * step)[:, 1] <= (2.0**-100 if bits == 1 else 0.0))
    assert np.any(integers[:, 0] != 0)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_factor_per_channel_changes_no_integer(name: str, bits: int) -> None:
    """What makes folding exact; powers of two bring no rounding of their own."""
    weight = normal((3, 3, 4, 6))
    factor = np.float32([0.25, 0.5, 1.0, 2.0, -4.0, -0.125])
    method, spec = METHODS[name][0], grid(bits)
    step, integers = found(method, weight, spec)
    folded_step, folded = found(method, weight * factor, spec)
    np.testing.assert_array_equal(folded, integers * np.sign(factor))
    np.testing.assert_array_equal(folded_step, step * np.abs(factor))
