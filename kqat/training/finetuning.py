"""`finetune`: the recipe for the epochs in which a QAT model wins back what integers lose."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from kqat.base import ModelError
from kqat.graph import parts_of
from kqat.training.build import all_layers, check_quantized
from kqat.training.callbacks import FreezeBatchNorm, FreezeObservers, QatCallback
from kqat.training.distiller import Distiller
from kqat.training.weight_wrapper import QuantizeWrapper

LEARNING_RATE = 3e-4
# Of weights of so few bits. The fewer integers there are, the farther weights lie from the value
# at which they become the next one, and with Adam the rate decides how far they come.
RATES_OF_FEW_BITS = {3: 1e-3, 2: 2e-3, 1: 2e-3}
WARM_UP = 0.1


def recommended_rate(qat: keras.Model) -> float:
    """The highest learning rate of Adam that `finetune` takes for a QAT model.

    It is 3e-4, 1e-3 for weights of 3 bits, and 2e-3 for those of fewer; where widths are mixed, as
    the width of most weights has it.

    Args:
        qat: a QAT model, or a model with one inside, as a `Distiller`.
    """
    counts: dict[int, int] = {}
    for layer in all_layers(qat):
        if isinstance(layer, QuantizeWrapper):
            for name, spec in layer.weight_specs.items():
                size = math.prod(getattr(layer.layer, name).shape)
                counts[spec.bits] = counts.get(spec.bits, 0) + size
    bits = max(counts, key=lambda width: (counts[width], width), default=8)
    return RATES_OF_FEW_BITS.get(bits, LEARNING_RATE)


class WarmUpCosine(QatCallback):
    """The learning rate rises from zero along a line, and falls to zero along half a cosine.

    Args:
        peak: the highest rate; that of `recommended_rate` if it is left out.
        warm_up: the share of all steps of `fit` in which it rises.

    Raises:
        ModelError: if `peak` is not above zero, `warm_up` not inside [0, 1), or the rate of the
            optimizer a schedule.

    Reference: Loshchilov & Hutter 2017, section 3 (https://arxiv.org/abs/1608.03983), without
    restarts; Goyal et al. 2017, section 2.2 (https://arxiv.org/abs/1706.02677).
    """

    def __init__(self, peak: float | None = None, *, warm_up: float = WARM_UP):
        super().__init__()
        if peak is not None and not 0.0 < peak < math.inf:
            raise ModelError(
                f"Expected a rate above zero. Received: {peak!r}. Use {LEARNING_RATE}."
            )
        if not 0.0 <= warm_up < 1.0:
            raise ModelError(f"Expected a share inside [0, 1). Received: warm_up={warm_up!r}.")
        self.peak, self.warm_up = peak, warm_up
        self._highest = LEARNING_RATE if peak is None else peak
        self._epoch, self._epochs, self._steps = 0, 1, 1

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds how many steps there are, and the highest rate."""
        super().on_train_begin(logs)
        self._highest = recommended_rate(self.model) if self.peak is None else self.peak
        self._epochs, steps = self.epochs_and_steps()
        self._steps = steps or 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the epoch; where its steps are not known, the rate changes here only."""
        self._epoch = epoch
        if not self._steps:
            self._set(epoch + 0.5)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the rate of the next step."""
        if self._steps:
            self._set(self._epoch + (batch + 0.5) / self._steps)
        # TensorFlow traces a step twice that makes variables, and one trace takes seconds.
        optimizer = self.optimizer()
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)

    def _set(self, epochs: float) -> None:
        optimizer = self.optimizer()
        try:
            optimizer.learning_rate = self.rate(epochs / self._epochs)
        except (AttributeError, TypeError) as error:
            raise ModelError(
                "Expected an optimizer whose learning rate is a number, which WarmUpCosine sets. "
                f"Received: {type(optimizer).__name__} with a schedule or a function of its own. "
                "Compile with a number, or leave WarmUpCosine (of kqat.finetune_callbacks) out."
            ) from error

    def rate(self, share: float) -> float:
        """The rate when `share` of all steps are done."""
        if share < self.warm_up:
            return self._highest * share / self.warm_up
        falling = (share - self.warm_up) / (1.0 - self.warm_up)
        return self._highest * (0.5 + 0.5 * math.cos(math.pi * min(falling, 1.0)))


def finetune_callbacks(
    epochs: int,
    *,
    learning_rate: float | None = None,
    warm_up: float = WARM_UP,
    freeze_at: float | None = None,
) -> list[keras.callbacks.Callback]:
    """The recipe of `finetune` as callbacks for a `fit` of your own.

    Args:
        epochs: of the `fit`.
        learning_rate: the highest one; by the bits of the weights (`recommended_rate`) if it is
            left out. That of the optimizer is overwritten.
        warm_up: the share of all steps in which the rate rises.
        freeze_at: the share of the epochs after which BatchNormalization statistics and ranges stay
            as they are; `None`, the default, for never: in each pair of `benchmarks/finetune.md`
            freezing lost accuracy.

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
    learning_rate: float | None = None,
    teacher: keras.Model | None = None,
    kind: str | None = None,
    callbacks: Iterable[keras.callbacks.Callback] = (),
    **options: Any,
) -> keras.callbacks.History:
    """Trains a QAT model by the recommended recipe, and returns the history of its `fit`.

    Adam, a rate that rises over the first tenth of the steps to `learning_rate` and falls to zero
    along a cosine. Statistics of BatchNormalization and ranges go on moving: at the end of the
    cosine weights hardly do, so they are those that ship. With fewer than 8 bits give the float
    model as `teacher`: of ResNet-20 on CIFAR-10 it won back most of what 4 and 3 bits lose
    (`recipes/RESULTS.md`). The rates for few bits were found there too, with the option
    `--learning-rate` of `python -m recipes.recovery`: ternary weights without a teacher, and 3 bits
    with one, were better than at 3e-4. Falling bits did not help within so few steps.

    `benchmarks/finetune.md` has the first measurements, one seed on small data: of 1e-4 and 3e-4
    the latter was better for a trained ResNet-8 of 4 bits, and a constant 1e-3 ruined it. Freezing
    lost a little there, and more on a small network that was not trained out. Where you want it,
    give `finetune_callbacks(epochs, freeze_at=0.5)` to a `fit` of your own.

    Args:
        qat: a QAT model, calibrated and not trained yet. It is compiled anew, with Adam.
        data: an `(x, y)` tuple of arrays, or a `tf.data.Dataset` or another iterable of batches
            that `fit` takes.
        epochs: of training.
        loss, metrics: as for `compile`; where `loss` is left out, those with which `qat` was
            compiled.
        learning_rate: the highest one; if it is left out, 3e-4, and for weights of 3 bits 1e-3, of
            fewer 2e-3.
        teacher: the float model, if its answers are to be learned too, as by `kqat.Distiller`.
        kind: of the outputs, as for `kqat.Distiller`: `"logits"`, `"probabilities"` or `"values"`.
        callbacks: further ones.
        **options: further arguments of `fit`, as `validation_data`, `batch_size`, `verbose`.

    Raises:
        ModelError: if `qat` is no QAT model, has no loss, or a number is not in its range; if there
            is a teacher and no kind, or a kind and no teacher.
    """
    check_quantized(qat)
    if (teacher is None) != (kind is None):
        raise ModelError(
            "Expected a teacher and the kind of its outputs, or neither. Received: "
            f"{'no teacher' if teacher is None else 'a teacher'} and kind={kind!r}. Use "
            "teacher=model with kind='logits', 'probabilities' (behind a softmax) or 'values'."
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
    qat.compile(keras.optimizers.Adam(), loss, metrics=list(metrics))
    arrays = (data[0], data[1]) if isinstance(data, tuple) and len(data) == 2 else (data,)
    options = {"epochs": epochs, "callbacks": [*recipe, *callbacks], **options}
    if teacher is None or kind is None:
        return qat.fit(*arrays, **options)
    trained = [(part, part.trainable) for part in parts_of(teacher)]
    try:
        distiller = Distiller(qat, teacher, kind=kind)
        distiller.compile(keras.optimizers.Adam(), loss, metrics=list(metrics))
        return distiller.fit(*arrays, **options)
    finally:
        # The distiller froze all of it. A flag reaches what is inside, which comes later here.
        for part, flag in trained:
            part.trainable = flag
