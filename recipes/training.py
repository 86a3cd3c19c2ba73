"""Training that can be killed at any time and continues with the same result.

Order and augmentation of the samples are drawn again for each (seed, epoch, batch), so no state of
a random generator has to be saved. A checkpoint holds weights, optimizer and epoch number only.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
from kqat.base import write_file
from recipes.data import Samples
from recipes.timing import Seconds

BATCH_SIZE = 128
MAX_SHIFT = 4


class Batches:
    """Shuffled, augmented batches of 8-bit images; a batch is the same whenever it is asked for.

    Images are mirrored and shifted by up to `MAX_SHIFT` pixels, the usual for CIFAR-10 (He et al.
    2015, section 4.2, https://arxiv.org/abs/1512.03385).

    Args:
        samples: images (n, height, width, channels) in 0..255 and labels (n,).
        batch_size: samples that do not fill a whole batch are left out in that epoch.
        seed: seed of order and augmentation.
        scale: what is done with the pixels last; `scaled` by default.
        parts: how many epochs of `fit` read all samples once, a part of them each, so that
            callbacks can act within one pass.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        scale: Callable[[np.ndarray], np.ndarray] | None = None,
        parts: int = 1,
    ):
        self.images, self.labels = samples
        self.batch_size = min(batch_size, len(self.labels) // parts)
        self.seed = seed
        self.scale = scale or scaled
        self.parts = parts

    def __len__(self) -> int:
        return len(self.labels) // self.parts // self.batch_size

    def batch(self, epoch: int, index: int) -> Samples:
        """Batch `index` of an epoch: scaled images, and labels."""
        turn, part = divmod(epoch, self.parts)
        order = np.random.default_rng((self.seed, turn)).permutation(len(self.labels))
        first = part * (len(order) // self.parts) + index * self.batch_size
        chosen = order[first : first + self.batch_size]
        random = np.random.default_rng((self.seed, epoch, index))
        return self.scale(_augmented(self.images[chosen], random)), self.labels[chosen]


class Checkpoints(keras.callbacks.Callback):
    """Writes weights, optimizer and history after each epoch, each file whole or not at all.

    The history has one row per epoch: the logs of `fit`, and the `seconds` of its training by wall
    clock and CPU clock. Validation is not included in the seconds.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.history: list[dict[str, float]] = []

    def restore(self, model: keras.Model) -> int:
        """Restores a compiled model from the checkpoint; returns the number of finished epochs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self.folder.glob("epoch_*.weights.h5"))
        if not files:
            return 0
        model.optimizer.build(model.trainable_variables)
        model.load_weights(files[-1])
        epochs = int(files[-1].name.split(".")[0].removeprefix("epoch_"))
        self.history = read_history(self.folder)[:epochs]
        return epochs

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the clocks."""
        self._started = Seconds.now()
        self._trained: Seconds | None = None

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Stops the clocks, because validation is not training."""
        self._trained = Seconds.now().since(self._started)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the files, the weights last: their file name says which epoch is finished."""
        took = self._trained or Seconds.now().since(self._started)
        row = {name: float(value) for name, value in (logs or {}).items()}
        row |= {"seconds": took.wall, "processor_seconds": took.processor}
        self.history.append(row)
        write_file(self.folder / "history.json", json.dumps(self.history, indent=1).encode())
        older = list(self.folder.glob("epoch_*.weights.h5"))
        path = self.folder / f"epoch_{epoch + 1:04}.weights.h5"
        partial = self.folder / "partial.weights.h5"
        self.model.save_weights(partial, overwrite=True)
        partial.replace(path)
        for file in older:
            file.unlink()


def scaled(images: np.ndarray) -> np.ndarray:
    """Pixels in 0..255 as float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def train(
    model: keras.Model,
    batches: Batches,
    folder: Path,
    *,
    epochs: int,
    learning_rate: float,
    validation: Samples | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> None:
    """Trains `model`, from the last checkpoint in `folder` if there is one.

    The optimizer is Adam; the learning rate falls to zero along a cosine.
    """
    _compile(model, epochs * len(batches), learning_rate)
    checkpoints = Checkpoints(folder)
    done = checkpoints.restore(model)
    if done < epochs:
        source = Epochs(batches)
        told = keras.callbacks.LambdaCallback(on_epoch_begin=source.begin)
        model.fit(
            source,
            initial_epoch=done,
            epochs=epochs,
            shuffle=False,
            validation_data=validation,
            callbacks=[told, *callbacks, checkpoints],
            verbose=1 if sys.stdout.isatty() else 2,
        )


def fit(
    model: keras.Model,
    samples: Samples,
    epochs: int,
    learning_rate: float,
    *,
    batch_size: int,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    shuffle: bool = True,
) -> None:
    """Trains `model` as `train` does, but from the start and without augmentation."""
    x, y = samples
    _compile(model, epochs * -(-len(y) // batch_size), learning_rate)
    print(f"Training '{model.name}'", flush=True)
    model.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=shuffle,
        callbacks=list(callbacks),
        verbose=2,
    )


def freezing(epochs: int) -> list[keras.callbacks.Callback]:
    """Callbacks that freeze ranges and statistics in the second half of QAT.

    So the last epochs train with exactly the numbers that ship.
    """
    return [kqat.FreezeObservers(epochs // 2), kqat.FreezeBatchNorm(epochs // 2)]


def settle(model: keras.Model, x: np.ndarray) -> None:
    """Gives the BatchNormalization layers of an untrained `model` the statistics of `x`.

    With the initial statistics, the outputs of a deep untrained network hardly depend on its input,
    and no integer file can be made.
    """
    kind = keras.layers.BatchNormalization
    momenta = {layer: layer.momentum for layer in model.layers if isinstance(layer, kind)}
    for layer in momenta:
        layer.momentum = 0.0
    model(x, training=True)
    for layer, momentum in momenta.items():
        layer.momentum = momentum


def read_history(folder: Path) -> list[dict[str, float]]:
    """The history in `folder`, one row per epoch; see `Checkpoints`."""
    path = folder / "history.json"
    return json.loads(path.read_text()) if path.exists() else []


def drop_checkpoints(folder: Path) -> None:
    """Removes the checkpoint of a finished training, once its model is saved."""
    for path in folder.glob("epoch_*.weights.h5"):
        path.unlink()


class Epochs(keras.utils.PyDataset):
    """`Batches` as a dataset for `fit`, which needs `begin` as a callback of its epochs."""

    def __init__(self, batches: Batches):
        super().__init__()
        self.batches = batches
        self.epoch = 0

    def begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Says which epoch is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Samples:
        return self.batches.batch(self.epoch, index)


def _compile(model: keras.Model, steps: int, learning_rate: float) -> None:
    rate = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    accuracy = keras.metrics.SparseCategoricalAccuracy("accuracy")
    model.compile(
        keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=[accuracy]
    )
    # TensorFlow traces a step twice that makes variables. So none are left to make: those of a
    # metric given by its name would be, too.
    model.optimizer.build(model.trainable_variables)


def _augmented(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Mirrored and shifted copies; pixels from outside the image are grey, zero once scaled."""
    count, height, width, _ = images.shape
    padding = (0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)
    padded = np.pad(images, padding, constant_values=128)
    top, left = random.integers(0, 2 * MAX_SHIFT + 1, (2, count, 1))
    rows = top + np.arange(height)
    columns = left + np.arange(width)
    mirrored = random.random(count) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
