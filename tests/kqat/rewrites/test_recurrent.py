"""Recurrent layers: the same values in parts, ranges over all steps, integers as NumPy has them."""

import re
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.base.errors import UnsupportedLayerError
from kqat.config.layer_config import QuantizeConfig
from kqat.graph.tracer import rebuild, trace
from kqat.planning.expansion import expand
from kqat.training.build import all_layers
from kqat.training.quantized_recurrence import QuantizedRecurrence
from tflite_export.runtimes.execution import run

STEPS, FEATURES, UNITS = 4, 5, 3


def _model(layer: Any, steps: int = STEPS, **options: Any) -> keras.Model:
    x = keras.Input((steps, FEATURES), name="x")
    model = keras.Model(x, layer(x, **options), name="net")
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(generator.normal(size=weight.shape, scale=0.5))
    return model


def _data(steps: int = STEPS, samples: int = 32) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.normal(size=(samples, steps, FEATURES)).astype(np.float32)


def _expanded(model: keras.Model) -> keras.Model:
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    return rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")


def _recurrences(qat: keras.Model) -> list[QuantizedRecurrence]:
    return [layer for layer in qat.layers if isinstance(layer, QuantizedRecurrence)]


def _quantizer(qat: keras.Model, name: str) -> kqat.ActivationQuantizer:
    return next(layer for layer in all_layers(qat) if layer.name == f"{name}_quantizer")


CELLS = (layers.SimpleRNN, layers.LSTM, layers.GRU)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"return_sequences": True, "go_backwards": True, "use_bias": False},
    {"return_sequences": True, "return_state": True, "activation": "relu"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "backwards", "states"))
