"""Training without rounding at first: what it computes, when it changes, that nothing is traced."""

import keras
import numpy as np
import pytest

import kqat
from kqat.base.errors import ModelError
from tests.kqat.training.schedules.models import (
    EachStep,
    Traces,
    X,
    Y,
    fit,
    network,
    quantized,
    wrapper,
)


@pytest.mark.slow
def test_the_first_steps_are_those_of_the_float_model() -> None:
    """The same losses and weights, so neither weights, activations nor biases are rounded."""
    model = network()
    qat = kqat.quantize_model(model, calibration_data=X)
    for one in (model, qat):
        one.compile(keras.optimizers.SGD(0.1), "mse")
    loss = fit(model).history["loss"], fit(qat, kqat.QuantizeAfter(100)).history["loss"]
    np.testing.assert_allclose(*loss, rtol=1e-5)
    kernel = model.get_layer("head").kernel
    np.testing.assert_allclose(kernel, wrapper(qat).layer.kernel, atol=1e-5)
    qat.compile(keras.optimizers.SGD(0.0), "mse")
    later = fit(qat, epochs=1).history["loss"][0]
    assert qat.train_on_batch(X[:16], Y[:16]) != model.evaluate(X[:16], Y[:16], verbose=0)
    assert np.isfinite(later)


@pytest.mark.slow
def test_it_rounds_from_the_step_on_without_a_new_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    traces, delay = Traces(monkeypatch), kqat.QuantizeAfter(3)
    flags = EachStep(lambda model: float(wrapper(model).controls.rounds))  # type: ignore[arg-type]
    qat = quantized()
    fit(qat, delay, flags, traces)
    assert flags.seen == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    fit(qat, epochs=1)
    assert traces.only_once
    again = EachStep(flags.function)
    fit(qat, kqat.QuantizeAfter(3), again, epochs=1)  # The optimizer has taken them before.
    assert set(again.seen) == {1.0}


@pytest.mark.slow
def test_a_fit_that_ends_before_leaves_a_model_that_rounds() -> None:
    qat = quantized()
    fit(qat, kqat.QuantizeAfter(50), epochs=1)
    assert float(wrapper(qat).controls.rounds) == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [-1, 1.5, True, None])
def test_a_number_that_is_none_is_refused(steps: int) -> None:
    with pytest.raises(ModelError, match=r"Expected a number of steps, 0 or more. Received"):
        kqat.QuantizeAfter(steps)


def test_a_float_model_is_refused() -> None:
    model = network()
    model.compile("sgd", "mse")
    with pytest.raises(ModelError, match=r"QAT model for QuantizeAfter. Received: 'net'"):
        fit(model, kqat.QuantizeAfter(3), epochs=1)
