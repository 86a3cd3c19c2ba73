"""Training that can be killed: batches are a function of the epoch, checkpoints are whole."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import kqat
from kqat.base.atomic_files import save_model
from recipes import training
from recipes.data import Samples
from recipes.timing import Seconds
from recipes.training import Batches


@pytest.fixture(scope="module")
def samples() -> Samples:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (40, 6, 6, 1)).astype(np.uint8), random.integers(0, 3, 40)


def _model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def test_batches_are_the_same_whenever_they_are_asked_for(samples: Samples) -> None:
    batches = Batches(samples, batch_size=16, seed=1)
    assert len(batches) == 2
    first, again = batches.batch(3, 1), Batches(samples, batch_size=16, seed=1).batch(3, 1)
    assert (first[0] == again[0]).all()
    assert (first[1] == again[1]).all()
    for other in (batches.batch(4, 1), batches.batch(3, 0), Batches(samples, seed=2).batch(3, 1)):
        assert first[0].shape != other[0].shape or (first[0] != other[0]).any()


def test_an_epoch_sees_each_sample_once(samples: Samples) -> None:
    images = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 9, 9, 1))
    batches = Batches((images, np.arange(40)), batch_size=10)
    seen = [batches.batch(0, index) for index in range(4)]
    assert sorted(np.concatenate([labels for _, labels in seen])) == list(range(40))
    for x, labels in seen:
        # The middle pixel is inside whatever the shift; a shifted image keeps its label.
        np.testing.assert_array_equal(x[:, 4, 4, 0], training.scaled(labels))


def test_augmentation_mirrors_and_shifts(samples: Samples) -> None:
    image = np.arange(36, dtype=np.uint8).reshape(1, 6, 6, 1)
    batches = Batches((np.repeat(image, 64, 0), np.arange(64)), batch_size=64)
    x, _ = batches.batch(0, 0)
    assert (x.shape, x.dtype) == ((64, 6, 6, 1), np.float32)
    shift = training.MAX_SHIFT
    padded = np.pad(image[0, :, :, 0], shift, constant_values=128)
    windows = {
        training.scaled(window[:, ::step]).tobytes()
        for top in range(2 * shift + 1)
        for left in range(2 * shift + 1)
        for step in (1, -1)
        for window in [padded[top : top + 6, left : left + 6]]
    }
    assert {picture.tobytes() for picture in x} <= windows
    assert len({picture.tobytes() for picture in x}) > 30


class _Counted(keras.layers.Layer):
    """Hands its input on, and counts how often it is called."""

    calls = 0

    def call(self, x: Any) -> Any:
        self.calls += 1
        return x


def test_a_step_is_traced_once(samples: Samples) -> None:
    counted = _Counted()
    shape, head = keras.Input((6, 6, 1)), keras.layers.Dense(3, activation="softmax")
    model = keras.Sequential([shape, keras.layers.Flatten(), counted, head])
    before = counted.calls
    images, labels = samples
    training.fit(model, (training.scaled(images), labels), 2, 0.01, batch_size=20)
    assert counted.calls == before + 1


class _Stop(keras.callbacks.Callback):
    """Breaks off in the middle of an epoch, as a kill does."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if int(self.model.optimizer.iterations) == self.step:
            raise KeyboardInterrupt


def _trained(model: keras.Model, folder: Path, samples: Samples, *stop: int) -> keras.Model:
    callbacks: list[keras.callbacks.Callback] = [_Stop(step) for step in stop]
    if any(isinstance(layer, kqat.QuantizeWrapper) for layer in model.layers):
        callbacks += training.freezing(4)
    batches = Batches(samples, batch_size=8)
    training.train(model, batches, folder, epochs=4, learning_rate=0.01, callbacks=callbacks)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_what_was_broken_off_goes_on_as_if_it_had_not_been(
    samples: Samples, tmp_path: Path, quantized: bool
) -> None:
    calibration = training.scaled(samples[0])

    def build() -> keras.Model:
        model = _model()
        return kqat.quantize_model(model, calibration_data=calibration) if quantized else model

    whole = _trained(build(), tmp_path / "whole", samples)
    # In the third epoch, in which ranges stand still already; and before anything is written.
    for step in (2, 13):
        with pytest.raises(KeyboardInterrupt):
            _trained(build(), tmp_path / "broken", samples, step)
    resumed = _trained(build(), tmp_path / "broken", samples)
    for mine, wanted in zip(resumed.variables, whole.variables, strict=True):
        np.testing.assert_array_equal(mine.numpy(), wanted.numpy())
    losses = [
        [row["loss"] for row in training.read_history(tmp_path / f)] for f in ("whole", "broken")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.slow
def test_a_file_that_was_being_written_counts_for_nothing(samples: Samples, tmp_path: Path) -> None:
    whole = _trained(_model(), tmp_path / "whole", samples)
    with pytest.raises(KeyboardInterrupt):
        _trained(_model(), tmp_path / "broken", samples, 8)
    (tmp_path / "broken" / "partial.weights.h5").write_bytes(b"half")
    history = training.read_history(tmp_path / "broken")
    (tmp_path / "broken" / "history.json").write_text(
        f"[{str(history[0]).replace(chr(39), chr(34))}, {{}}]"
    )
    resumed = _trained(_model(), tmp_path / "broken", samples)
    for mine, wanted in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, wanted)
    assert all("loss" in row for row in training.read_history(tmp_path / "broken"))


def test_a_finished_training_is_only_read_back(samples: Samples, tmp_path: Path) -> None:
    whole = _trained(_model(), tmp_path, samples)
    again = _trained(_model(), tmp_path, samples)
    for mine, wanted in zip(again.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, wanted)
    save_model(whole, tmp_path / "model.keras")
    training.drop_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"history.json", "model.keras"}


def test_the_clocks_stop_before_the_look_at_held_out_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([Seconds(0.0, 0.0), Seconds(5.0, 8.0), Seconds(10.0, 0.0), Seconds(13.0, 2.0)])
    monkeypatch.setattr(training.Seconds, "now", lambda: next(clock))
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.set_model(_model())
    checkpoints.on_epoch_begin(0)
    checkpoints.on_test_begin()
    checkpoints.on_epoch_end(0)  # Reads no clock any more.
    checkpoints.on_epoch_begin(1)
    checkpoints.on_epoch_end(1)
    took = [(row["seconds"], row["processor_seconds"]) for row in checkpoints.history]
    assert took == [(5.0, 8.0), (3.0, 2.0)]