@pytest.mark.parametrize("cell", CELLS)
def test_parts_compute_what_the_layer_computes(cell: Any, options: dict[str, Any]) -> None:
    model = _model(cell(UNITS, **options))
    expected, found = model(_data()), _expanded(model)(_data())
    for ours, theirs in zip(*map(keras.tree.flatten, (found, expected)), strict=True):
        # Sums run in another order: a few float32 roundings of values near one.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.GRU(UNITS, reset_after=False),
        lambda: layers.GRU(UNITS, recurrent_activation="hard_sigmoid"),
        lambda: layers.GRU(UNITS, recurrent_activation="tanh"),
        lambda: layers.Bidirectional(layers.LSTM(UNITS, return_sequences=True)),
        lambda: layers.Bidirectional(layers.GRU(UNITS, return_state=True), merge_mode="mul"),
        lambda: layers.Bidirectional(
            layers.SimpleRNN(UNITS), backward_layer=layers.GRU(UNITS, go_backwards=True)
        ),
        lambda: layers.RNN([layers.LSTMCell(UNITS), layers.GRUCell(2)], return_state=True),
        lambda: layers.RNN(
            layers.StackedRNNCells([layers.SimpleRNNCell(UNITS), layers.LSTMCell(2)]),
            return_sequences=True,
            go_backwards=True,
        ),
    ],
)
def test_wholes_compute_what_the_layer_computes(layer: Any) -> None:
    model = _model(layer())
    expected, found = model(_data()), _expanded(model)(_data())
    for ours, theirs in zip(*map(keras.tree.flatten, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_initial_states_reach_their_cells() -> None:
    x = keras.Input((STEPS, FEATURES))
    given = [keras.Input((UNITS,)) for _ in range(4)]
    y = layers.Bidirectional(layers.LSTM(UNITS))(x, initial_state=given)
    model = keras.Model([x, *given], y)
    generator = np.random.default_rng(2)
    values = [_data(), *(generator.normal(size=(32, UNITS)).astype(np.float32) for _ in given)]
    np.testing.assert_allclose(_expanded(model)(values), model(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: layers.LSTM(2, stateful=True), "stateful=False in layer 'lstm"),
        (
            lambda: layers.GRU(2, recurrent_constraint="max_norm"),
            "no recurrent_constraint in layer 'gru",
        ),
        (
            lambda: layers.Bidirectional(layers.GRU(2, activity_regularizer="l2")),
            "no activity_regularizer in the layers of Bidirectional layer 'bidirectional",
        ),
        (
            lambda: layers.Bidirectional(_Reader(2), backward_layer=_Reader(2, True)),
            "a recurrent layer in Bidirectional layer 'bidirectional",
        ),
    ],
)
def test_what_cannot_ship_is_refused(layer: Any, message: str) -> None:
    x = keras.Input((STEPS, FEATURES), batch_size=2)
    model = keras.Model(x, layer()(x))
    with pytest.raises(UnsupportedLayerError, match=re.escape(message)):
        kqat.plan(model)


@keras.saving.register_keras_serializable("tests")
class _Reader(keras.layers.Layer):
    """A layer with what Bidirectional asks for, but without a cell."""

    def __init__(self, units: int, go_backwards: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units, self.go_backwards = units, go_backwards
        self.stateful = self.return_sequences = self.return_state = False

    def call(self, x: Any, initial_state: Any = None) -> Any:
        return keras.ops.mean(x, axis=1)

    def compute_output_shape(self, shape: Any) -> Any:
        return (shape[0], shape[-1])

    def get_config(self) -> dict[str, Any]:
        config = {"units": self.units, "go_backwards": self.go_backwards}
        return {**super().get_config(), **config}


def test_a_range_is_that_of_all_steps() -> None:
    model, x = _model(layers.SimpleRNN(UNITS, "linear", name="rnn")), _data()
    qat = kqat.quantize_model(model, calibration_data=x)
    (recurrence,) = _recurrences(qat)
    kernel, recurrent_kernel, bias = (np.asarray(w) for w in model.weights)
    scales = [np.abs(w).max(0) / 127 for w in (kernel, recurrent_kernel)]
    kernel, recurrent_kernel = (
        np.rint(w / s) * s for w, s in zip((kernel, recurrent_kernel), scales, strict=True)
    )
    h, sums = np.zeros((len(x), UNITS)), []
    for step in range(STEPS):
        h = x[:, step] @ kernel + bias + h @ recurrent_kernel
        sums.append(h)
    low, high = _quantizer(qat, "rnn_sum").range()
    # Calibration rounds weights only; sums run in float32 here and in float64 there.
    np.testing.assert_allclose([low, high], [np.min(sums), np.max(sums)], rtol=1e-5)
    assert [q.sites for q in recurrence.parts.quantizers] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_a_clamp_inside_is_carried_out(cell: Any, activation: str) -> None:
    """By rounding on a range that starts at zero: values before the clamp say nothing of it."""
    model, x = _model(cell(UNITS, activation=activation)), _data()
    qat = kqat.quantize_model(model, calibration_data=x)
    for quantizer in (q for q in all_layers(qat) if getattr(q, "clamp", None) is not None):
        assert float(np.min(quantizer.site_low)) == 0.0, quantizer.name
    want, got = np.asarray(model(x)), np.asarray(qat(x))
    assert np.mean((got - want) ** 2) < 1e-3 * np.mean(want**2)


@pytest.mark.slow
def test_training_moves_a_range_once_per_batch_and_not_when_frozen() -> None:
    qat = kqat.quantize_model(_model(layers.GRU(UNITS)), calibration_data=_data())
    qat.compile("sgd", "mse")
    y = np.zeros((32, UNITS))
    quantizers = [q for q in _recurrences(qat)[0].parts.quantizers if q.variables]
    assert {float(q.count[0]) for q in quantizers} == {100.0}
    qat.fit(_data(), y, batch_size=16, verbose=0)
    assert {float(q.count[0]) for q in quantizers} == {102.0}
    ranges = [q.range() for q in quantizers]
    qat.fit(_data() * 2, y, verbose=0, callbacks=[kqat.FreezeObservers(0)])
    assert [q.range() for q in quantizers] == ranges


@pytest.mark.slow
def test_the_first_batch_finds_ranges_without_calibration() -> None:
    model, x = _model(layers.LSTM(UNITS, name="rnn")), _data()
    with pytest.warns(kqat.RangeWarning):
        qat = kqat.quantize_model(model)
    np.testing.assert_allclose(qat(x), model(x), atol=0.05)  # weights alone are rounded
    qat.compile(keras.optimizers.SGD(0.0), "mse")
    qat.fit(x, np.zeros((32, UNITS)), batch_size=32, verbose=0)
    calibrated = kqat.quantize_model(model, calibration_data=x)
    for name in ("rnn_gates_sum", "rnn_carry", "rnn_output"):
        ours, theirs = (_quantizer(q, name).range() for q in (qat, calibrated))
        # This batch was rounded within the ranges that its unrounded values had found.
        np.testing.assert_allclose(ours, theirs, atol=0.05)


def test_recurrent_dropout_draws_one_mask_for_all_steps() -> None:
    layer = layers.SimpleRNN(64, "linear", recurrent_dropout=0.5, use_bias=False)
    x = keras.Input((3, 64))
    model = keras.Model(x, layer(x))
    layer.set_weights([np.eye(64), np.eye(64)])
    ones = np.ones((2, 3, 64), np.float32)
    qat = kqat.quantize_model(model, calibration_data=ones)
    # Calibrated without dropout, the largest sum is 3: what a mask doubles is cut off there.
    found = np.unique(np.asarray(qat(ones, training=True)).round(1))
    # One mask leaves 1 where it drops, and 1 + 2 (1 + 2 · 1) elsewhere; two would give 1 + 2 · 1.
    assert found.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("backwards", [False, True])
def test_the_file_computes_as_integers_by_hand(backwards: bool) -> None:
    """SimpleRNN in NumPy integers, from the numbers of the frozen model, on every step."""
    layer = layers.SimpleRNN(UNITS, name="rnn", return_sequences=True, go_backwards=backwards)
    model, x = _model(layer), _data()
    qat = kqat.quantize_model(model, calibration_data=x)
    frozen = kqat.freeze(qat)
    sites = {site.name: site for site in frozen.sites}
    weights = {w.name.rsplit("/", 1)[0]: w.integers.astype(int) for w in frozen.weights}
    scales = {w.name.rsplit("/", 1)[0]: w.scale.reshape(-1) for w in frozen.weights}
    (wrapper,) = (part for part in qat.layers if isinstance(part, kqat.QuantizeWrapper))
    bias = np.asarray(layer.cell.bias, np.float64) + np.asarray(wrapper.correction)

    def product(q: np.ndarray, source: str, dense: str, result: str, bias: Any) -> np.ndarray:
        site = sites[source]
        step = site.scale * scales[dense].astype(np.float64)
        total = (q - site.zero_point) @ weights[dense] + np.rint(bias / step)
        return sites[result].integers(total * step)

    q = product(sites["x"].integers(x), "x", "rnn_sum_input", "rnn_sum_input", bias)
    h = np.zeros((len(x), UNITS))  # integer zero of TANH's grid is real zero
    outputs = []
    for step in range(STEPS)[:: -1 if backwards else 1]:
        r = product(h, "rnn_output_tanh", "rnn_sum_recurrent", "rnn_sum_recurrent", 0.0)
        real = [
            sites[n].reals(v) for n, v in (("rnn_sum_input", q[:, step]), ("rnn_sum_recurrent", r))
        ]
        total = sites["rnn_sum"].integers(np.add(*real))
        h = sites["rnn_output_tanh"].integers(np.tanh(sites["rnn_sum"].reals(total)))
        outputs.append(h)
    blob = tflite_export.convert(frozen)
    (found,) = run(
        blob, [sites["x"].integers(x).astype(np.int8)], runtime="litert_reference"
    ).outputs
    steps = np.abs(found - np.stack(outputs, axis=1))
    # Kernels round a product twice: a step here and there, which comes back in later steps.
    assert steps.max() <= 2
    assert np.mean(steps > 0) < 0.02


def test_weights_are_in_the_file_once() -> None:
    sizes = []
    for steps in (2, 3):
        x = keras.Input((steps, 8))
        model = keras.Model(x, layers.SimpleRNN(64, name="rnn")(x))
        data = np.random.default_rng(0).normal(size=(8, steps, 8)).astype(np.float32)
        sizes.append(len(tflite_export.convert(kqat.quantize_model(model, calibration_data=data))))
    # One more step: four operators and as many tensors, not 64 x 64 bytes of weights.
    assert sizes[1] - sizes[0] < 1500


@pytest.mark.slow
def test_the_state_of_an_idle_gru_stays() -> None:
    """An update gate that is shut keeps the integers of the state, however many steps there are."""
    steps = 12
    layer = layers.GRU(UNITS, name="rnn", return_sequences=True)
    x, h = keras.Input((steps, FEATURES), name="x"), keras.Input((UNITS,), name="h")
    model = keras.Model([x, h], layer(x, initial_state=h))
    kernel, recurrent_kernel, bias = layer.get_weights()
    bias[:] = 0.0
    bias[0, :UNITS] = 20.0  # the update gate: keep
    layer.set_weights([kernel, recurrent_kernel, bias])
    generator = np.random.default_rng(0)
    data = [_data(steps), generator.uniform(-1, 1, (32, UNITS)).astype(np.float32)]
    qat = kqat.quantize_model(model, calibration_data=data)
    sequence = np.asarray(qat(data))
    np.testing.assert_array_equal(sequence, sequence[:, :1].repeat(steps, 1))
    # The model's own output differs by the rounding of the state, half a step.
    assert np.abs(sequence - model(data)).max() < 0.01


@pytest.mark.parametrize("whole", [layers.LSTM, lambda n: layers.Bidirectional(layers.GRU(n))])
def test_a_layer_that_stays_float_is_unrolled_too(whole: Any) -> None:
    x = keras.Input((STEPS, FEATURES))
    layer = whole(UNITS)
    model = keras.Model(x, layers.Dense(2)(layer(layers.Dense(FEATURES)(x))))
    qat = kqat.quantize_model(model, {layer.name: None}, calibration_data=_data())
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, _data(), runtimes=("litert_reference",))
    assert "WHILE" not in report.operators
    part = report.on("litert_reference")
    assert part.problem is None
    assert part.max_steps <= 1


@pytest.mark.parametrize(
    ("kind", "policy", "precision"),
    [
        (layers.SimpleRNN, "int8", "mixed_float16"),
        (layers.LSTM, QuantizeConfig(recurrence="fused"), "mixed_bfloat16"),
        pytest.param(layers.LSTM, "int8", "mixed_bfloat16", marks=pytest.mark.slow),
        pytest.param(layers.GRU, "int8", "mixed_float16", marks=pytest.mark.slow),
    ],
)
def test_mixed_precision_trains_and_ships(
    kind: type, policy: Any, precision: str, tmp_path: Any
) -> None:
    """Ranges were read as half-precision numbers, and steps of the file were of those."""
    keras.config.set_dtype_policy(precision)
    model, x = _model(kind(UNITS, return_sequences=True, go_backwards=True)), _data()
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    error = np.asarray(qat(x), np.float64) - np.asarray(model(x), np.float64)
    assert np.mean(error**2) < 1e-3 * np.mean(np.asarray(model(x), np.float64) ** 2)
    before = [np.array(v) for v in qat.trainable_variables]
    qat.compile(keras.optimizers.SGD(0.01), "mse")
    qat.fit(x, np.zeros((len(x), STEPS, UNITS)), verbose=0)
    assert all(np.any(v != old) for v, old in zip(qat.trainable_variables, before, strict=True))
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    blob = tflite_export.convert(loaded)
    assert blob == tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, x, samples=4)
    assert report.float_operators == 0 and all(p.is_right for p in report.runtimes), report
