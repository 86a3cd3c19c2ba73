"""Masks go into custom layers and models inside and come out of them, as when Keras runs."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from kqat.graph.tracer import rebuild, trace
from kqat.planning.expansion import expand

STEPS, WORDS, WIDTH = 5, 9, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*does not support masking")


class Whole(layers.Layer):
    """A custom layer of the layers that a function makes; `call` runs another function of them."""

    def __init__(self, parts: list[Any], run: Callable[..., Any], **options: Any):
        super().__init__(**options)
        self.parts, self.run = parts, run

    def call(self, x: Any) -> Any:
        """What the function makes of the parts and the input."""
        return self.run(x, *self.parts)


class Masked(Whole):
    """The same, that hands its mask on."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.supports_masking = True


class Padding(Masked):
    """The same, that makes a mask of its input."""

    def compute_mask(self, x: Any, previous_mask: Any = None) -> Any:
        """All but zeros count."""
        return ops.not_equal(x, 0)


class Tokens(layers.Layer):
    """A custom layer that can be made anew, whose output bears the mask of a layer inside."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.table = _tokens()

    def call(self, x: Any) -> Any:
        """Rows."""
        return self.table(x)


class Foreign(Tokens):
    """The same, which cannot be traced."""

    def call(self, x: Any) -> Any:
        """Rows."""
        import tensorflow as tf

        return self.table(tf.bitwise.invert(x) * 0 + x)


class Recurs(layers.Layer):
    """A custom layer that can be made anew, in which a layer reads the mask."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.rnn = _rnn()

    def call(self, x: Any) -> Any:
        """States."""
        return self.rnn(x)


class Doubles(layers.Layer):
    """A custom layer that can be made anew, which drops masks."""

    def call(self, x: Any) -> Any:
        """Twice the input."""
        return x * 2.0


class Decodes(layers.Layer):
    """Gives attention the mask of a query that bears none, which Keras passes over."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.attention, self.supports_masking = _attention(), True

    def call(self, x: Any, mask: Any = None) -> Any:
        """What steps of the doubled input attend to."""
        return self.attention(x * 2.0, x, query_mask=mask, key_mask=mask)


class Block(keras.Model):
    """A subclassed model inside a model."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.rnn = layers.GRU(WIDTH, return_sequences=True)

    def call(self, x: Any) -> Any:
        """A recurrence."""
        return self.rnn(x)


def _attention() -> Any:
    return layers.MultiHeadAttention(2, 3)


def _rnn() -> Any:
    return layers.GRU(WIDTH, return_sequences=True)


def _added(x: Any, attention: Any, add: Any) -> Any:
    return add([x, attention(x, x)])


def _taken_off(x: Any) -> Any:
    mask = getattr(x, "_keras_mask", None)
    return x if mask is None else x * ops.cast(mask, x.dtype)[:, :, None]


def _nested(*inside: Any) -> Any:
    return keras.Sequential([keras.Input((STEPS, WIDTH)), *inside])


def _two_inputs(x: Any) -> Any:
    a, b = keras.Input((STEPS, WIDTH)), keras.Input((STEPS, WIDTH))
    inner = keras.Model([a, b], layers.Concatenate()([_rnn()(a), _rnn()(b)]))
    return inner([x, layers.Reshape((STEPS, WIDTH))(x)])


def _tokens() -> Any:
    return layers.Embedding(WORDS, WIDTH, mask_zero=True)


# What reads an embedded input with a mask.
INTO: dict[str, Callable[[Any], Any]] = {
    "attention": lambda x: Whole([_attention(), layers.Add()], _added)(x),
    "mask of a query without": lambda x: Decodes()(x),
    "recurrence": lambda x: Whole([layers.Dropout(0.1), _rnn()], lambda x, drop, rnn: rnn(drop(x)))(
        x
    ),
    "mask for those behind": lambda x: _rnn()(Whole([layers.Dropout(0.1)], lambda x, d: d(x))(x)),
    "hands its own on": lambda x: _rnn()(Masked([], lambda x: x * 2.0 + 1.0)(x)),
    "takes it off": lambda x: Masked([], _taken_off)(x),
    "layer inside": lambda x: Whole([Whole([_rnn()], lambda x, r: r(x))], lambda x, w: w(x))(x),
    "attention takes it away": lambda x: layers.Add()(
        [Whole([_attention()], lambda x, a: a(x, x))(x), _rnn()(x)]
    ),
    "Sequential": lambda x: _nested(layers.Dropout(0.1), _rnn())(x),
    "model in a model": lambda x: _nested(_nested(_rnn()), _rnn())(x),
    "model of two inputs": _two_inputs,
    "mask given to a model": lambda x: _nested(_rnn())(x, mask=ops.greater(x[:, :, 0], 0.0)),
    "subclassed model": lambda x: Block()(x),
}
# What makes a mask of words.
OUT_OF: dict[str, Callable[[], Any]] = {
    "table": lambda: Whole([_tokens()], lambda x, table: table(x)),
    "table that hands masks on": lambda: Masked([_tokens()], lambda x, table: table(x)),
    "dropped table": lambda: Whole(
        [_tokens(), layers.Dropout(0.1)], lambda x, table, drop: drop(table(x))
    ),
    "mask of its own": lambda: Padding([layers.Embedding(WORDS, WIDTH)], lambda x, table: table(x)),
    "model": lambda: keras.Sequential([keras.Input((STEPS,), dtype="int32"), _tokens()]),
}
# The others run whenever anything is tested.
QUICK = (
    "mask of a query without",
    "recurrence",
    "hands its own on",
    "takes it off",
    "mask for those behind",
    "Sequential",
)


