"""A weight that several layers read is one variable in training, on one grid."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
from kqat.base import ModelError
from kqat.parts import TiedWeight

ROWS, WIDTH, STEPS = 12, 6, 4
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, ROWS, (32, STEPS)).astype(np.int32)
X = RNG.normal(size=(32, WIDTH)).astype(np.float32)


class Head(L.Layer):
    """Scores by the table of an embedding."""

    def __init__(self, table: Any, bias: str | None = "zeros", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table, self.bias_initializer = table, bias

    def build(self, input_shape: Any) -> None:
        if self.bias_initializer:
            self.bias = self.add_weight(shape=(ROWS,), initializer=self.bias_initializer)

    def call(self, x: Any) -> Any:
        y = ops.matmul(x, ops.transpose(self.table.embeddings))
        return y + self.bias if self.bias_initializer else y

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "table": self.table, "bias": self.bias_initializer}


class Equation(Head):
    def call(self, x: Any) -> Any:
        return ops.einsum("btd,vd->btv", x, self.table.embeddings) + self.bias


class Decoder(L.Layer):
    """The transposed kernel of a Dense, with a bias of its own."""

    def __init__(self, encoder: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder = encoder

    def build(self, input_shape: Any) -> None:
        self.bias = self.add_weight(shape=(self.encoder.kernel.shape[0],), initializer="zeros")

    def call(self, x: Any) -> Any:
        return ops.matmul(x, ops.transpose(self.encoder.kernel)) + self.bias


class Positions(L.Layer):
    """Adds a table, and rows of it."""

    def build(self, input_shape: Any) -> None:
        self.table = self.add_weight(shape=(STEPS, WIDTH), initializer="zeros", name="table")

    def call(self, x: Any, places: Any) -> Any:
        return ops.tanh(x * self.table + self.table) + ops.take(self.table, places, axis=0)


class Token(L.Layer):
    """A token before all steps, and behind them the sum that carries it past."""

    def __init__(self, factor: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, input_shape: Any) -> None:
        self.token = self.add_weight(shape=(1, 1, WIDTH), initializer="normal", name="token")

    def call(self, x: Any) -> Any:
        token = ops.tile(self.token, (ops.shape(x)[0], 1, 1))
        y = ops.mean(ops.tanh(ops.concatenate([token, x], axis=1)), axis=1, keepdims=True)
        return y * self.token if self.factor else y + token


class Own(L.Layer):
    def build(self, input_shape: Any) -> None:
        self.w = self.add_weight(shape=(WIDTH, WIDTH), name="w")
        self.b = self.add_weight(shape=(WIDTH,), name="b", initializer="zeros")

    def call(self, x: Any) -> Any:
        return ops.matmul(x, self.w) + self.b


class Around(L.Layer):
    """Calls one layer twice."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.own = Own()

    def call(self, x: Any) -> Any:
        return self.own(ops.tanh(self.own(x)))


class Autoencoder(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="autoencoder")
        self.encoder = L.Dense(4, name="encoder")

    def call(self, x: Any) -> Any:
        return ops.matmul(self.encoder(x), ops.transpose(self.encoder.kernel))


def table(**options: Any) -> Any:
    return L.Embedding(ROWS, WIDTH, name="table", **options)


def language_model(head: Callable[[Any], Any], embedding: Any = None) -> keras.Model:
    ids, rows = keras.Input((STEPS,), dtype="int32", name="ids"), embedding or table()
    return keras.Model(ids, head(rows)(L.Dense(WIDTH, activation="relu")(rows(ids))))


def reversible(**options: Any) -> keras.Model:
    embedding = L.ReversibleEmbedding(ROWS, WIDTH, name="table", **options)
    return language_model(lambda rows: lambda x: rows(x, reverse=True), embedding)


def two_heads() -> keras.Model:
    ids, rows = keras.Input((STEPS,), dtype="int32"), table()
    first, second = Head(rows, "normal"), Head(rows, "normal")
    return keras.Model(ids, first(rows(ids)) + second(ops.relu(rows(ids))))


def twins() -> keras.Model:
    """Two tables of equal numbers, of which a head reads one."""
    draw = keras.initializers.RandomNormal(seed=1)
    ids, rows = keras.Input((STEPS,), dtype="int32"), table(embeddings_initializer=draw)
    other = L.Embedding(ROWS, WIDTH, embeddings_initializer=draw)
    return keras.Model(ids, Head(rows)(rows(ids) + other(ids)))


