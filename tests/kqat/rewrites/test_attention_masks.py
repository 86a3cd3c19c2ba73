"""Masks: what is hidden weighs nothing, in training as in the file; elsewhere they are refused."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from kqat.graph.tracer import rebuild, trace
from kqat.grids import arithmetic
from kqat.planning.expansion import expand
from tests.newer_keras import needs_keras

STEPS, FEATURES = 6, 8
# Of Keras's own layers inside GroupQueryAttention, which has used the mask by then.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning"),
]


def _tokens(samples: int = 16) -> np.ndarray:
    """Rows of tokens 1…9, of which the last are padded; every row begins with a token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 10, (samples, STEPS))
    lengths = rng.integers(1, STEPS + 1, (samples, 1))
    return np.where(np.arange(STEPS) < lengths, tokens, 0).astype(np.int32)


def _embedded(attend: Callable[[Any], Any]) -> keras.Model:
    """Attention over rows of which Keras itself knows which are padded."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    rows = layers.Embedding(10, FEATURES, mask_zero=True, embeddings_initializer="normal")(tokens)
    return keras.Model(tokens, attend(layers.Dense(FEATURES)(rows)))


def _expanded(model: keras.Model) -> keras.Model:
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    return rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")


def _heads(**options: Any) -> Callable[[Any], Any]:
    return lambda x: layers.MultiHeadAttention(2, 4)(x, x, **options)


def _padded(layer: Any) -> Any:
    needs_keras("3.12", f"{type(layer).__name__} with a padding mask alone")
    return layer


MASKED: dict[str, Callable[[Any], Any]] = {
    "padding": _heads(),
    "padding, causal": _heads(use_causal_mask=True),
    "padding, dropout": lambda x: layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x),
    "padding, window": lambda x: layers.MultiHeadAttention(2, 4, sliding_window=2)(x, x),
    "constant": _heads(attention_mask=np.eye(STEPS, dtype=bool)[None]),
    "shared heads": lambda x: layers.GroupQueryAttention(4, 4, 2)(x, x, use_causal_mask=True),
    "dot": lambda x: _padded(layers.Attention())([x, x]),
    "dot, causal": lambda x: layers.Attention()([x, x], use_causal_mask=True),
    "additive": lambda x: _padded(layers.AdditiveAttention())([x, x]),
    "two blocks": lambda x: (lambda y: _heads()(layers.Add()([x, y])))(_heads()(x)),
}


@pytest.mark.parametrize("attend", MASKED.values(), ids=MASKED)
def test_parts_hide_what_the_layer_hides(attend: Callable[[Any], Any]) -> None:
    model, tokens = _embedded(attend), _tokens()
    expanded = _expanded(model)
    expected = model.predict(tokens, verbose=0)
    # Sums run in another order: a few float32 roundings of values near one.
    np.testing.assert_allclose(expanded.predict(tokens, verbose=0), expected, rtol=2e-4, atol=2e-5)
    for i, (ours, theirs) in enumerate(zip(expanded(tokens), expected, strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5, err_msg=f"sample {i}")


@pytest.mark.parametrize("kind", ["padding, causal", pytest.param("dot", marks=pytest.mark.slow)])
def test_a_hidden_step_does_not_matter_to_the_file(kind: str) -> None:
    """What a padded row holds reaches no visible step, to the bit."""
    model, tokens = _embedded(MASKED[kind]), _tokens()
    qat = kqat.quantize_model(model, calibration_data=tokens)
    frozen = kqat.freeze(qat)
    report = tflite_export.verify(frozen, tflite_export.convert(frozen), tokens)
    assert report.is_full_integer
    for runtime in report.runtimes:
        # One step: kernels round twice where float arithmetic rounds once.
        assert (runtime.problem, runtime.unmatched) == (None, ())
        assert runtime.max_steps <= 1
    embedding = next(v for v in qat.variables if v.path.endswith("embeddings"))
    before = np.asarray(qat(tokens))
    table = np.asarray(embedding)
    # Token 0 gets a row that is within the ranges of all tables, and is another.
    embedding.assign(np.concatenate([-table[3:4], table[1:]]))
    shown = tokens > 0
    np.testing.assert_array_equal(np.asarray(qat(tokens))[shown], before[shown])


def test_the_range_of_masked_scores_ends_a_little_below_what_is_shown() -> None:
    """Not at -1024, where no grid of eight bits tells scores apart."""
    x = np.random.default_rng(0).normal(size=(32, STEPS, FEATURES)).astype(np.float32)
    inputs = keras.Input((STEPS, FEATURES))
    attend = layers.MultiHeadAttention(2, 4, name="mha")
    model = keras.Model(inputs, attend(inputs, inputs, use_causal_mask=True))
    qat = kqat.quantize_model(model, calibration_data=x)
    scores = qat.get_layer("mha_scores_quantizer").range()
    low, high = qat.get_layer("mha_hidden_quantizer").range()
    assert high == pytest.approx(scores[1], abs=0.5)
    room = np.log(2.0**9 * STEPS)
    assert scores[0] - room - 0.5 <= low <= -room


def test_all_hidden_scores_weigh_less_than_half_a_step_of_softmax() -> None:
    spec = kqat.QuantSpec(bits=8)
    scores = np.linspace(-3.0, 5.0, 64, dtype=np.float32)
    low, high = arithmetic.shown_bounds(np.append(scores, arithmetic.HIDDEN), spec)
    assert float(high) == 5.0
    # The shown score is the least one; all others are hidden, at the end of the grid.
    assert 64 * np.exp(float(low) + 3.0) < 0.5 / 256
    assert arithmetic.shown_bounds(np.full(4, arithmetic.HIDDEN), spec)[1] == 0.0
    # LiteRT's own ADD, for scores far finer than that, wraps at 16 bits: here of a single key.
    assert 255 * -arithmetic.HIDDEN / arithmetic.hidden_room(spec, 1) < 2**15


@pytest.mark.slow
@pytest.mark.parametrize("size", [300.0, 2000.0])
def test_large_scores_are_hidden_too(size: float) -> None:
    """Whether a key is seen says the mask, not its score."""
    x = np.random.default_rng(0).normal(size=(4, STEPS, FEATURES)).astype(np.float32) * size**0.5
    inputs = keras.Input((STEPS, FEATURES))
    model = keras.Model(inputs, layers.Attention()([inputs, inputs], use_causal_mask=True))
    np.testing.assert_allclose(_expanded(model)(x), model(x), rtol=2e-4, atol=2e-4)
    qat = kqat.quantize_model(model, calibration_data=x)
    with pytest.raises(kqat.FreezeError, match=r"spread less than 1024.*'attention.*hidden_quant"):
        kqat.freeze(qat)


def test_a_masked_loss_is_told_of_where_layers_make_the_mask() -> None:
    x = keras.Input((STEPS, FEATURES))
    y = layers.Dense(3, name="logits")(layers.Masking()(layers.Dense(4, "relu")(x)))
    data = np.random.default_rng(0).normal(size=(16, STEPS, FEATURES)).astype(np.float32)
    with pytest.warns(kqat.TrainerWarning, match="leaves masked steps out of its losses"):
        kqat.quantize_model(keras.Model(x, y), calibration_data=data)


def test_layers_that_pass_a_mask_by_are_no_hindrance() -> None:
    def call(x: Any) -> Any:
        x = layers.TimeDistributed(layers.Dense(4))(layers.Lambda(lambda t: 2.0 * t)(x))
        return layers.Flatten()(x)

    assert kqat.plan(_embedded(call)).float_layers() == ()


def test_truth_values_become_quantities() -> None:
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    rows = layers.Embedding(10, FEATURES)(tokens)
    shown = ops.expand_dims(ops.cast(ops.not_equal(tokens, 0), "float32"), -1)
    outputs = layers.Dense(3)(layers.GlobalMaxPooling1D()(ops.multiply(rows, shown)))
    model, data = keras.Model(tokens, outputs), _tokens()
    frozen = kqat.freeze(kqat.quantize_model(model, calibration_data=data))
    report = tflite_export.verify(frozen, tflite_export.convert(frozen), data)
    assert report.is_full_integer
    assert all(r.problem is None and r.max_steps <= 1 for r in report.runtimes)


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "quantities": (
        lambda x: layers.MultiHeadAttention(2, 4, name="mha")(
            x, x, attention_mask=layers.Dense(STEPS)(x)
        ),
        kqat.UnsupportedLayerError,
        r"boolean masks in attention layer 'mha'.*shape \(None, 6, 6\) and type float32",
    ),
}


@pytest.mark.parametrize(("layer", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_other_masks_are_refused_by_name(
    layer: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kqat.plan(_embedded(layer))


def test_a_float_layer_with_a_mask_is_refused_too() -> None:
    with pytest.raises(kqat.ModelError, match="a mask for layer 'lstm'"):
        kqat.plan(_embedded(layers.LSTM(3, name="lstm")), {"lstm": None})
