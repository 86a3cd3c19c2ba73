"""Callbacks in a real `fit`: what moves before an epoch and holds still from it on."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kqat
from kqat import FreezeBatchNorm, FreezeObservers
from kqat.base.errors import ModelError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 4)).astype(np.float32)
Y = X @ RNG.normal(size=(4, 8)).astype(np.float32)
RANGES = ("/low", "/high", "/count")
STATISTICS = ("/moving_mean", "/moving_variance")
LEARNT = ("/kernel", "/gamma", "/beta")


def float_model() -> keras.Model:
    """One BatchNormalization that folds, and one that stands alone."""
    return keras.Sequential(
        [
            keras.Input((4,), name="row"),
            layers.Dense(8, use_bias=False, name="dense"),
            layers.BatchNormalization(name="folded", momentum=0.8),
            layers.ReLU(name="relu"),
            layers.BatchNormalization(name="alone", momentum=0.8),
        ],
        name="model",
    )


def quantized(eager: bool = True) -> keras.Model:
    """Eager steps cost no compilation; in compiled ones, freezing has to compile anew."""
    qat = kqat.quantize_model(float_model(), calibration_data=X[:8])
    qat.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=eager)
    return qat


class Recorder(keras.callbacks.Callback):
    """The weights before training and after each epoch."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.snapshots = [self.snapshot()]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.snapshots.append(self.snapshot())

    def snapshot(self) -> dict[str, np.ndarray]:
        return {v.path: v.numpy() for v in self.model.weights}

    def moved(self, epoch: int) -> set[str]:
        """Names of the weights that moved in the epoch."""
        before, after = self.snapshots[epoch : epoch + 2]
        return {path for path in after if not np.array_equal(before[path], after[path])}


def fit(model: keras.Model, *callbacks: Any, epochs: int = 3, **options: Any) -> Recorder:
    recorder = Recorder()
    options = {"batch_size": 16, "verbose": 0, "shuffle": False, **options}
    model.fit(X, Y, epochs=epochs, callbacks=[*callbacks, recorder], **options)
    return recorder


def ending(moved: set[str], *endings: str) -> set[str]:
    return {path for path in moved if path.endswith(endings)}


def test_without_callbacks_everything_moves() -> None:
    moved = fit(quantized(), epochs=1).moved(0)
    assert {path.split("/")[-2] for path in ending(moved, "/count")} == {
        "row_quantizer",
        "relu_quantizer",
        "alone_quantizer",
    }
    assert len(ending(moved, *STATISTICS)) == 4
    assert len(ending(moved, *LEARNT)) == 1 + 2 + 2


def test_observers_stop_and_the_rest_goes_on() -> None:
    recorder = fit(quantized(eager=False), FreezeObservers(1))
    assert len(ending(recorder.moved(0), "/count")) == 3
    for epoch in (1, 2):
        assert ending(recorder.moved(epoch), *RANGES) == set()
        assert len(ending(recorder.moved(epoch), *STATISTICS)) == 4
        assert len(ending(recorder.moved(epoch), *LEARNT)) == 5


def test_statistics_stop_and_the_rest_goes_on() -> None:
    recorder = fit(quantized(eager=False), FreezeBatchNorm(1))
    assert len(ending(recorder.moved(0), *STATISTICS)) == 4
    for epoch in (1, 2):
        assert ending(recorder.moved(epoch), *STATISTICS) == set()
        assert len(ending(recorder.moved(epoch), "/count")) == 3
        assert len(ending(recorder.moved(epoch), *LEARNT)) == 5


def test_frozen_statistics_are_what_training_computes_with() -> None:
    """The loss of a training step is then that of inference on the same batch."""
    qat = quantized()
    fit(qat, FreezeObservers(0), FreezeBatchNorm(0), epochs=1)
    inference = qat.evaluate(X, Y, batch_size=32, verbose=0)
    assert qat.train_on_batch(X, Y) == inference


def test_a_later_start_freezes_at_once() -> None:
    recorder = fit(quantized(), FreezeObservers(2), epochs=4, initial_epoch=3)
    assert ending(recorder.moved(0), *RANGES) == set()


@pytest.mark.slow
def test_callbacks_serve_fit_after_fit() -> None:
    first, second = quantized(), quantized()
    callbacks = FreezeObservers(1), FreezeBatchNorm(1)
    fit(first, *callbacks, epochs=2)
    again = fit(first, *callbacks, epochs=1)
    assert ending(again.moved(0), *RANGES, *STATISTICS) == set()
    other = fit(second, *callbacks, epochs=2)
    assert len(ending(other.moved(0), "/count", *STATISTICS)) == 7
    assert ending(other.moved(1), *RANGES, *STATISTICS) == set()


