"""`kqat.integer_model` and `GapCallback`: a data set judged as the device will judge it."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from kqat.base.errors import ModelError

X = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
Y = (X.sum(axis=1) > 0).astype("int32")


def trained() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), L.Dense(8, "relu"), L.Dense(2, "softmax")])
    qat = kqat.quantize_model(model, calibration_data=X)
    qat.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return qat


def test_it_is_evaluated_as_any_model() -> None:
    qat = trained()
    device = kqat.integer_model(qat)
    device.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    _, accuracy = device.evaluate(X, Y, batch_size=7, verbose=0)
    blob = tflite_export.convert(qat)
    integers = tflite_export.integer_model(blob, outputs="integers").predict(X, verbose=0)
    assert accuracy == pytest.approx(np.mean(integers.argmax(-1) == Y))
    frozen = kqat.integer_model(kqat.freeze(qat), outputs="integers")
    np.testing.assert_array_equal(frozen.predict(X, verbose=0), integers)


@pytest.mark.slow
def test_inputs_and_outputs_keep_their_structures() -> None:
    keras.utils.set_random_seed(0)
    a, b = keras.Input((6,), name="left"), keras.Input((4,), name="right")
    x = L.Concatenate()([a, b])
    ends = {"one": L.Dense(3)(x), "two": [L.Dense(2)(x), L.Dense(5)(a)]}
    model = keras.Model({"right": b, "left": a}, ends)
    data = {"left": X, "right": X[:, :4]}
    qat = kqat.quantize_model(model, calibration_data=data)
    device = kqat.integer_model(qat)
    keras.tree.assert_same_structure(device.output, qat.output)
    for ours, theirs in zip(
        keras.tree.flatten(device(data)), keras.tree.flatten(qat(data)), strict=True
    ):
        # A few steps of the outputs' grids, which span about 8.
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=0.2)


@pytest.mark.slow
def test_the_gap_is_logged_and_can_stop_training() -> None:
    qat = trained()
    history = qat.fit(
        X,
        Y,
        epochs=4,
        verbose=0,
        callbacks=[
            kqat.GapCallback((X, Y)),
            keras.callbacks.EarlyStopping(
                "val_accuracy_device", mode="max", min_delta=1.0, patience=1
            ),
        ],
    )
    # No accuracy grows by 1, so the second epoch is the last.
    assert len(history.history["val_accuracy_device"]) == 2
    assert "val_loss_device" in history.history
    device = kqat.integer_model(qat)
    device.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    expected = device.evaluate(X, Y, verbose=0, return_dict=True)
    assert history.history["val_accuracy_device"][-1] == pytest.approx(expected["accuracy"])
    assert history.history["val_loss_device"][-1] == pytest.approx(expected["loss"])


def test_a_callback_of_no_compiled_model_says_so() -> None:
    callback = kqat.GapCallback((X, Y))
    callback.set_model(keras.Sequential([keras.Input((6,)), L.Dense(2)]))
    with pytest.raises(ModelError, match="compiled model for GapCallback"):
        callback.on_epoch_end(0, {})


class MeansOfPairs(L.Layer):
    """A cell of means, of its state too and so on that one's grid, or of its input alone."""

    state_size = 8

    def __init__(self, of_states: bool) -> None:
        super().__init__()
        self.of_states, self.pool = of_states, L.AveragePooling1D(2)

    def call(self, x: Any, states: list[Any]) -> Any:
        """Each pair's mean, or a function of it that is looked up, twice."""
        x = ops.maximum(x, states[0]) if self.of_states else x
        means = self.pool(ops.reshape(x, (-1, 8, 1)))
        row = ops.reshape(ops.concatenate([means, means], axis=1), (-1, 8))
        row = row if self.of_states else ops.softplus(row)
        return row, [row]

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the output alone, as Keras's RNN does not ask for it."""
        return input_shape


class Trainer(keras.Model):
    def __init__(self, inner: keras.Model) -> None:
        super().__init__()
        self.inner = inner

    def call(self, x: Any, training: bool = False) -> Any:
        return self.inner(x, training=training)


def test_a_trainer_that_does_not_say_what_it_trains_is_told_how() -> None:
    callback, trainer = kqat.GapCallback((X, Y)), Trainer(keras.Sequential([L.Dense(2)]))
    trainer.compile("sgd", "mse")
    callback.set_model(trainer)
    with pytest.raises(ModelError, match=r"attribute trained_model. Received: 'trainer'"):
        callback.on_epoch_end(0, {})


@pytest.mark.slow
def test_callbacks_find_the_student_of_a_distiller(tmp_path: Path) -> None:
    qat = trained()
    teacher = keras.Sequential([keras.Input((6,)), L.Dense(int(qat.output.shape[-1]))])
    distiller = kqat.Distiller(qat, teacher, kind="values")
    distiller.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    board = kqat.TensorBoardQuantization(tmp_path, data=X)
    logs = distiller.fit(
        X, Y, epochs=1, verbose=0, batch_size=len(X), callbacks=[kqat.GapCallback((X, Y)), board]
    ).history
    device = kqat.integer_model(qat)
    device.compile(loss="sparse_categorical_crossentropy")
    assert logs["val_loss_device"] == [pytest.approx(device.evaluate(X, Y, verbose=0))]
    assert list((tmp_path / "quantization").iterdir())


def test_halves_of_means_are_rounded_as_kernels_round_them() -> None:
    """Half of all means of two are halves of a step, and most values behind a ReLU below zero."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 2, 8)).astype(np.float32)
    given = keras.Input(x.shape[1:])
    row = L.ReLU()(given)
    means = [L.AveragePooling1D(2)(row), *(L.RNN(MeansOfPairs(of))(row) for of in (False, True))]
    qat = kqat.quantize_model(keras.Model(given, means), calibration_data=x)
    device = kqat.integer_model(qat, runtime="litert")
    ends = tflite_export.inspect(tflite_export.convert(qat)).outputs
    for trained, shipped, end in zip(qat(x), device(x), ends, strict=True):
        assert np.abs(np.subtract(trained, shipped)).max() < 0.01 * end.scale
