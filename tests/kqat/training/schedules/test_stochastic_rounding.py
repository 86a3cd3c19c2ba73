"""Rounding at random: its mean, its two neighbours, when it ends, that nothing is traced."""

import numpy as np
import pytest

import kqat
from kqat.base.errors import ModelError
from tests.kqat.training.schedules.models import EachStep, Traces, fit, quantized, wrapper


@pytest.mark.slow
def test_a_weight_becomes_one_of_its_neighbours_with_the_weight_as_mean() -> None:
    """Gupta et al. 2015, section 3.1."""
    qat = quantized({"*": kqat.QuantizeConfig(weight_step="max_abs")}, rate=0.0)
    one, stochastic = wrapper(qat), kqat.StochasticRounding(seed=3)
    fit(qat, stochastic, epochs=1)
    one.controls.random.assign(1.0)  # type: ignore[union-attr]
    step = np.asarray(one.scale("kernel"))
    ratio = np.asarray(one.layer.kernel) / step
    drawn = np.stack([np.asarray(one.on_grid("kernel", training=True)) for _ in range(400)]) / step
    np.testing.assert_allclose(drawn, np.rint(drawn), atol=1e-4)
    assert np.all((drawn >= np.floor(ratio) - 1e-3) & (drawn <= np.ceil(ratio) + 1e-3))
    # 400 draws have a standard deviation of 0.025 at the most.
    assert np.abs(drawn.mean(0) - ratio).max() < 0.125
    np.testing.assert_array_equal(one.on_grid("kernel"), one.on_grid("kernel"))


@pytest.mark.slow
def test_it_ends_at_its_epoch_without_a_new_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    traces, qat = Traces(monkeypatch), quantized()
    flags = EachStep(lambda model: float(wrapper(model).controls.random))  # type: ignore[arg-type]
    fit(qat, kqat.StochasticRounding(1), flags, traces, epochs=3)
    assert flags.seen == [1.0] * 4 + [0.0] * 8
    assert traces.only_once
    flags.seen.clear()
    fit(qat, kqat.StochasticRounding(), flags, epochs=1)
    assert flags.seen == [1.0] * 4
    assert float(wrapper(qat).controls.random) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["ternary", "binary"])
def test_weights_of_two_or_three_values_are_refused(preset: str) -> None:
    qat = quantized({"head": preset, "*": "int8"})
    with pytest.raises(ModelError, match=r"equal steps for StochasticRounding. Received: 'head'"):
        fit(qat, kqat.StochasticRounding(), epochs=1)


@pytest.mark.parametrize("until", [-1, 1.5, True])
def test_an_epoch_that_is_none_is_refused(until: int) -> None:
    with pytest.raises(ModelError, match=rf"Received: until={until!r}"):
        kqat.StochasticRounding(until)