def test_what_was_frozen_stays_so_in_a_saved_model(tmp_path: Path) -> None:
    qat = quantized()
    recorder = fit(qat, FreezeObservers(0), FreezeBatchNorm(0), epochs=1)
    assert ending(recorder.moved(0), *RANGES, *STATISTICS) == set()
    qat.save(tmp_path / "qat.keras")
    recorder = fit(keras.models.load_model(tmp_path / "qat.keras"), epochs=1)
    assert ending(recorder.moved(0), *RANGES, *STATISTICS) == set()
    assert len(ending(recorder.moved(0), *LEARNT)) == 5


def test_a_model_around_a_quantized_one_is_frozen_too() -> None:
    x = keras.Input((4,))
    outer = keras.Model(x, quantized()(layers.Rescaling(1.0)(x)))
    outer.compile("sgd", "mse", run_eagerly=True)
    recorder = fit(outer, FreezeObservers(0), FreezeBatchNorm(0), epochs=1)
    assert ending(recorder.moved(0), *RANGES, *STATISTICS) == set()


@pytest.mark.parametrize("callback", [FreezeObservers, FreezeBatchNorm])
@pytest.mark.parametrize("epoch", [-1, 1.0, "1", True, None])
def test_an_epoch_that_is_none_is_refused(callback: Any, epoch: Any) -> None:
    with pytest.raises(ModelError, match=rf"0 for the first. Received: epoch={epoch!r}"):
        callback(epoch)


@pytest.mark.parametrize("callback", [FreezeObservers, FreezeBatchNorm])
def test_a_float_model_is_refused(callback: Any) -> None:
    model = float_model()
    model.compile("sgd", "mse")
    with pytest.raises(ModelError, match=rf"QAT model for {callback.__name__}. Received: 'model'"):
        fit(model, callback(0), epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True])
