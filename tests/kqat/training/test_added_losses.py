"""Losses that calls add: the QAT model adds what the float model does, and no file changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from kqat.graph import losses_noted, trace
from kqat.training import call_unrounded, weight_penalties

WIDTH = 8
X = np.random.default_rng(0).uniform(-1, 1, (64, WIDTH)).astype(np.float32)


class Latent(layers.Layer):
    """The divergence of an autoencoder: of two values, and divided by the batch size."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean, self.spread = layers.Dense(3), layers.Dense(3)
        self.back = layers.Dense(WIDTH)

    def call(self, x: Any) -> Any:
        mean, spread = self.mean(x), self.spread(x)
        parts = 1 + spread - ops.square(mean) - ops.exp(spread)
        self.add_loss(-0.5 * ops.sum(parts) / ops.cast(ops.shape(x)[0], "float32"))
        return self.back(mean)


class Experts(layers.Layer):
    """The balance of a mixture of experts: of indexes, too."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gate = layers.Dense(2, activation="softmax")
        self.experts = [layers.Dense(WIDTH, activation="relu") for _ in range(2)]

    def call(self, x: Any) -> Any:
        gate = self.gate(x)
        chosen = ops.one_hot(ops.argmax(gate, axis=-1), 2)
        self.add_loss(2 * ops.sum(ops.mean(chosen, axis=0) * ops.mean(gate, axis=0)))
        first, second = (expert(x) for expert in self.experts)
        return gate[:, :1] * first + gate[:, 1:] * second


class Codebook(layers.Layer):
    """The nearest of some vectors, as VQ-VAE takes it; the batch is not first inside."""

    def __init__(self, trained: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trained = trained

    def build(self, shape: Any) -> None:
        options = {"initializer": "random_normal", "trainable": self.trained}
        self.codes = self.add_weight(shape=(4, 6), name="codes", **options)

    def call(self, x: Any) -> Any:
        rows = ops.reshape(x, (-1, 4))
        squares = ops.sum(rows**2, axis=1, keepdims=True) + ops.sum(self.codes**2, axis=0)
        nearest = ops.argmin(squares - 2 * ops.matmul(rows, self.codes), axis=1)
        found = ops.matmul(ops.one_hot(nearest, 6), ops.transpose(self.codes))
        found = ops.reshape(found, ops.shape(x))
        self.add_loss(0.25 * ops.mean(ops.square(ops.stop_gradient(found) - x)))
        self.add_loss(ops.mean(ops.square(found - ops.stop_gradient(x))))
        return x + ops.stop_gradient(found - x)


class Transcript(layers.Layer):
    """The loss of Keras's example of captchas, which is given lengths for each sample."""

    def call(self, x: Any) -> Any:
        every = ops.ones((ops.shape(x)[0],), "int32")
        labels = ops.broadcast_to(ops.convert_to_tensor([[1, 2]]), (ops.shape(x)[0], 2))
        self.add_loss(ops.mean(ops.ctc_loss(labels, x, 2 * every, 4 * every)))
        return x