def _words(samples: int = 16) -> np.ndarray:
    words = np.random.default_rng(0).integers(1, WORDS, (samples, STEPS)).astype(np.int32)
    words[::2, 3:] = 0
    words[1::4, 0] = 0
    return words


def _model(make: Callable[[Any], Any], table: Any = None) -> keras.Model:
    x = keras.Input((STEPS,), dtype="int32", name="words")
    model = keras.Model(x, layers.Flatten()(make((table or _tokens())(x))), name="net")
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(generator.normal(size=weight.shape, scale=0.5))
    return model


def _check(model: keras.Model) -> None:
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    expanded = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    words, without = _words(), _words() + (_words() == 0)
    expected = model(words)
    np.testing.assert_allclose(expanded(words), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(model(without) - expected)).max() > 1e-3


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in INTO]
)
def test_masks_go_into_layers_and_models(name: str) -> None:
    """Layers inside read them off their inputs, though nothing hands them over."""
    _check(_model(INTO[name]))


@pytest.mark.parametrize("name", OUT_OF)
def test_masks_come_out_of_layers_and_models(name: str) -> None:
    _check(_model(layers.LSTM(3), OUT_OF[name]()))


@pytest.mark.parametrize("doubled", [False, True], ids=["of a layer", "of an operation"])
def test_a_mask_is_made_and_read_inside_one_layer(doubled: bool) -> None:
    """A layer inside gives it to what another layer, or an operation, returns."""
    padded = Padding(
        [layers.Embedding(WORDS, WIDTH)], lambda x, table: table(x) * 2.0 if doubled else table(x)
    )
    parts = [padded, _attention(), layers.Add()]
    _check(_model(lambda x: x, Whole(parts, lambda x, pad, *parts: _added(pad(x), *parts))))


def _moves_its_batch(x: Any, padded: Any, attention: Any, add: Any) -> Any:
    steps = ops.reshape(padded(x), (-1, 1, WIDTH))
    return _added(padded(x), attention, add) + ops.reshape(steps * 2.0, (-1, STEPS, WIDTH))


def test_a_mask_made_inside_a_layer_that_moves_its_batch_is_refused() -> None:
    padded = Padding([layers.Embedding(WORDS, WIDTH)], lambda x, table: table(x) * 2.0)
    with pytest.raises(kqat.UnsupportedLayerError, match="in which layers read a mask"):
        kqat.plan(
            _model(lambda x: x, Whole([padded, _attention(), layers.Add()], _moves_its_batch))
        )


@pytest.mark.slow
def test_a_layer_that_stays_as_it_is_hands_its_mask_on() -> None:
    model = _model(layers.LSTM(3), Tokens(name="own"))
    qat = kqat.quantize_model(model, {"own": None}, calibration_data=_words())
    np.testing.assert_allclose(qat(_words()), model(_words()), atol=0.05)


def _gated(x: Any) -> Any:
    """What squeeze-and-excitation makes of a sequence."""
    gate = layers.Dense(WIDTH, activation="sigmoid")(layers.GlobalAveragePooling1D()(x))
    return layers.Multiply(name="gated")([x, layers.Reshape((1, WIDTH))(gate)])


def _merged(kind: type, *masked: bool) -> keras.Model:
    """Sequences with masks of their own, or none, that are merged; their mean reads a mask."""
    x = keras.Input((STEPS,), dtype="int32", name="words")
    orders = (x, ops.maximum(x - 3, 0), ops.maximum(5 - x, 0))
    tables = [layers.Embedding(WORDS, WIDTH, mask_zero=m) for m in masked]
    merged = kind(name="merge")([t(o) for t, o in zip(tables, orders, strict=False)])
    model = keras.Model(x, layers.GlobalAveragePooling1D()(merged), name="net")
    for table in tables:  # Far from what stands in for a masked step.
        table.embeddings.assign(table.embeddings * 40)
    return model


