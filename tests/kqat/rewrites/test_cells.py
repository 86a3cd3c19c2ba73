"""Cells called by hand, cells of one's own, and convolutions as gates: the same values in parts."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from kqat.base.errors import UnsupportedLayerError
from kqat.graph.tracer import rebuild, trace
from kqat.parts import Requantize
from kqat.planning.expansion import expand
from kqat.training.build import all_layers
from tests.coverage.recurrent_cases import Gated

STEPS, FEATURES, UNITS = 3, 5, 4
register = keras.saving.register_keras_serializable("tests")


def _model(call: Callable[[Any], Any], shape: tuple[int, ...] = (STEPS, FEATURES)) -> keras.Model:
    x = keras.Input(shape, name="x")
    model = keras.Model(x, call(x), name="net")
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(generator.normal(size=weight.shape, scale=0.5))
    return model


def _expanded(model: keras.Model) -> keras.Model:
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    return rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")


def _check(model: keras.Model, parts: keras.Model | None = None) -> None:
    x = np.random.default_rng(0).normal(size=(8, *model.inputs[0].shape[1:])).astype(np.float32)
    found = (parts or _expanded(model))(x)
    # Sums run in another order: a few float32 roundings of values near one.
    for ours, theirs in zip(*map(keras.tree.flatten, (found, model(x))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@register
class Decoder(layers.Layer):
    """A loop in Python over a cell, which begins with zeros and reads its own outputs."""

    def __init__(self, kind: str, first: str = "zeros", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cell = getattr(layers, kind)(UNITS)
        self.out = layers.Dense(FEATURES)
        self.kind, self.first = kind, first

    def build(self, shape: Any) -> None:
        """Builds the layers, and the state that is trained."""
        self.cell.build((None, FEATURES))
        self.out.build((None, UNITS))
        self.start = self.add_weight(shape=(1, UNITS), name="start")

    def call(self, x: Any) -> Any:
        """All outputs."""
        batch = ops.shape(x)[0]
        states = self.cell.get_initial_state(batch_size=batch)
        if self.first == "trained":
            states = [ops.tile(self.start, (batch, 1)), *states[1:]]
        token, outputs = x[:, 0], []
        for _ in range(2):
            y, states = self.cell(token, states)
            token = self.out(y)
            outputs.append(token)
        return ops.stack(outputs, axis=1)


@pytest.mark.parametrize("kind", ["SimpleRNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("first", ["zeros", "trained"])
def test_a_loop_by_hand_computes_what_it_did(kind: str, first: str) -> None:
    model = _model(Decoder(kind, first))
    parts = _expanded(model)
    _check(model, parts)
    # One weight, however often the cell is called.
    products = [layer for layer in parts.layers if isinstance(layer, layers.Dense)]
    assert len(products) == 1 + {"SimpleRNNCell": 2}.get(kind, 4)


def test_zeros_before_the_first_step_cost_no_product() -> None:
    model = _model(lambda x: layers.LSTMCell(UNITS)(x[:, 0], [ops.zeros_like(x[:, 0, :4])] * 2)[0])
    names = [type(layer).__name__ for layer in _expanded(model).layers]
    # The input's two products; the candidate times the input gate, then the output gate.
    assert (names.count("Dense"), names.count("Multiply"), names.count("Add")) == (2, 2, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: layers.SimpleRNNCell(UNITS)(x[:, 0], x[:, 1, :UNITS]),
        lambda x: layers.GRUCell(UNITS, reset_after=False, dropout=0.2)(x[:, 0], [x[:, 1, :UNITS]])[
            0
        ],
        lambda x: layers.StackedRNNCells([layers.LSTMCell(UNITS), layers.GRUCell(UNITS)])(
            x[:, 0], [[x[:, 1, :UNITS], x[:, 2, :UNITS]], [x[:, 2, :UNITS]]]
        )[1],
        lambda x: layers.RNN(Gated(), return_sequences=True, return_state=True)(x),
        lambda x: layers.RNN([Gated(), layers.GRUCell(3)])(x),
        lambda x: layers.Bidirectional(layers.RNN(Scaled(UNITS), return_sequences=True))(x),
        lambda x: layers.RNN(OneShape(UNITS), return_sequences=True)(x),
        lambda x: layers.RNN(Gated(), go_backwards=True)(
            x, initial_state=[x[:, 0, :UNITS], x[:, 1, :UNITS]]
        ),
    ],
    ids=["tensor", "gru", "stack", "own", "own-in-stack", "subclass", "own-shape", "own-given"],
)
def test_cells_compute_what_they_did(call: Any) -> None:
    _check(_model(call))


@register
class Scaled(layers.SimpleRNNCell):
    """A subclass of a stock cell, whose output is none of its states."""

    def call(self, sequence: Any, states: Any, training: bool = False) -> Any:
        """Twice the state."""
        y, after = super().call(sequence, states, training=training)
        return 2.0 * y, after


@register
class OneShape(Scaled):
    """A cell that tells the shape of its output alone: `keras.layers.RNN` asks for none."""

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the output."""
        return (input_shape[0], self.units)