def positions() -> keras.Model:
    ids, places = (keras.Input((STEPS,), dtype="int32", name=n) for n in ("ids", "places"))
    layer = Positions(name="positions")
    model = keras.Model([ids, places], layer(table()(ids), places))
    layer.table.assign(RNG.normal(size=(STEPS, WIDTH)))
    return model


def of_steps(*layers: Any) -> keras.Model:
    x = keras.Input((STEPS, WIDTH))
    return keras.Model(x, functools.reduce(lambda y, layer: layer(y), layers, x))


def of_vectors(*layers: Any) -> keras.Model:
    return keras.Sequential([keras.Input((WIDTH,)), *layers])


def decoder() -> keras.Model:
    encoder = L.Dense(4, activation="tanh", name="encoder")
    return of_vectors(encoder, Decoder(encoder, name="decoder"))


def called_twice() -> keras.Model:
    own = Own(name="own")
    return of_vectors(own, L.ReLU(), own, L.Dense(2))


class Bent(L.Layer):
    """A product with what is computed from a weight."""

    def build(self, input_shape: Any) -> None:
        self.w = self.add_weight(shape=(WIDTH, WIDTH), initializer="normal")

    def call(self, x: Any) -> Any:
        return ops.matmul(x, ops.tanh(self.w))


def computed_twice() -> keras.Model:
    bent = Bent()
    return of_vectors(bent, L.ReLU(), bent)


def within_time() -> keras.Model:
    """One Dense, called alone and step by step."""
    x, dense = keras.Input((STEPS, WIDTH)), L.Dense(WIDTH)
    return keras.Model(x, dense(L.ReLU()(L.TimeDistributed(dense)(x))))


def in_a_function() -> keras.Model:
    x, dense = keras.Input((WIDTH,)), L.Dense(WIDTH)
    return keras.Model(x, L.Lambda(lambda t: ops.matmul(t, dense.kernel))(dense(x)))


def subclassed() -> keras.Model:
    model = Autoencoder()
    model(X[:1])
    return model