class Penalized(layers.Layer):
    """Two losses of what it makes, one of a part of it; with or without them."""

    def __init__(self, adds: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.adds, self.dense = adds, layers.Dense(WIDTH)

    def call(self, x: Any) -> Any:
        y = ops.relu(self.dense(x))
        if self.adds:
            self.add_loss(0.1 * ops.mean(ops.abs(y)))
            self.add_loss([ops.mean(ops.square(ops.reshape(y, (-1, 2, 4))[:, 0]))])
        return y


class Elementwise(layers.Layer):
    """A function of each number, which ships as a table."""

    def call(self, x: Any) -> Any:
        y = x * ops.sigmoid(x) + 0.1 * ops.tanh(x)
        self.add_loss(ops.mean(ops.abs(y)))
        return y


class Head(layers.Layer):
    """A layer that the loss alone reads."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense, self.head = layers.Dense(WIDTH), layers.Dense(3)

    def call(self, x: Any) -> Any:
        y = self.dense(x)
        self.add_loss(ops.mean(ops.square(self.head(y))))
        return y


class OwnWeight(layers.Layer):
    def build(self, shape: Any) -> None:
        more = {"initializer": "random_normal", "regularizer": keras.regularizers.L2(0.1)}
        self.kernel = self.add_weight(shape=(shape[-1], WIDTH), **more)
        self.factor = self.add_weight(shape=(WIDTH,), **more)
        self.shift = self.add_weight(shape=(2, WIDTH // 2), **more)

    def call(self, x: Any) -> Any:
        y = ops.tanh(ops.matmul(x, self.kernel)) * self.factor
        return ops.reshape(ops.reshape(y, (-1, 2, WIDTH // 2)) + self.shift, (-1, WIDTH))


class Doubled(layers.Dense):
    def call(self, x: Any) -> Any:
        return super().call(x) * 2.0


class Own(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="own")
        self.inner, self.last = Penalized(name="pen"), layers.Dense(2)

    def call(self, x: Any) -> Any:
        y = self.inner(x)
        self.add_loss(ops.mean(ops.square(y)))
        return self.last(y)


def _chain(*parts: Any, shape: tuple[int, ...] = (WIDTH,)) -> keras.Model:
    x = inputs = keras.Input(shape)
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


def _own() -> keras.Model:
    model = Own()
    model(X)
    return model


def _shared() -> keras.Model:
    layer, inner = Penalized(), _chain(Penalized(), layers.Dense(WIDTH))
    stock = layers.Dense(WIDTH, "relu", activity_regularizer="l2", kernel_regularizer="l2")
    return _chain(layer, inner, layer, stock, inner, stock)


def _rows(*parts: Any) -> keras.Model:
    return _chain(layers.Reshape((4, 2)), *parts)


L2 = {"activity_regularizer": "l2", "kernel_regularizer": "l2"}
MODELS: dict[str, Callable[[], keras.Model]] = {
    "divergence": lambda: _chain(Latent()),
    "balance": lambda: _chain(Experts()),
    "codebook": lambda: _chain(layers.Dense(WIDTH), layers.Reshape((2, 4)), Codebook()),
    "lengths of each sample": lambda: _rows(layers.Dense(3, "softmax"), Transcript()),
    "called twice": _shared,
    "subclassed model": _own,
    "subclassed model inside": lambda: _chain(layers.Dense(WIDTH), _own()),
    "table": lambda: _chain(layers.Dense(WIDTH), Elementwise(), layers.Dense(2)),
    "head": lambda: _chain(Head()),
    "penalty of a custom layer": lambda: _chain(OwnWeight(activity_regularizer="l2")),
    "penalty of a subclass": lambda: _chain(Doubled(3, **L2)),
    "stock": lambda: _chain(
        layers.Dense(WIDTH, "silu", **L2),
        layers.Dense(WIDTH, "relu", **L2),
        layers.LayerNormalization(activity_regularizer="l1", gamma_regularizer="l2"),
        layers.Softmax(activity_regularizer="l2"),
    ),
    "rows": lambda: _rows(
        layers.SeparableConv1D(2, 3, activity_regularizer="l2", depthwise_regularizer="l2"),
        layers.Conv1DTranspose(3, 2, **L2),
        layers.GroupNormalization(1, activity_regularizer="l2"),
        layers.EinsumDense("abc,cd->abd", (None, 3), activation="gelu", **L2),
        layers.LSTM(3, **L2),
    ),
    # Keras adds no penalty of what the inner layer makes.
    "TimeDistributed": lambda: _rows(layers.TimeDistributed(layers.Dense(3, **L2))),
}


def _losses(model: keras.Model) -> float:
    model(X)
    return float(sum(float(np.sum(loss)) for loss in model.losses))


FAST = ("divergence", "codebook", "stock")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in MODELS]
)
def test_what_a_qat_model_adds_is_what_the_float_model_adds(kind: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    model = MODELS[kind]()
    qat = kqat.quantize_model(model, calibration_data=X)
    wanted = _losses(model)
    assert wanted > 0
    # With nothing rounded, float for float.
    graph = trace(qat)
    with losses_noted() as found:
        outputs, read = graph.run_with_losses([X], call_unrounded)
        for loss, values in zip(graph.losses, read, strict=True):
            loss.layer([outputs, *values])
    unrounded = sum(float(np.sum(value)) for _, value in found) + weight_penalties(qat)
    np.testing.assert_allclose(unrounded, wanted, rtol=1e-5)
    # Rounded, by what eight bits lose.
    np.testing.assert_allclose(_losses(qat), wanted, rtol=0.03)

    path = tmp_path / "qat.keras"
    qat.save(path)
    loaded = keras.saving.load_model(path)
    stripped = kqat.strip(qat)
    targets = np.zeros((len(X), *qat.output_shape[1:]), np.float32)
    results = []
    for one in (model, qat, loaded, stripped):
        one.compile(loss="mse", run_eagerly=True)  # One batch: a trace costs more.
        results.append(float(one.test_on_batch(X, targets)))
    np.testing.assert_allclose(results[1], results[0], rtol=0.03)
    assert results[2] == pytest.approx(results[1], rel=1e-6)
    assert results[3] == pytest.approx(results[0], rel=1e-5)
    assert stripped.output_names == qat.output_names
    counts = [sum(int(np.prod(v.shape)) for v in m.trainable_variables) for m in (model, stripped)]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_an_added_loss_trains_and_changes_no_file() -> None:
    files, layer = [], None
    for adds in (False, True):
        keras.utils.clear_session()  # Names of operations are numbered, and stand in files.
        keras.utils.set_random_seed(2)
        layer = Penalized(adds, name="pen")
        model = _chain(layer, layers.Dense(2, name="last"))
        qat = kqat.quantize_model(model, calibration_data=X)
        files.append(tflite_export.convert(qat))
    assert files[0] == files[1]
    report = tflite_export.verify(qat, files[1], X)
    assert report.is_full_integer and all(part.max_steps <= 1 for part in report.runtimes)
    before = _losses(qat)
    qat.compile(keras.optimizers.Adam(0.01), loss=lambda y, p: 0.0 * ops.mean(p, axis=-1))
    qat.fit(X, np.zeros((len(X), 2)), epochs=20, verbose=0)
    assert _losses(qat) < before / 2


class Lost(layers.Layer):
    """Losses that no graph can hold."""

    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind, self.seed = kind, keras.random.SeedGenerator(1)
        self.dense = layers.Dense(WIDTH, name="dense")
        if kind == "folded":
            self.norm = layers.BatchNormalization()

    def call(self, x: Any, training: bool = False) -> Any:
        y = self.dense(x)
        if self.kind == "training" and training:
            self.add_loss(ops.mean(y))
        if self.kind == "factor":
            self.add_loss((1.0 if training else 0.5) * ops.mean(ops.abs(y)))
        if self.kind == "random":
            noise = keras.random.normal(ops.shape(y), seed=self.seed)
            self.add_loss(ops.mean(ops.square(y - noise)))
        if self.kind == "weight":
            self.add_loss(ops.mean(ops.square(self.dense.kernel)))
        if self.kind == "folded":
            self.add_loss(ops.mean(ops.square(y)))
            y = self.norm(y)
        if self.kind == "again":
            self.add_loss(ops.mean(ops.square(self.dense(ops.tanh(y)))))
        self.add_loss(0.01 * ops.mean(ops.abs(y)))
        return y


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("training", "depends on `training`"),
        ("factor", "depends on `training`"),
        ("random", "random numbers are drawn"),
        ("weight", "let the layer that has them have a regularizer"),
        ("folded", "a BatchNormalization that is folded"),
        ("again", "depends on another call of 'dense'"),
    ],
)
def test_what_cannot_be_trained_is_told_with_its_reason(kind: str, said: str) -> None:
    layer = Lost(kind, name="lost")
    model = _chain(layer, layers.Dense(2))
    if kind == "folded":
        rng = np.random.default_rng(0)
        layer.norm.set_weights([rng.uniform(0.5, 2, WIDTH) for _ in range(4)])
    with pytest.warns(kqat.TrainerWarning, match="'lost' adds a loss in its call that") as warned:
        qat = kqat.quantize_model(model, calibration_data=X)
    texts = [str(w.message) for w in warned]
    assert len(texts) == 1 and said in texts[0], texts
    assert Path(warned[0].filename) == Path(__file__)
    # The other loss of the layer is trained, but where none is told from the other.
    qat(X)
    assert len(qat.losses) == (kind not in ("training", "factor"))


def test_penalties_that_no_layer_can_hold_are_told() -> None:
    class Scored(layers.Layer):
        def build(self, shape: Any) -> None:
            self.vector = self.add_weight(
                shape=(WIDTH,), initializer="random_normal", regularizer="l2"
            )

        def call(self, x: Any) -> Any:
            return x * ops.exp(self.vector)

    with pytest.warns(kqat.TrainerWarning, match="Regularizers of the weights of"):
        kqat.quantize_model(_chain(Scored()), calibration_data=X)


class Teacher(layers.Layer):
    """A part that is not to be trained by what stands behind it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.still, self.trained = layers.Dense(4, name="still"), layers.Dense(4, name="trained")

    def call(self, x: Any) -> Any:
        return self.trained(x) + ops.stop_gradient(self.still(x))


def test_a_codebook_whose_norms_would_not_follow_its_training_is_refused() -> None:
    model = _chain(layers.Reshape((2, 4)), Codebook(trained=True))
    with pytest.raises(kqat.ModelError, match=r"codes', which 'codebook.*trainable = False"):
        kqat.plan(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_gradient_that_is_stopped_stays_stopped(tmp_path: Path) -> None:
    qat = kqat.quantize_model(_chain(Teacher(), layers.Dense(2)), calibration_data=X)
    qat.save(tmp_path / "qat.keras")
    for one in (qat, keras.saving.load_model(tmp_path / "qat.keras"), kqat.strip(qat)):
        before = {v.path: np.array(v) for v in one.trainable_variables}
        one.compile("sgd", loss="mse", run_eagerly=one is not qat)  # A trace costs more.
        one.fit(X, np.ones((len(X), 2)), epochs=1, verbose=0)
        same = {v.path for v in one.trainable_variables if np.array_equal(v, before[v.path])}
        assert same == {path for path in before if "still" in path} and len(same) == 2
    assert tflite_export.inspect(tflite_export.convert(qat)).float_operators == 0


class Picky(Penalized):
    """It takes no samples in training that are beyond one."""

    def call(self, x: Any, training: bool = False) -> Any:
        if training and keras.ops.is_tensor(x) and np.max(np.abs(x)) > 1:
            raise ValueError("beyond one")
        return super().call(x)


def test_a_layer_that_takes_no_random_samples_in_training_is_quantized() -> None:
    model = _chain(Picky(), layers.Dense(2))
    qat = kqat.quantize_model(model, calibration_data=X)
    assert _losses(qat) == pytest.approx(_losses(model), rel=0.03)


PENALIZED: dict[str, Callable[[Any], Any]] = {
    "BatchNormalization": lambda x: layers.BatchNormalization(activity_regularizer="l2")(x),
    "Rescaling": lambda x: layers.Rescaling(0.3, 0.1, activity_regularizer="l2")(x),
    "folded": lambda x: layers.BatchNormalization(activity_regularizer="l2")(
        layers.Dense(4, activity_regularizer="l1")(x)
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", list(PENALIZED))
def test_penalties_of_what_ships_as_a_kernel_are_added(kind: str, training: bool) -> None:
    x = keras.Input((WIDTH,))
    model = keras.Model(x, PENALIZED[kind](layers.Dense(6, activation="relu")(x)))
    norms = [one for one in model.layers if isinstance(one, layers.BatchNormalization)]
    for norm in norms:  # A folded kernel is another one than the layer's own.
        norm.moving_variance.assign(np.full(norm.moving_variance.shape, 0.05))
    qat = kqat.quantize_model(model, calibration_data=X)
    model(X, training=training)
    before = sorted(map(float, model.losses))
    qat(X, training=training)
    np.testing.assert_allclose(sorted(map(float, qat.losses)), before, rtol=0.05)
    found = qat.predict(X, verbose=0)
    wanted = model.predict(X, verbose=0)
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
