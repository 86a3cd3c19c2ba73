"""A small model for the schedules, and what one `fit` of it shows."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

import kqat

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype(np.float32)
Y = np.tanh(X @ RNG.normal(size=(6, 4))).astype(np.float32)
STEPS = 4  # of an epoch


def network() -> keras.Model:
    chain = [
        layers.Dense(16, use_bias=False, name="hidden"),
        layers.BatchNormalization(name="norm", momentum=0.8),
        layers.ReLU(name="relu"),
        layers.Dense(4, name="head"),
    ]
    return keras.Sequential([keras.Input((6,), name="x"), *chain], name="net")


def quantized(policy: Any = "w4a8", rate: float = 0.01) -> keras.Model:
    qat = kqat.quantize_model(network(), policy, calibration_data=X)
    qat.compile(keras.optimizers.Adam(rate), "mse")
    return qat


def fit(qat: keras.Model, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    options = {"batch_size": 16, "verbose": 0, "shuffle": False, **options}
    return qat.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)


def wrapper(qat: keras.Model, name: str = "head") -> kqat.QuantizeWrapper:
    return next(
        la for la in qat.layers
        if isinstance(la, kqat.QuantizeWrapper) and la.layer.name == name
    )  # fmt: skip


class Traces(keras.callbacks.Callback):
    """Counts how often the training step is traced; Keras also calls layers to build a model."""

    def __init__(self, monkeypatch: Any) -> None:
        super().__init__()
        self.count, self.after_first_step = 0, 0
        call = kqat.QuantizeWrapper.call

        @functools.wraps(call)  # Keras reads the signature.
        def counted(layer: Any, *args: Any, training: Any = None, **kwargs: Any) -> Any:
            self.count += bool(training) and layer.layer.name == "head"
            return call(layer, *args, training=training, **kwargs)

        monkeypatch.setattr(kqat.QuantizeWrapper, "call", counted)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.after_first_step = self.after_first_step or self.count

    @property
    def only_once(self) -> bool:
        """Whether nothing was traced after the first step."""
        return 0 < self.after_first_step == self.count


class EachStep(keras.callbacks.Callback):
    """Calls a function with the model after each step."""

    def __init__(self, function: Callable[[keras.Model], Any]) -> None:
        super().__init__()
        self.function = function
        self.seen: list[Any] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(self.function(self.model))