class Inside(L.Layer):
    """An embedding and what reads its table, in one layer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows, self.dense = table(), L.Dense(WIDTH, activation="relu")

    def call(self, ids: Any) -> Any:
        return ops.matmul(self.dense(self.rows(ids)), ops.transpose(self.rows.embeddings))


def inside() -> keras.Model:
    ids = keras.Input((STEPS,), dtype="int32")
    return keras.Model(ids, Inside(name="inside")(ids))


# What makes a model, and how many layers hold a weight that is put to several uses.
KINDS: dict[str, tuple[Callable[[], keras.Model], int]] = {
    "head": (lambda: language_model(Head), 1),
    "head without a bias": (lambda: language_model(lambda rows: Head(rows, None)), 1),
    "equation": (lambda: language_model(Equation), 1),
    "reversible": (reversible, 1),
    "reversible, capped": (lambda: reversible(logit_soft_cap=2.0), 1),
    "two heads": (two_heads, 1),
    "equal numbers elsewhere": (twins, 1),
    "positions": (positions, 1),
    "decoder": (decoder, 1),
    "token": (lambda: of_steps(Token()), 1),
    "token as a factor": (lambda: of_steps(Token(factor=True)), 1),
    "subclassed": (subclassed, 1),
    "inside a layer": (inside, 1),
    "layer called twice": (called_twice, 0),
    "computed weight, called twice": (computed_twice, 0),
    "layer called twice inside": (lambda: of_vectors(Around(), L.Dense(2)), 0),
    "within TimeDistributed": (within_time, 0),
    "function": (in_a_function, 1),
}


def data_of(model: keras.Model) -> Any:
    inputs = getattr(model, "inputs", [])  # A subclassed model has none.
    if len(inputs) == 2:
        return [IDS, IDS % STEPS]
    if inputs and inputs[0].dtype == "int32":
        return IDS
    return np.stack([X] * STEPS, axis=1) if inputs and len(inputs[0].shape) == 3 else X


@pytest.mark.parametrize("kind", KINDS)
def test_one_variable_is_trained_by_all_uses(kind: str) -> None:
    keras.utils.set_random_seed(0)
    build, tied = KINDS[kind]
    model = build()
    before = [np.array(weight) for weight in model.weights]
    qat = kqat.quantize_model(model, calibration_data=data_of(model))
    # Biases that are added behind a product were none of its own, so there may be fewer. A weight
    # that is put to several uses has no axes of one before the others.
    sizes, own = (
        sorted(tuple(n for n in v.shape if n > 1) for v in m.trainable_variables)
        for m in (qat, model)
    )
    assert sizes == own
    held = [q.layer for q in qat.layers if isinstance(q, kqat.QuantizeWrapper)]
    assert sum(isinstance(layer, TiedWeight) for layer in held) == tied
    data = data_of(model)
    np.testing.assert_allclose(kqat.strip(qat)(data), model(data), rtol=1e-5, atol=1e-6)
    for weight, numbers in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, numbers)  # The float model is as it was.


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(
    "kind", ["head", "decoder", "function", "layer called twice", "computed weight, called twice"]
)
def test_mixed_precision_ties_the_same(kind: str, precision: str) -> None:
    full = kqat.plan(KINDS[kind][0]())
    keras.config.set_dtype_policy(precision)
    plan = kqat.plan(KINDS[kind][0]())
    kinds = [
        [(layer.kind, layer.weights) for layer in one.layers if layer.kind != "Identity"]  # A cast.
        for one in (full, plan)
    ]
    assert kinds[0] == kinds[1]
    assert len(plan.tied) == len(full.tied) == 1


def test_both_uses_move_the_variable() -> None:
    model = language_model(lambda rows: Head(rows, None))
    qat = kqat.quantize_model(model, calibration_data=IDS)
    (wrapper,) = (q for q in qat.layers if isinstance(getattr(q, "layer", None), TiedWeight))
    before = np.array(wrapper.layer.kernel)
    qat.compile("sgd", "mse")
    qat.fit(np.zeros_like(IDS), np.ones((32, STEPS, ROWS)), epochs=1, verbose=0)
    # Its first row is looked up alone; products read all of them.
    assert (np.any(before != np.array(wrapper.layer.kernel), axis=1)).all()


def test_rows_and_products_have_one_grid() -> None:
    qat = kqat.quantize_model(language_model(Head), policy="w4a8", calibration_data=IDS)
    (wrapper,) = (q for q in qat.layers if isinstance(getattr(q, "layer", None), TiedWeight))
    assert wrapper.weight_specs["kernel"].axis is None
    kernel = np.array(wrapper.rounded("kernel"))
    rows = np.asarray(wrapper(IDS, use="rows"))
    np.testing.assert_array_equal(rows, kernel[IDS])
    eye = np.eye(WIDTH, dtype=np.float32)
    products = np.asarray(wrapper(eye, use="transposed"))
    np.testing.assert_allclose(products, kernel.T, rtol=1e-6)
    assert len(np.unique(np.rint(kernel / np.array(wrapper.scale("kernel"))))) <= 15


def test_a_regularizer_is_kept_once() -> None:
    model = language_model(Head, table(embeddings_regularizer=keras.regularizers.L2(0.5)))
    qat = kqat.quantize_model(model, calibration_data=IDS)
    qat(IDS, training=True)
    assert len(qat.losses) == 1
    np.testing.assert_allclose(float(qat.losses[0]), float(model.losses[0]), rtol=0.05)


class Parts(L.Layer):
    """Reads parts of a weight, or what it computes of it: `call` gets it after the input."""

    def __init__(self, shape: Any, function: Callable[..., Any], initializer: str) -> None:
        super().__init__(name="parts")
        self.shape, self.function, self.initializer = shape, function, initializer

    def build(self, input_shape: Any) -> None:
        self.w = self.add_weight(shape=self.shape, name="w", initializer=self.initializer)

    def call(self, x: Any) -> Any:
        return self.function(x, self.w)


def _columns(x: Any, w: Any) -> Any:
    a, b = w[:, :WIDTH], w[:, WIDTH:]
    return ops.tanh(ops.matmul(x, a)) + ops.matmul(x, b)


def _split(x: Any, w: Any) -> Any:
    a, b = ops.split(w, 2, axis=-1)
    return ops.tanh(ops.matmul(x, a)) + ops.matmul(x, b)


def _stacked(x: Any, w: Any) -> Any:
    return ops.tanh(x * w[0]) + w[1]


def _overlapping(x: Any, w: Any) -> Any:
    return ops.tanh(x + w[:1]) + ops.sum(w, axis=0)


def _unlike(x: Any, w: Any) -> Any:
    """Equal now, but of other options."""
    near, far = (ops.exp(ops.clip(w, -end, end)) for end in (5.0, 6.0))
    return ops.tanh(x * near) + x * far


def _fused(x: Any, w: Any) -> Any:
    """The weighted sum of EfficientDet's feature pyramids."""
    w = ops.relu(w)
    return (w[0] * x + w[1] * ops.tanh(x)) / (ops.sum(w) + 1e-4)