def test_freezing_traces_the_training_step_once(
    learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags are read by the step, which is compiled for the first batch and never again."""
    traces: list[str] = []
    counts: list[int] = []
    call = kqat.ActivationQuantizer.call

    @functools.wraps(call)  # Keras reads the signature.
    def counted(self: Any, x: Any, *args: Any, training: Any = None, **kwargs: Any) -> Any:
        if training and self.label == "row":
            traces.append(self.name)
        return call(self, x, *args, training=training, **kwargs)

    config = kqat.QuantizeConfig(activation_range="lsq_plus" if learned else "moving_average")
    qat = kqat.quantize_model(float_model(), config, calibration_data=X[:8])
    qat.compile(keras.optimizers.Adam(0.05), "mse")
    monkeypatch.setattr(kqat.ActivationQuantizer, "call", counted)
    first = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: counts.append(len(traces))
    )
    recorder = fit(qat, FreezeObservers(1), FreezeBatchNorm(2), first, epochs=4)
    # Keras calls the layers once more, to build the model.
    assert counts == [counts[0]] * 8
    assert ending(recorder.moved(0), "/moved" if learned else "/count") != set()
    for epoch in (1, 2, 3):
        assert ending(recorder.moved(epoch), *RANGES) == set()
        assert len(ending(recorder.moved(epoch), *STATISTICS)) == (4 if epoch == 1 else 0)
    fit(qat, FreezeObservers(0), FreezeBatchNorm(0), first, epochs=1)
    assert set(counts) == {len(traces)}


@pytest.mark.slow
def test_frozen_learned_ranges_stay_though_the_optimizer_has_momentum(tmp_path: Path) -> None:
    config = kqat.QuantizeConfig(activation_range="lsq_plus")
    qat = kqat.quantize_model(float_model(), config, calibration_data=X[:8])
    qat.compile(keras.optimizers.Adam(0.05), "mse")
    seen: list[Any] = []
    quantizers = [la for la in qat.layers if isinstance(la, kqat.ActivationQuantizer)]
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append([q.range() for q in quantizers])
    )
    qat.predict(X, verbose=0)  # Traced before anything was frozen.
    fit(qat, FreezeObservers(1), note, epochs=3)
    start = [q.range() for q in quantizers]
    assert seen[0] == seen[1] == seen[2] == start
    np.testing.assert_array_equal(qat.predict(X, verbose=0), qat(X))
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    fit(loaded, epochs=1)
    found = [la.range() for la in loaded.layers if isinstance(la, kqat.ActivationQuantizer)]
    assert found == start


@pytest.mark.slow
def test_frozen_learned_ranges_come_back_from_a_backup(tmp_path: Path) -> None:
    """As they were frozen, not as the momentum of the optimizer has moved their numbers since."""
    config = kqat.QuantizeConfig(activation_range="lsq_plus")

    def trained(name: str, epochs: int) -> keras.Model:
        keras.utils.set_random_seed(0)
        qat = kqat.quantize_model(float_model(), config, calibration_data=X[:8])
        qat.compile(keras.optimizers.Adam(0.05), "mse", run_eagerly=True)
        backup = keras.callbacks.BackupAndRestore(tmp_path / name, delete_checkpoint=False)
        fit(qat, FreezeObservers(1), backup, epochs=epochs, batch_size=32)
        return qat

    whole = trained("whole", 3)
    trained("parts", 2)
    for own, other in zip(trained("parts", 3).weights, whole.weights, strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_statistics_freeze_under_mixed_precision(policy: str) -> None:
    """Both ways through a compiled step have one type, the one with a bias that ships too."""
    keras.config.set_dtype_policy(policy)
    qat, flag = quantized(), keras.Variable(0.0)
    for layer in qat.layers:
        if isinstance(layer, kqat.QuantizeWrapper):
            layer.controls.frozen = flag
    step = tf.function(lambda x: qat(x, training=True))
    moving, frozen = step(X), [flag.assign(1.0), step(X)][1]
    assert moving.dtype == frozen.dtype
    assert np.any(np.asarray(moving) != np.asarray(frozen))


@pytest.mark.slow
def test_a_step_that_was_traced_before_learns_of_the_flags() -> None:
    qat = quantized(eager=False)
    fit(qat, epochs=1)
    recorder = fit(qat, FreezeObservers(1), FreezeBatchNorm(1), epochs=2)
    assert len(ending(recorder.moved(0), "/count", *STATISTICS)) == 7
    assert ending(recorder.moved(1), *RANGES, *STATISTICS) == set()


@pytest.mark.parametrize("learns", [False, True])
def test_a_compiled_step_that_does_not_learn_of_a_change_is_told_of(learns: bool) -> None:
    """A user's own `tf.function` of before `on_train_begin` no longer calls the layers."""
    qat = kqat.quantize_model(float_model(), "w4a8", calibration_data=X)
    qat(X[:2], training=True)
    around = keras.Sequential([qat])
    every = FreezeObservers(0), FreezeBatchNorm(0), kqat.DampenOscillations(), kqat.FallingBits()
    for callback in every:
        callbacks = keras.callbacks.CallbackList([callback], model=around, epochs=2)
        qat.make_predict_function()
        callbacks.on_train_begin()
        callbacks.on_epoch_begin(0)
        assert qat.predict_function is None
        if learns:
            qat(X[:2], training=True)
        words = f"^{type(callback).__name__} changed nothing"
        told = pytest.warns(kqat.TrainerWarning, match=words)
        with contextlib.nullcontext() if learns else told:
            callbacks.on_epoch_end(0)
        callbacks.on_epoch_end(1)


@pytest.mark.parametrize(
    ("callback", "options", "words"),
    [
        (kqat.WarmUpCosine, {}, "number of epochs for WarmUpCosine"),
        (kqat.DampenOscillations, {}, "number of epochs for DampenOscillations"),
        (kqat.FreezeOscillations, {}, "number of epochs for FreezeOscillations"),
        (kqat.WarmUpCosine, {"epochs": 1}, "compiled model for WarmUpCosine"),
        (lambda: kqat.QuantizeAfter(1), {"epochs": 1}, "compiled model for QuantizeAfter"),
    ],
)
def test_a_loop_that_tells_too_little_is_refused(callback: Any, options: Any, words: str) -> None:
    model = keras.Sequential([keras.Input((4,)), layers.ReLU()])
    qat = kqat.quantize_model(model, calibration_data=X)
    callbacks = keras.callbacks.CallbackList([callback()], model=qat, **options)

    def begin() -> None:
        callbacks.on_train_begin()
        callbacks.on_epoch_begin(0)

    with pytest.raises(ModelError, match=words):
        begin()


def test_an_activity_regularizer_keeps_its_loss() -> None:
    """A loss cannot leave the conditional that reads the flag."""
    x = keras.Input((4,))
    dense = layers.Dense(8, use_bias=False, activity_regularizer="l2", name="dense")
    model = keras.Model(x, layers.BatchNormalization(momentum=0.8)(dense(x)))
    qat = kqat.quantize_model(model, calibration_data=X[:8])
    qat.compile(keras.optimizers.SGD(0.05), "mse")
    recorder = fit(qat, FreezeBatchNorm(1), epochs=2)
    assert len(ending(recorder.moved(0), *STATISTICS)) == 2
    assert ending(recorder.moved(1), *STATISTICS) == set()
    assert len(qat.losses) == 1