MERGES = (layers.Multiply, layers.Maximum, layers.Minimum)
MERGED: dict[str, Callable[[], keras.Model]] = {
    "gate": lambda: _model(_gated),
    "gate in a layer": lambda: _model(Whole([layers.Multiply()], lambda x, m: m([x, x[:, :1]]))),
    "merge in a model": lambda: _model(lambda x: _nested(Whole([layers.Maximum()], _of_two))(x)),
    **{f"{kind.__name__} of two": lambda k=kind: _merged(k, True, True) for kind in MERGES},
    "Maximum of first": lambda: _merged(layers.Maximum, True, False),
    "Minimum of last": lambda: _merged(layers.Minimum, False, True),
    "Multiply of three": lambda: _merged(layers.Multiply, True, False, True),
    "Maximum of three": lambda: _merged(layers.Maximum, True, True, True),
}


def _of_two(x: Any, merge: Any) -> Any:
    return merge([ops.flip(x, 1) * 2.0, x])


@pytest.mark.parametrize("name", MERGED)
def test_merges_pass_over_what_masks_hide(name: str) -> None:
    """Keras's Multiply, Maximum and Minimum take masks off the values that they merge."""
    _check(MERGED[name]())


def test_a_merge_that_stays_as_it_is_and_reads_a_mask_is_refused() -> None:
    """And not one without masks."""
    with pytest.raises(kqat.ModelError, match="a mask for layer 'merge' of type Maximum, which"):
        kqat.plan(_merged(layers.Maximum, True, True), {"merge": None})
    plan = kqat.plan(_merged(layers.Maximum, False, False), {"merge": None})
    assert plan.float_layers() == ("merge",)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gate", "Multiply of three", "Minimum of two"])
def test_the_file_of_masked_merges_is_right(name: str) -> None:
    model = MERGED[name]()
    qat = kqat.quantize_model(model, calibration_data=_words())
    noise = np.asarray(qat(_words()) - model(_words()))
    assert np.std(noise) < 0.04 * np.std(np.asarray(model(_words())))
    report = tflite_export.verify(qat, tflite_export.convert(qat), _words())
    assert all(r.is_right and r.exact and r.exact.is_exact for r in report.runtimes), report


def test_a_layer_that_stays_as_it_is_and_reads_a_mask_is_refused() -> None:
    """Not one that leaves it alone."""
    with pytest.raises(kqat.ModelError, match="a mask for layer 'own' of type Recurs, which stays"):
        kqat.plan(_model(Recurs(name="own")), {"own": None})
    model = _model(lambda x: layers.Dense(2)(Doubles(name="own")(x)))
    assert kqat.plan(model, {"own": None}).float_layers() == ("own",)


def test_a_mask_that_cannot_be_followed_is_refused_where_it_is_read() -> None:
    """Of a layer that can be opened, and of one that cannot and stays as it is."""
    flags = layers.Embedding(2, WIDTH, mask_zero=True)

    def made_by_a_layer(x: Any, table: Any, flags: Any) -> Any:
        return flags(ops.argmax(table(x), axis=-1))

    found = (
        (Whole([layers.Embedding(WORDS, 2), flags], made_by_a_layer, name="own"), {}),
        (Foreign(name="own"), {"own": None}),
    )
    for table, policy in found:
        with pytest.raises(
            kqat.ModelError, match=r"model inside the model, 'own', and cannot .* 'rnn' reads it"
        ):
            kqat.plan(_model(layers.LSTM(3, name="rnn"), table), policy)
        kqat.plan(_model(layers.Dense(2), table), policy)


@pytest.mark.slow
def test_the_file_of_a_masked_block_is_right() -> None:
    model = _model(
        lambda x: layers.GlobalAveragePooling1D()(INTO["attention"](x)),
        Whole([_tokens()], lambda x, table: table(x)),
    )
    qat = kqat.quantize_model(model, calibration_data=_words())
    report = tflite_export.verify(qat, tflite_export.convert(qat), _words())
    assert all(r.is_right and r.exact and r.exact.is_exact for r in report.runtimes), report


def test_a_mask_that_a_call_sets_is_read() -> None:
    """ReversibleEmbedding has no `compute_mask`: no symbolic call shows its mask."""
    ids = keras.Input((STEPS,), dtype="int32")
    table = layers.ReversibleEmbedding(WORDS, WIDTH, mask_zero=True)
    model = keras.Model(ids, layers.GlobalAveragePooling1D()(table(ids)))
    words = np.array([[1, 2, 0, 0, 0], [3, 0, 4, 5, 0]], np.int32)
    parts, _ = expand(trace(model), lambda node: False, "parts")
    run = rebuild(parts, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "parts")
    np.testing.assert_allclose(run(words), model(words), rtol=1e-6, atol=1e-6)


def test_scores_of_rows_read_quantities() -> None:
    """Called backwards alone, a ReversibleEmbedding looks nothing up."""
    table = layers.ReversibleEmbedding(WORDS, WIDTH)
    table.build((None, STEPS))
    x = keras.Input((STEPS, WIDTH))
    graph = trace(keras.Model(x, table(x, reverse=True)))
    assert graph.inputs[0].dtype == "float32"
