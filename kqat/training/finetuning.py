"""`finetune`: the recipe for the epochs in which a QAT model wins back what integers lose."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from kqat.base import ModelError
from kqat.training.build import is_quantized
from kqat.training.callbacks import FreezeBatchNorm, FreezeObservers, QatCallback

LEARNING_RATE = 3e-4
WARM_UP = 0.1
FREEZE_AT = 0.5


class WarmUpCosine(QatCallback):
    """The learning rate rises from zero along a line, and falls to zero along half a cosine.

    Args:
        peak: the highest rate.
        warm_up: the share of all steps of `fit` in which it rises.

    Raises:
        ModelError: if `peak` is not above zero, or `warm_up` not inside [0, 1).

    Reference: Loshchilov & Hutter 2017, section 3 (https://arxiv.org/abs/1608.03983), without
    restarts; Goyal et al. 2017, section 2.2 (https://arxiv.org/abs/1706.02677).
    """

    def __init__(self, peak: float = LEARNING_RATE, *, warm_up: float = WARM_UP):
        super().__init__()
        if not 0.0 < peak < math.inf:
            raise ModelError(
                f"Expected a rate above zero. Received: {peak!r}. Use {LEARNING_RATE}."
            )
        if not 0.0 <= warm_up < 1.0:
            raise ModelError(f"Expected a share inside [0, 1). Received: warm_up={warm_up!r}.")
        self.peak, self.warm_up = peak, warm_up
        self._epoch, self._epochs, self._steps = 0, 1, 1

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds how many steps there are."""
        super().on_train_begin(logs)
        self._epochs, self._steps = self.params.get("epochs") or 1, self.params.get("steps") or 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the epoch; where its steps are not known, the rate changes here only."""
        self._epoch = epoch
        if not self._steps:
            self._set(epoch + 0.5)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the rate of the next step."""
        if self._steps:
            self._set(self._epoch + (batch + 0.5) / self._steps)

    def _set(self, epochs: float) -> None:
        self.model.optimizer.learning_rate = self.rate(epochs / self._epochs)

    def rate(self, share: float) -> float:
        """The rate when `share` of all steps are done."""
        if share < self.warm_up:
            return self.peak * share / self.warm_up
        falling = (share - self.warm_up) / (1.0 - self.warm_up)
        return self.peak * (0.5 + 0.5 * math.cos(math.pi * min(falling, 1.0)))


def finetune_callbacks(
    epochs: int,
    *,
    learning_rate: float = LEARNING_RATE,
    warm_up: float = WARM_UP,
    freeze_at: float | None = FREEZE_AT,
) -> list[keras.callbacks.Callback]:
    """The recipe of `finetune` as callbacks for a `fit` of your own.

    Args:
        epochs: of the `fit`.
        learning_rate: the highest one. That of the optimizer is overwritten.
        warm_up: the share of all steps in which the rate rises.
        freeze_at: the share of the epochs after which BatchNormalization statistics and ranges stay
            as they are; `None` for never.

    Raises:
        ModelError: if there are no epochs, or a number is not in its range.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ModelError(f"Expected one epoch or more. Received: epochs={epochs!r}.")
    if freeze_at is not None and not 0.0 <= freeze_at <= 1.0:
        raise ModelError(
            f"Expected a share inside [0, 1], or None. Received: freeze_at={freeze_at!r}."
        )
    callbacks: list[keras.callbacks.Callback] = [WarmUpCosine(learning_rate, warm_up=warm_up)]
    if freeze_at is not None:
        first = math.ceil(freeze_at * epochs)
        callbacks += [FreezeBatchNorm(first), FreezeObservers(first)]
    return callbacks


def finetune(
    qat: keras.Model,
    data: Any,
    epochs: int = 3,
    *,
    loss: Any = None,
    metrics: Sequence[Any] = (),
    learning_rate: float = LEARNING_RATE,
    callbacks: Iterable[keras.callbacks.Callback] = (),
    **options: Any,
) -> keras.callbacks.History:
    """Trains a QAT model by the recommended recipe, and returns the history of its `fit`.

    Adam, a rate that rises over the first tenth of the steps to `learning_rate` and falls to zero
    along a cosine; statistics of BatchNormalization and ranges stay as they are in the second half
    of the epochs, so that it trains with the numbers that ship. `benchmarks/finetune.md` has what
    was measured so far, one seed on small data: of 1e-4 and 3e-4 the latter was better for a
    trained ResNet-8, and a constant 1e-3 ruined it. Freezing made no difference there, and lost
    accuracy on a small network that was not trained out;
    `finetune_callbacks(freeze_at=None)` leaves it out.

    Args:
        qat: a QAT model, calibrated and not trained yet. It is compiled anew, with Adam.
        data: an `(x, y)` tuple of arrays, or a `tf.data.Dataset` or another iterable of batches
            that `fit` takes.
        epochs: of training.
        loss, metrics: as for `compile`; where `loss` is left out, those with which `qat` was
            compiled.
        learning_rate: the highest one.
        callbacks: further ones.
        **options: further arguments of `fit`, as `validation_data`, `batch_size`, `verbose`.

    Raises:
        ModelError: if `qat` is no QAT model, has no loss, or a number is not in its range.
    """
    if not is_quantized(qat):
        raise ModelError(
            f"Expected a QAT model. Received: '{qat.name}', which is float. Use "
            "kqat.quantize_model first."
        )
    recipe = finetune_callbacks(epochs, learning_rate=learning_rate)
    if loss is None:
        if not qat.compiled:
            raise ModelError(
                f"Expected a loss for '{qat.name}', which is not compiled. Received: none. Give "
                "loss, as for compile."
            )
        given = qat.get_compile_config()
        restore = keras.saving.deserialize_keras_object
        loss, metrics = restore(given["loss"]), metrics or restore(given["metrics"]) or ()
    qat.compile(keras.optimizers.Adam(learning_rate), loss, metrics=list(metrics))
    arrays = (data[0], data[1]) if isinstance(data, tuple) and len(data) == 2 else (data,)
    return qat.fit(*arrays, epochs=epochs, callbacks=[*recipe, *callbacks], **options)
