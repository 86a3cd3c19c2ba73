"""What neighbouring layers do together is planned in the step of a recurrence as in a model."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from kqat.grids import Bounds, Clamp
from kqat.planning import Plan

STEPS, FEATURES, UNITS = 3, 6, 4
# They hand integers on as they are, or make truth values of them; what reads those is compared.
MOVING = {"CAST", "GREATER", "PACK", "RESHAPE", "STRIDED_SLICE", "UNPACK"}
X = np.random.default_rng(0).normal(size=(64, STEPS, FEATURES)).astype(np.float32)

ENDS: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda x, h: ops.relu(x + h),
    "hard tanh": lambda x, h: keras.activations.hard_tanh(x + h),
    "two clips": lambda x, h: ops.minimum(ops.maximum(x + h, -0.25), 0.5),
    "bias": lambda x, h: ops.tanh((x + 0.5) + h),
    "functions": lambda x, h: x / ops.sqrt(ops.mean(ops.square(h), -1, keepdims=True) + 1e-3),
    "mask": lambda x, h: ops.softmax(x + h + (1.0 - ops.cast(x[:, :1] > 0.0, "float32")) * -1e9),
}


@keras.saving.register_keras_serializable("tests")
class Ending(L.Layer):
    """A cell whose step ends in one of `ENDS`, of a sum of two kernels' products."""

    def __init__(self, end: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.end, self.state_size = end, UNITS
        self.kernel, self.own = L.Dense(UNITS, name="kernel"), L.Dense(UNITS, use_bias=False)

    def build(self, shape: Any) -> None:
        """Builds the kernels."""
        self.kernel.build(shape)
        self.own.build((None, UNITS))

    def call(self, x: Any, states: Any) -> Any:
        """The state, as output too."""
        y = ENDS[self.end](self.kernel(x), self.own(states[0]))
        return y, [y]


def model_of(end: str, *, given: bool = False) -> keras.Model:
    keras.utils.set_random_seed(0)
    x, start = keras.Input(X.shape[1:], name="x"), keras.Input((UNITS,), name="start")
    y = L.RNN(Ending(end), return_sequences=True)(x, initial_state=start if given else None)
    model = keras.Model([x, start] if given else x, y)
    model.set_weights([2.0 * weight for weight in model.get_weights()])
    return model


def step_of(plan: Plan) -> Plan:
    (step,) = plan.steps.values()
    return step


def kinds_of(end: str) -> list[str]:
    return [layer.kind for layer in step_of(kqat.plan(model_of(end))).layers]


@pytest.mark.parametrize(
    ("end", "bounds"), [("hard tanh", Bounds(-1.0, 1.0)), ("two clips", Bounds(-0.25, 0.5))]
)
def test_the_grid_of_a_state_ends_where_a_clip_does(end: str, bounds: Bounds) -> None:
    step = step_of(kqat.plan(model_of(end)))
    assert bounds in [group.clamp for group in step.groups]
    assert not [layer for layer in step.layers if layer.kind == "Clip" and layer.role != "clamp"]


def test_a_step_is_made_of_as_few_kernels_as_a_model() -> None:
    assert sorted(kinds_of("bias")) == ["Activation", "Add", "Dense", "Dense"]
    assert kinds_of("functions").count("Elementwise") == 1


def test_a_mask_of_a_step_hides_without_a_billion() -> None:
    assert "Hide" in kinds_of("mask")


def test_an_initial_state_is_not_clamped() -> None:
    """It comes from elsewhere, and is negative here."""
    for given, clamp in ((False, Clamp.RELU), (True, None)):
        step = step_of(kqat.plan(model_of("relu", given=given)))
        rounding = step.roundings[step.graph.outputs[0]][-1]
        (group,) = (group for group in step.groups if group.name == rounding.group)
        assert group.clamp is clamp


# Measured: 31.0, 19.1 and 30.2 dB; the rest is room for weights that other versions draw, which a
# recurrence amplifies from step to step. A mask leaves little of a state of four units.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "given", "decibels"),
    [("hard tanh", False, 24.0), ("mask", False, 15.0), ("relu", True, 20.0)],
)
def test_a_step_ships_as_it_was_trained(end: str, given: bool, decibels: float) -> None:
    model = model_of(end, given=given)
    start = np.random.default_rng(1).normal(size=(len(X), UNITS)).astype(np.float32)
    data = [X, start] if given else X
    qat = kqat.quantize_model(model, calibration_data=data)
    report = tflite_export.verify(qat, tflite_export.convert(qat), data, samples=32)
    part = report.on("litert_reference")
    # Each operator of each step has a row, but for those of `MOVING`.
    rows = Counter(site.operator for site in part.sites)
    computing = {op: n for op, n in report.operators.items() if op not in MOVING}
    assert {op: rows[op] for op in computing} == computing
    assert ("QUANTIZE" in computing) is given
    assert part.is_right and part.exact is not None and part.exact.is_exact
    if not given:  # A state that is given is requantized, which each runtime rounds in its own way.
        assert part.outputs[0].max_steps == 0
    want, got = (np.asarray(m(data, training=False), np.float64) for m in (model, qat))
    assert 10 * np.log10(np.mean(want**2) / np.mean((got - want) ** 2)) > decibels