@pytest.mark.parametrize("kind", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_convolutions_as_gates(kind: int) -> None:
    layer = getattr(layers, f"ConvLSTM{kind}D")
    shape = (2, 6, 5, 4)[: kind + 1]
    _check(_model(layer(3, 3, strides=2, return_sequences=True), (*shape, 2)))
    _check(_model(layer(5, 2, padding="same", return_state=True, go_backwards=True), (*shape, 2)))


def test_steps_that_a_mask_leaves_out_change_no_state() -> None:
    def call(x: Any) -> Any:
        mask = ops.greater(ops.max(x, axis=-1), 1.0)
        rows = layers.RNN(Gated(), return_sequences=True)(x, mask=mask)
        images = layers.Reshape((STEPS, FEATURES, 1))(x)
        return rows, layers.ConvLSTM1D(2, 3, return_sequences=True)(images, mask=mask)

    _check(_model(call))


class Feedback(keras.Model):
    """A cell that a loop over the inputs begins and Python goes on with."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__(name="feedback")
        self.cell = kind(UNITS)
        self.rnn = layers.RNN(self.cell, return_state=True, **options)
        self.out = layers.Dense(FEATURES)

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Two predictions."""
        y, *states = self.rnn(x, training=training)
        first = self.out(y)
        y, _ = self.cell(first, states=states, training=training)
        return ops.stack([first, self.out(y)], axis=1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(layers.LSTMCell, {}), (layers.SimpleRNNCell, {"go_backwards": True})],
    ids=["lstm", "backwards"],
)
def test_a_loop_and_calls_by_hand_share_one_cell(kind: Any, options: dict[str, Any]) -> None:
    model = Feedback(kind, **options)
    x = np.random.default_rng(0).normal(size=(8, STEPS, FEATURES)).astype(np.float32)
    expected = model(x)
    parts = _expanded(model)
    np.testing.assert_allclose(parts(x), expected, rtol=1e-5, atol=1e-5)
    assert sum(layer.count_params() for layer in parts.layers) == model.count_params()


@pytest.mark.slow
def test_a_loop_and_calls_by_hand_share_a_cell_of_ones_own() -> None:
    model, x = Feedback(Scaled), np.ones((8, STEPS, FEATURES), np.float32)
    x *= np.random.default_rng(0).normal(size=x.shape)
    expected = model(x)
    qat = kqat.quantize_model(model, calibration_data=x)
    np.testing.assert_allclose(qat(x), expected, atol=0.1)
    assert sum(int(np.prod(v.shape)) for v in qat.trainable_weights) == model.count_params()


@register
class Twice(layers.Layer):
    """A cell whose one weight multiplies the input and the state."""

    state_size = FEATURES

    def build(self, shape: Any) -> None:
        """Creates the weight."""
        self.w = self.add_weight(shape=(FEATURES, FEATURES), name="w")

    def call(self, x: Any, states: Any) -> Any:
        """The next state, twice."""
        h = ops.tanh(x @ self.w + states[0] @ self.w)
        return h, [h]


@register
class Overlapping(Twice):
    """A cell that also computes with the weight itself."""

    def call(self, x: Any, states: Any) -> Any:
        """The next state, twice."""
        h = ops.tanh(x @ self.w + ops.mean(self.w, axis=0) + states[0])
        return h, [h]


