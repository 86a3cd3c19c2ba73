"""Oscillations against a reading of Nagel et al. 2022 in NumPy, and in a `fit`."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import kqat
from kqat.base.errors import ModelError
from kqat.training.schedules.oscillations import FrozenOscillations
from tests.kqat.training.schedules.models import EachStep, Traces, fit, quantized, wrapper

RNG = np.random.default_rng(0)


def test_frequencies_and_frozen_weights_are_those_of_the_algorithm() -> None:
    """Algorithm 1, weight by weight."""
    momentum, threshold, steps = 0.1, 0.4, 60
    integers = RNG.integers(-1, 2, (steps, 20)).astype(np.float32)
    integers[:, :5] = 1.0  # never oscillate
    integers[:, 5:10] = np.arange(steps)[:, None] % 2  # do so in every step
    integers[:, 10] = np.arange(steps)  # change, but never turn
    followed = FrozenOscillations(tf.constant(integers[0]))
    for now in integers[1:]:
        followed.freeze(tf.constant(now), momentum, threshold)
    for weight in range(20):
        before, sign, f, ema, held = integers[0, weight], 0.0, 0.0, integers[0, weight], None
        for now in integers[1:, weight]:
            change = np.sign(now - before)
            turned = change != 0 and sign != 0 and change != sign
            f = momentum * turned + (1 - momentum) * f
            ema = momentum * now + (1 - momentum) * ema
            sign = change or sign
            before = now
            if f > threshold and held is None:
                held = np.rint(ema)
        assert followed.frequency.numpy()[weight] == pytest.approx(f, abs=1e-5)
        assert followed.mean.numpy()[weight] == pytest.approx(ema, abs=1e-4)
        assert followed.frozen.numpy()[weight] == (held is not None)
        if held is not None:
            assert followed.held.numpy()[weight] == held
    assert followed.frozen.numpy()[5:10].all() and not followed.frozen.numpy()[:5].any()
    assert followed.frozen.numpy()[10] == 0


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["channel", None])
def test_frozen_weights_keep_their_integers_whatever_the_optimizer_does(axis: Any) -> None:
    spec = kqat.QuantSpec(bits=4, symmetric=True, narrow_range=True, axis=axis)
    qat = quantized(kqat.QuantizeConfig(weights=spec, weight_step="lsq"), rate=0.05)

    def integers(model: Any) -> np.ndarray:
        return np.concatenate([
            np.rint(np.asarray(one.on_grid("kernel") / one.scale("kernel"))).reshape(-1)
            for one in (wrapper(model, "hidden"), wrapper(model))
        ])  # fmt: skip

    callback = kqat.FreezeOscillations((0.15, 0.15), momentum=0.2)
    qat.compile(keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5), "mse")
    seen = EachStep(integers)
    history = fit(qat, callback, seen, epochs=12).history
    frozen = np.concatenate([f.frozen.numpy().reshape(-1) for *_, f in callback._tracked])
    held = np.concatenate([f.held.numpy().reshape(-1) for *_, f in callback._tracked])
    assert 0 < frozen.sum() < frozen.size
    np.testing.assert_array_equal(seen.seen[-1][frozen > 0], held[frozen > 0])
    np.testing.assert_array_equal(integers(qat)[frozen > 0], held[frozen > 0])
    assert history["frozen"][-1] == pytest.approx(frozen.mean())
    assert history["frozen"] == sorted(history["frozen"])
    assert 0.0 <= history["oscillating"][-1] <= 1.0
    # Weights that are not frozen went on.
    assert any(np.any(a != b) for a, b in zip(seen.seen[-9:-1], seen.seen[-8:], strict=True))


@pytest.mark.slow
def test_dampening_is_the_penalty_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    traces, qat = Traces(monkeypatch), quantized(rate=0.0)
    weights = EachStep(lambda m: float(wrapper(m).controls.dampening))  # type: ignore[arg-type]
    fit(qat, kqat.DampenOscillations(0.5), weights, traces, epochs=2)
    expected = 0.5 * (0.5 - 0.5 * np.cos(np.pi * np.arange(8) / 7))
    np.testing.assert_allclose(weights.seen, expected, rtol=1e-5)
    assert traces.only_once
    assert float(wrapper(qat).controls.dampening) == 0.0  # type: ignore[arg-type]
    one = wrapper(qat)
    one.controls.dampening.assign(0.5)  # type: ignore[union-attr]
    with tf.GradientTape() as tape:
        loss = one.oscillation_penalty()
    kernel, s = one.layer.kernel.numpy(), np.asarray(one.scale("kernel"))
    rounded, clipped = np.asarray(one.on_grid("kernel")), np.clip(kernel, -7 * s, 7 * s)
    assert float(loss) == pytest.approx(0.5 * np.sum((rounded - clipped) ** 2), rel=1e-4)
    slope = tape.gradient(loss, one.layer.kernel.value)
    inside = np.abs(kernel) < 7 * s
    np.testing.assert_allclose(slope, (kernel - rounded) * inside, atol=1e-6)


@pytest.mark.slow
def test_dampening_draws_weights_to_their_integers() -> None:
    def distance(*callbacks: Any) -> float:
        tf.keras.utils.set_random_seed(0)
        qat = quantized()
        fit(qat, *callbacks, epochs=40)  # The penalty is whole at the end of training only.
        one = wrapper(qat)
        ratio = np.asarray(one.layer.kernel / one.scale("kernel"))
        return float(np.mean(np.abs(ratio - np.rint(ratio))))

    assert distance(kqat.DampenOscillations(30.0)) < 0.7 * distance()


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_a_strength_that_is_none_is_refused(strength: float) -> None:
    with pytest.raises(ModelError, match=r"Expected a strength above zero. Received"):
        kqat.DampenOscillations(strength)


def test_thresholds_that_are_none_are_refused() -> None:
    for options in ({"threshold": (0.0, 0.1)}, {"momentum": 1.0}):
        with pytest.raises(ModelError, match=r"inside \(0, 1\). Received"):
            kqat.FreezeOscillations(**options)  # type: ignore[arg-type]