def _softened(x: Any, w: Any) -> Any:
    return ops.softplus(w * x) / w


@pytest.mark.parametrize("initializer", ["normal", "ones"])
@pytest.mark.parametrize(
    ("shape", "function"),
    [((WIDTH, 2 * WIDTH), _columns), ((WIDTH, 2 * WIDTH), _split), ((2, WIDTH), _stacked)],
    ids=["columns", "split", "stacked"],
)
def test_parts_that_no_other_reads_train_as_the_weight_does(
    shape: Any, function: Callable[..., Any], initializer: str
) -> None:
    model = of_vectors(Parts(shape, function, initializer))
    with warnings.catch_warnings():
        warnings.simplefilter("error", kqat.TrainerWarning)
        qat = kqat.quantize_model(model, calibration_data=X)
    (weight,) = (np.asarray(v) for v in model.trainable_variables if v.path.endswith("parts/w"))
    count = sum(int(np.size(v)) for v in qat.trainable_variables)
    assert count == sum(int(np.size(v)) for v in model.trainable_variables)
    held = np.concatenate([np.asarray(v).reshape(-1) for v in qat.trainable_variables])
    assert np.isin(weight, held).all()
    want, got = (np.asarray(m(X)) for m in (model, qat))
    assert np.sum(want**2) > 100 * np.sum((want - got) ** 2)


class Whole(L.Layer):
    """Its weight is read once in each call."""

    width = WIDTH

    def build(self, input_shape: Any) -> None:
        self.w = self.add_weight(shape=(WIDTH, self.width), name="w", initializer="normal")

    def call(self, x: Any) -> Any:
        return ops.tanh(ops.matmul(x, self.w))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], WIDTH)


class Halves(Whole):
    """Its weight is read in two parts."""

    width = 2 * WIDTH

    def call(self, x: Any) -> Any:
        return _columns(x, self.w)


def test_the_steps_of_a_time_distributed_layer_train_one_weight() -> None:
    """Whether they read it whole or in parts, which train as the weight does."""

    def distributed(layer: Any) -> keras.Model:
        return keras.Sequential([keras.Input((3, STEPS, WIDTH)), L.TimeDistributed(layer)])

    x = np.random.default_rng(0).normal(size=(32, 3, STEPS, WIDTH)).astype(np.float32)
    for layer, count in ((Whole(), 1), (Halves(), 2)):
        model = distributed(layer)
        qat = kqat.quantize_model(model, calibration_data=x)
        assert [np.shape(v) for v in qat.trainable_variables] == [(WIDTH, WIDTH)] * count
        want, got = (np.asarray(m(x)) for m in (model, qat))
        assert np.sum(want**2) > 100 * np.sum((want - got) ** 2)


def _decays(x: Any, w: Any) -> Any:
    """The steps of a state space model: each computes the same of the weight."""
    state: Any = 0.0
    for _ in range(3):
        state = state * ops.exp(ops.sigmoid(x) * -ops.exp(w)) + x
    return state


def _decays_at_once(x: Any, w: Any) -> Any:
    state, rates = x, -ops.exp(w)
    for _ in range(3):
        state = state * ops.exp(ops.sigmoid(x) * rates) + x
    return state


def _squares(x: Any, w: Any) -> Any:
    return ops.tanh(ops.matmul(x, ops.square(w))) + ops.matmul(x, w)


@pytest.mark.parametrize("function", [_decays, _decays_at_once], ids=["in each step", "before"])
def test_what_steps_of_a_loop_compute_of_a_weight_is_one_weight(
    function: Callable[..., Any],
) -> None:
    model = of_vectors(Parts((WIDTH,), function, "normal"))
    qat = kqat.quantize_model(model, calibration_data=X)
    counts = [sum(int(np.size(v)) for v in m.trainable_variables) for m in (model, qat)]
    assert counts[0] == counts[1]
    want, got = (np.asarray(m(X)) for m in (model, qat))
    assert np.sum(want**2) > 100 * np.sum((want - got) ** 2)