def test_a_weight_that_a_cell_reads_twice_is_one() -> None:
    model = _model(lambda x: layers.RNN(Twice())(x))
    x = np.random.default_rng(0).normal(size=(32, STEPS, FEATURES)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    assert [np.shape(v) for v in qat.trainable_variables] == [(FEATURES, FEATURES)]
    # Values of up to one, on grids of 1/128, in three steps.
    np.testing.assert_allclose(qat(x), model(x), atol=0.05)


def test_a_weight_that_a_cell_reads_in_parts_too_is_refused() -> None:
    model = _model(lambda x: layers.RNN(Overlapping())(x))
    with pytest.raises(kqat.ModelError, match=r"w', which .*reads twice, .*a copy of its own"):
        kqat.plan(model)


@register
class Begins(Gated):
    """A cell that begins with another state than zeros."""

    def get_initial_state(self, batch_size: Any = None) -> Any:
        """Ones."""
        return [ops.ones((batch_size, 4))] * 2


def test_a_cell_that_begins_with_other_states_is_refused() -> None:
    message = "cells that begin with zeros in layer 'rnn"
    with pytest.raises(UnsupportedLayerError, match=re.escape(message)):
        kqat.plan(_model(layers.RNN(Begins())))


@register
class Delayed(layers.Layer):
    """A cell that keeps its input, and a state that it hands on."""

    state_size = (FEATURES, FEATURES)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.out = layers.Dense(2)

    def build(self, shape: Any) -> None:
        """Builds the layer."""
        self.out.build((None, 2 * FEATURES))

    def call(self, x: Any, states: Any) -> Any:
        """Of the step before and what was given first."""
        before, given = states
        return self.out(ops.concatenate([before, given], axis=-1)), [x, given]


def test_states_that_a_step_hands_on_are_rounded() -> None:
    model = _model(lambda x: layers.RNN(Delayed())(x, initial_state=[x[:, 0], 2.0 * x[:, 1]]))
    _check(model)
    x = np.random.default_rng(0).normal(size=(32, STEPS, FEATURES)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    by_name = {layer.name: layer for layer in all_layers(qat) if hasattr(layer, "range")}
    (states,) = (layer for name, layer in by_name.items() if "state" in name or "grid" in name)
    low, high = states.range()
    # One grid for both, as they are joined: that of the wider one.
    assert low < -2.5 and high > 2.5
    error = np.abs(np.asarray(qat(x)) - np.asarray(model(x))).max()
    assert error < 0.02 * np.abs(model(x)).max()


class Nameless(layers.Layer):
    """A cell whose config is a lie: without its factor."""

    state_size = UNITS

    def __init__(self, factor: float = 1.0, config: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor, self.config, self.inner = factor, config, layers.Dense(UNITS)

    def build(self, shape: Any) -> None:
        """Creates the weights."""
        self.w = self.add_weight(shape=(UNITS, UNITS), name="w")
        self.inner.build(shape)
        self.inner.trainable = self.config  # Part of it may be frozen.

    def call(self, x: Any, states: Any) -> Any:
        """The next state, twice."""
        h = ops.tanh(self.factor * self.inner(x) + ops.matmul(states[0], self.w))
        return h, [h]

    def get_config(self) -> dict[str, Any]:
        """Says nothing of the factor; or nothing at all."""
        if not self.config:
            raise NotImplementedError
        return super().get_config()


class NamelessStep(Nameless):
    """A layer of that kind, which reads its weight in parts."""

    def call(self, x: Any) -> Any:
        """Products with the halves of the weight."""
        y = self.factor * self.inner(x)
        halves = [ops.matmul(y, self.w[:, :2]), ops.tanh(ops.matmul(y, self.w[:, 2:]))]
        return ops.concatenate(halves, axis=-1)

    def compute_output_shape(self, shape: Any) -> Any:
        """As many as there are units."""
        return (*shape[:-1], UNITS)


def _of_all_steps(factor: float, config: bool) -> Any:
    return layers.TimeDistributed(NamelessStep(factor, config))


def _of_two_calls(factor: float, config: bool) -> Any:
    layer = NamelessStep(factor, config)
    return lambda x: layers.Add()([layer(x), layer(layers.ReLU()(x))])


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda *given: layers.RNN(Nameless(*given), return_sequences=True),
        lambda *given: layers.RNN([layers.SimpleRNNCell(FEATURES), Nameless(*given)]),
        _of_all_steps,
        _of_two_calls,
    ],
    ids=["cell", "stacked", "TimeDistributed", "two calls"],
)
def test_users_own_cells_and_steps_are_never_made_anew(make: Any, config: bool) -> None:
    model = _model(lambda x: make(0.3, config)(x))
    before = [np.array(v) for v in model.weights]
    trained = [v.path for v in model.trainable_variables]
    x = np.random.default_rng(0).normal(size=(32, STEPS, FEATURES)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    # Values of a few units, on grids of 8 bits, in some steps.
    np.testing.assert_allclose(qat(x), model(x), atol=0.2)
    np.testing.assert_allclose(kqat.strip(qat)(x), model(x), atol=1e-5)
    counts = [sum(int(np.prod(v.shape)) for v in m.trainable_variables) for m in (model, qat)]
    assert counts[0] == counts[1]
    assert trained == [v.path for v in model.trainable_variables]
    assert all(map(np.array_equal, before, model.weights))


class Choosing(layers.SimpleRNNCell):
    """A cell whose next state is chosen: from what it computes and, as it is, the state before."""

    def call(self, x: Any, states: Any, training: bool = False) -> Any:
        new, _ = super().call(x, states, training=training)
        state = ops.maximum(new, states[0])
        return state, [state]


def test_states_that_are_chosen_are_rounded() -> None:
    """The plan ended in a KeyError: no operator made a range of such a state."""
    plan = kqat.plan(_model(layers.RNN(Choosing(UNITS))))
    (step,) = plan.steps.values()
    assert [node.name for node in step.graph.nodes if isinstance(node.layer, Requantize)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "precision"), [(lambda: Choosing(UNITS), "float32"), (Gated, "mixed_float16")]
)
def test_cells_of_the_users_own_ship(cell: Any, precision: str) -> None:
    """Under mixed precision the loop over the steps failed: their states were float16."""
    keras.config.set_dtype_policy(precision)
    x = np.random.default_rng(0).normal(size=(16, STEPS, FEATURES)).astype(np.float32)
    model = _model(layers.RNN(cell(), return_sequences=True))
    qat = kqat.quantize_model(model, calibration_data=x)
    qat.compile(keras.optimizers.SGD(0.01), "mse")
    qat.fit(x, np.zeros((16, *model.output.shape[1:])), verbose=0)
    assert np.all(np.isfinite(qat.predict(x, verbose=0)))
    report = tflite_export.verify(qat, tflite_export.convert(qat), x, samples=4)
    assert report.float_operators == 0 and all(p.is_right for p in report.runtimes), report
