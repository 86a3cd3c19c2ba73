"""TQT against a reading of its equations in NumPy, and powers of two in all other methods."""

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import kqat
from kqat.base.errors import PolicyError, SpecError
from kqat.grids import arithmetic
from kqat.grids.ranges.learned_method import RangeForm
from kqat.grids.spec import QuantSpec
from kqat.grids.trained_threshold import TrainedThreshold
from tests.kqat.step_cases import METHODS, grid, normal


def papers(
    x: np.ndarray, logarithm: float, upstream: np.ndarray, n: int, p: int, bits: int
) -> tuple[np.ndarray, float, np.ndarray]:
    """Jain et al. 2020, equations 7 and 8, in float64: output, d/d log2(t), d/dx."""
    s = 2.0 ** math.ceil(logarithm) / 2.0**bits
    q = np.sign(x) * np.floor(np.abs(np.float64(x)) / s + 0.5)
    slope = np.where(q < n, n, np.where(q > p, p, q - x / s))
    passes = (q >= n) & (q <= p)
    return (
        np.clip(q, n, p) * s,
        float(np.sum(upstream * s * math.log(2) * slope)),
        upstream * passes,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("logarithm", [-3.3, -0.75, 0.0, 0.2, 1.0])
def test_weights_are_the_papers(bits: int, logarithm: float) -> None:
    weight, upstream, spec = normal((9, 5)), normal((9, 5), 1), grid(bits, ())
    w, variable = tf.Variable(weight), tf.Variable(np.full((1, 1), logarithm, np.float32))
    method = TrainedThreshold()
    with tf.GradientTape() as tape:
        rounded = method.fake_quantize(w + 0.0, method.scale(variable + 0.0, spec), spec)
    got = tape.gradient(rounded, [w, variable], upstream)
    p = 2 ** (bits - 1) - 1
    value, slope, passed = papers(weight, logarithm, upstream, -p, p, bits - 1)
    np.testing.assert_array_equal(rounded, value.astype(np.float32))
    np.testing.assert_allclose(got[0], passed, rtol=2.0**-22)
    np.testing.assert_allclose(got[1].numpy().item(), slope, rtol=1e-4)
    assert 0 < np.count_nonzero(passed) and slope != 0


@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("logarithm", [-0.5, 1.0])
def test_activations_are_the_papers(clamped: bool, logarithm: float) -> None:
    """Behind a ReLU the grid starts at zero and has a bit more, as the paper's unsigned one."""
    x, upstream = normal((200,)) * 3, normal((200,), 1)
    x = np.abs(x) if clamped else x
    quantizer = kqat.ActivationQuantizer(
        QuantSpec(), TrainedThreshold(), clamp="relu" if clamped else None
    )
    quantizer.build((None, 200))
    quantizer.site_low.assign([0.0 if clamped else -1.0])
    quantizer.site_high.assign([1.0])
    quantizer.count.assign([1.0])
    quantizer.moved.assign([logarithm])
    v = tf.Variable(x)
    with tf.GradientTape() as tape:
        rounded = quantizer(v + 0.0, training=True)
    got = tape.gradient(rounded, [v, quantizer.moved.value], upstream)
    n, p, bits = (0, 255, 8) if clamped else (-128, 127, 7)
    value, _, _ = papers(x, logarithm, upstream, n, p, bits)
    np.testing.assert_array_equal(rounded, value.astype(np.float32))
    # Values within half a step beyond the bounds count as clipped here.
    s = 2.0 ** math.ceil(logarithm) / 2.0**bits
    inside = (x >= n * s) & (x <= p * s)
    slope = np.where(inside, value / s - x / s, np.clip(x / s, n, p))
    np.testing.assert_allclose(got[0], upstream * inside)
    expected = np.sum(upstream * s * math.log(2) * slope)
    np.testing.assert_allclose(got[1].numpy().item(), expected, rtol=1e-3)
    scale, zero_point = arithmetic.nudge(*quantizer.range(), quantizer.spec)
    assert (float(scale), int(zero_point)) == (s, -128 if clamped else 0)


def test_a_frozen_range_ignores_what_an_optimizer_still_moves() -> None:
    quantizer = kqat.ActivationQuantizer(QuantSpec(), TrainedThreshold())
    quantizer.build((None, 3))
    quantizer(tf.constant([[-1.0, 0.5, 3.9]]), training=True)
    quantizer.moved.assign([1.0])
    before = quantizer.range()
    assert before[1] == 127 * 8 / 128
    quantizer.freeze()
    quantizer.moved.assign([5.0])
    assert quantizer.range() == before


@pytest.mark.parametrize("start", ["mse", "3sd", "max"])
def test_starts(start: Any) -> None:
    weight, spec = normal((50, 3)), grid(4)
    found = np.asarray(TrainedThreshold(start).initial(tf.constant(weight), spec))
    if start == "max":
        np.testing.assert_allclose(found, np.log2(np.abs(weight).max(0, keepdims=True)), rtol=1e-5)
    elif start == "3sd":
        np.testing.assert_allclose(found, np.log2(3 * weight.std(0, keepdims=True)), rtol=1e-5)
    else:
        step = np.asarray(TrainedThreshold().scale(tf.constant(found), spec))
        powers = 2.0 ** np.arange(-8, 4, dtype=np.float32)
        lost = [np.sum((weight - np.clip(np.rint(weight / s), -7, 7) * s) ** 2, 0) for s in powers]
        np.testing.assert_array_equal(step[0], powers[np.argmin(lost, 0)])


@pytest.mark.parametrize("name", [n for n in METHODS if n != "tqt"])
def test_other_steps_are_powers_of_two_where_asked(name: str) -> None:
    method, widths = METHODS[name]
    spec = QuantSpec(
        bits=widths[0], symmetric=True, narrow_range=widths[0] > 1, axis=(-1,), power_of_two=True
    )
    weight = normal((9, 5)) * np.float32([1e-9, 0.01, 1.0, 300.0, 1e9])
    step = method.step(tf.constant(weight), spec)
    scale = np.asarray(getattr(method, "grid_scale", lambda s, _: s)(step, spec))
    mantissa, _ = np.frexp(scale)
    np.testing.assert_array_equal(mantissa, 0.5)
    rounded = np.asarray(method.fake_quantize(tf.constant(weight), step, spec))
    np.testing.assert_array_equal(rounded / scale, np.rint(rounded / scale))


@pytest.mark.parametrize("power", range(-100, 101, 5))
def test_powers_of_two_are_exact(power: int) -> None:
    exact = np.float32(2.0**power)
    assert np.float32(arithmetic.exp2(tf.constant(float(power)))) == exact
    assert np.float32(arithmetic.next_power_of_two(tf.constant(exact))) == exact
    assert np.float32(arithmetic.near_power_of_two(tf.constant(exact * 1.2))) == exact


def test_a_symmetric_activation_grid_has_any_power_of_two() -> None:
    """Only the 16 bits of a fused LSTM's carry are bounded."""
    for bits in (4, 8):
        spec = QuantSpec(bits=bits, symmetric=True, power_of_two=True)
        for high in (1e-4, 0.9, 100.0, 5e4):
            low, top = arithmetic.symmetrize(tf.constant(-high), tf.constant(high), spec)
            assert np.frexp(np.float32(top) / spec.qmax)[0] == 0.5
            assert float(low) <= -high * (1 - 1e-4) and float(top) >= high * (1 - 1e-4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpecError, match=r"Expected start 'mse', '3sd' or 'max'. Received: start=7"):
        TrainedThreshold(7)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"Received: bits=1. Use bits=2, or .* kqat.Binary\(\)"):
        kqat.QuantizeConfig(weights=QuantSpec(bits=1, symmetric=True), weight_step="tqt")
    powers = QuantSpec(symmetric=True, power_of_two=True)
    for name in ("lsq_plus", "pact"):
        with pytest.raises(SpecError, match=r"any scale .* or kqat.TrainedThreshold\(\)"):
            kqat.QuantizeConfig(activation=powers, activation_range=name)
    kqat.QuantizeConfig(activation=powers, activation_range="tqt")
    with pytest.raises(PolicyError, match=r"Received: 'tqd'. Did you mean 'tqt'"):
        kqat.QuantizeConfig(activation_range="tqd")


@pytest.mark.parametrize(("spec", "clamped", "form"), [
    (QuantSpec(), False, RangeForm.ANY),
    (QuantSpec(), True, RangeForm.FROM_ZERO),
    (QuantSpec(bits=16, symmetric=True), True, RangeForm.SYMMETRIC),
])  # fmt: skip
def test_forms_of_ranges(spec: QuantSpec, clamped: bool, form: RangeForm) -> None:
    assert RangeForm.of(spec, clamped) is form