@pytest.mark.parametrize(
    ("shape", "function", "count", "numbers"),
    [((), _softened, 2, 2), ((2,), _fused, 3, 3), ((WIDTH,), _unlike, 2, 2 * WIDTH)],
    ids=["inverse", "pyramid", "vectors"],
)
def test_weights_computed_of_a_weight_train_by_themselves_and_that_is_said(
    shape: Any, function: Callable[..., Any], count: int, numbers: int
) -> None:
    model = of_vectors(Parts(shape, function, "ones"))
    said = rf"(?s)parts/w' of model .*read as {count} weights that 'parts' computes.*by itself"
    with pytest.warns(kqat.TrainerWarning, match=said):
        qat = kqat.quantize_model(model, calibration_data=X)
    want, got = (np.asarray(m(X)) for m in (model, qat))
    assert np.sum(want**2) > 100 * np.sum((want - got) ** 2)
    sizes = [sum(int(np.size(v)) for v in m.trainable_variables) for m in (model, qat)]
    assert sizes[1] == sizes[0] - int(np.prod(shape)) + numbers


class Borrowed(L.Layer):
    """Reads a weight that a layer of another kind owns."""

    def __init__(self, owner: Any, weight: Callable[[Any], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.owner, self.weight = owner, weight

    def call(self, x: Any) -> Any:
        return ops.matmul(x, self.weight(self.owner))


def borrowed(owner: Any, weight: Callable[[Any], Any]) -> keras.Model:
    x = keras.Input((STEPS, WIDTH))
    return keras.Model(x, Borrowed(owner, weight, name="reader")(owner(x)))


def copied() -> keras.Model:
    """Python transposes the table when the model is built."""
    ids, rows = keras.Input((STEPS,), dtype="int32"), table()
    x = rows(ids)
    return keras.Model(ids, ops.matmul(x, ops.transpose(rows.embeddings)))


@pytest.mark.parametrize(
    ("build", "policy", "message"),
    [
        (
            lambda: of_vectors(Parts((2, WIDTH), _overlapping, "normal")),
            None,
            "'parts' reads twice.*reads a part",
        ),
        (  # Of a matrix; vectors are weights of their own.
            lambda: of_vectors(Parts((WIDTH, WIDTH), _squares, "normal")),
            None,
            "'parts' reads twice.*computed from it",
        ),
        (
            lambda: borrowed(L.Conv1D(WIDTH, 1, name="conv"), lambda conv: conv.kernel[0]),
            None,
            "'conv' and 'reader' read.*Conv1D, takes no grid of another layer",
        ),
        (
            lambda: borrowed(
                L.GRU(WIDTH, return_sequences=True, name="gru"), lambda gru: gru.cell.kernel
            ),
            None,
            "'gru' and 'reader' read.*splits it",
        ),
        (copied, None, "'matmul' holds a copy"),
        (lambda: language_model(Head), {"table": None}, "'table' stays float.*one config"),
        (lambda: language_model(Head), {"head": None}, "'head' stays float.*one config"),
        (lambda: language_model(Head), {"head": "w4a8"}, "two configs.*one config"),
        (
            lambda: language_model(
                lambda rows: lambda x: L.Rescaling(1.0)(Head(rows)(x)),
                table(embeddings_constraint="max_norm"),
            ),
            None,
            None,
        ),
    ],
    ids=[
        "parts",
        "functions",
        "convolution",
        "recurrence",
        "copy",
        "float table",
        "float head",
        "config",
        "constraint",
    ],
)
def test_what_one_grid_cannot_serve_is_named_before_training(
    build: Callable[[], keras.Model], policy: Any, message: str | None
) -> None:
    model = build()
    if message is None:
        kqat.plan(model)  # The rows of the constraint are those of the table.
        return
    with pytest.raises(ModelError, match=f"(?s){message}"):
        kqat.plan(model, policy=policy or "int8")


def test_what_does_not_train_apart_stays_as_it_is() -> None:
    frozen = language_model(Head, table(trainable=False))
    assert not any(layer.kind == "TiedWeight" for layer in kqat.plan(frozen).layers)
    # Layers of equal numbers, as those of a fresh BatchNormalization, are two layers.
    plan = kqat.plan(of_vectors(L.BatchNormalization(), L.ReLU(), L.BatchNormalization()))
    assert len({layer.name for layer in plan.layers if layer.kind == "BatchNormalization"}) == 2


def _language_model() -> keras.Model:
    words = keras.Input((STEPS,), dtype="int32")
    table = L.Embedding(ROWS, WIDTH, name="table")
    return keras.Model(words, Head(table, name="head")(L.Dense(WIDTH, name="mixed")(table(words))))


def test_copies_that_would_untie_weights_are_refused() -> None:
    """A layer's config hands on the layer that it reads, which then is there twice."""
    with pytest.raises(ModelError, match=r"share weights: its copy would train .*quantize_model"):
        kqat.adapt(_language_model(), calibration_data=IDS)
    words = keras.Input((STEPS,), dtype="int32")
    table = L.Embedding(ROWS, WIDTH, name="table")
    annotate = kqat.quantize_annotate_layer
    mixed = annotate(L.Dense(WIDTH))(annotate(table)(words))
    model = keras.Model(words, annotate(Head(table, name="head"))(mixed))
    with pytest.raises(ModelError, match=r"share weights.*with a policy"):
        kqat.quantize_apply(model, calibration_data=IDS)


class Flow(L.Layer):
    """One weight, and a sign by the way it is called."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(WIDTH, WIDTH))

    def call(self, x: Any, reverse: bool = False) -> Any:
        y = ops.tanh(ops.matmul(x, self.kernel))
        return x - y if reverse else x + y


@pytest.mark.parametrize("kind", ["two tables", "float flow", "float table"])
def test_both_ways_of_a_layer_that_need_no_grid_together(kind: str) -> None:
    if kind == "float flow":
        x, layer, data = keras.Input((WIDTH,)), Flow(name="both"), X
    else:
        x, data = keras.Input((STEPS,), dtype="int32"), IDS
        layer = L.ReversibleEmbedding(ROWS, WIDTH, tie_weights=kind != "two tables", name="both")
    y = layer(L.Dense(WIDTH)(layer(x)), reverse=True)
    model = keras.Model(x, y)
    policy = "int8" if kind == "two tables" else {"both": None}
    qat = kqat.quantize_model(model, policy, calibration_data=data)
    sizes = [sum(int(np.prod(v.shape)) for v in one.trainable_variables) for one in (qat, model)]
    assert sizes[0] == sizes[1]


def test_weights_that_nothing_tells_apart_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are known by their numbers, and float32 has not so many whole ones."""
    monkeypatch.setattr("kqat.planning.tied_weights._MOST_NUMBERS", 10)
    model = _language_model()
    model.get_layer("table").embeddings.assign(np.zeros((ROWS, WIDTH)))
    with pytest.raises(ModelError, match=r"numbers tell apart.*table/embeddings"):
        kqat.plan(model)


def test_a_computed_index_without_a_row_of_a_tied_table_is_named() -> None:
    """The trial of computed integers knew Embeddings alone."""
    words = keras.Input((STEPS,), dtype="int32")
    table = L.ReversibleEmbedding(ROWS, WIDTH, name="table")
    y = table(L.Dense(WIDTH)(table(ops.add(words, 3))), reverse=True)
    message = r"0 to 11 for 'table', which has 12 rows. Received: 1[2-4], computed"
    with pytest.raises(kqat.CalibrationError, match=message):
        kqat.quantize_model(keras.Model(words, y), calibration_data=IDS)


def same_kernel() -> keras.Model:
    """One kernel with a bias and without, behind other values."""
    x, dense = keras.Input((WIDTH,)), L.Dense(WIDTH, name="dense", bias_initializer="normal")
    again = L.Lambda(lambda t: ops.matmul(t, dense.kernel), name="again")
    return keras.Model(x, again(L.ReLU()(dense(x))))


def test_products_alone_have_a_scale_for_each_channel() -> None:
    """Rows and products with the matrix transposed have one scale with them."""
    for kind, axis in ((same_kernel, (-1,)), (decoder, None), (lambda: language_model(Head), None)):
        plan = kqat.plan(kind())
        calls = [p.weights["kernel"] for p in plan.layers if p.kind == "TiedWeight"]
        assert len(calls) == 2
        assert {spec.axis for spec in calls} == {axis}


def test_channels_of_unlike_size_keep_their_values_in_a_shared_kernel() -> None:
    keras.utils.set_random_seed(0)
    model = same_kernel()
    kernel = model.get_layer("dense").kernel
    kernel.assign(np.array(kernel) * 4.0 ** -np.arange(WIDTH))
    qat = kqat.quantize_model(model, calibration_data=X)
    (wrapper,) = (q for q in qat.layers if isinstance(getattr(q, "layer", None), TiedWeight))
    assert wrapper.scale("kernel").shape == (1, WIDTH)
    error = np.abs(np.array(wrapper.rounded("kernel")) - np.array(kernel)).max(axis=0)
    assert (error <= np.abs(np.array(kernel)).max(axis=0) / 127 * 0.501).all()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(wrapper))
    assert again.layer.products
