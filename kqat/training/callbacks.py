"""Callbacks for `fit` that freeze ranges and BatchNormalization statistics from some epoch on.

The last epochs then train with exactly the numbers that ship. For statistics this is Krishnamoorthi
2018, sections 3.2.2 and 4 (https://arxiv.org/abs/1806.08342). `finetune` does without, as freezing
lost accuracy where it was measured (`benchmarks/finetune.md`).
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from kqat.base import ModelError, TrainerWarning
from kqat.graph import parts_of
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import all_layers, check_quantized
from kqat.training.weight_wrapper import QuantizeWrapper

Quantizing = ActivationQuantizer | QuantizeWrapper


class QatCallback(keras.callbacks.Callback):
    """A callback that needs a QAT model.

    Where it changes what the training step computes, the step has to be traced anew. `fit` does so.
    A compiled step of the user's own goes on as it was; `on_epoch_end` then warns.
    """

    _changed: Sequence[Quantizing] = ()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that the model is one."""
        check_quantized(self.model, f"for {type(self).__name__}")

    def quantizing_layers(self) -> Iterator[Quantizing]:
        """The layers of the model that quantize."""
        for layer in all_layers(self.model):
            if isinstance(layer, ActivationQuantizer | QuantizeWrapper):
                yield layer

    def wrappers(self) -> list[QuantizeWrapper]:
        """The layers whose weights lie on grids."""
        return [
            layer
            for layer in self.quantizing_layers()
            if isinstance(layer, QuantizeWrapper) and layer.weight_specs
        ]

    def epochs_and_steps(self) -> tuple[int, int | None]:
        """How long training will be: epochs, and steps of each, where these are known.

        Raises:
            ModelError: if a loop of the user's own does not say how many epochs there are.
        """
        given = self.params or {}
        if given.get("epochs") is None:
            raise ModelError(
                f"Expected the number of epochs for {type(self).__name__}, whose schedule spans "
                "all of them. Received: none. In a loop of your own write keras.callbacks."
                "CallbackList(callbacks, model=model, epochs=..., steps=...)."
            )
        return given["epochs"] or 1, given.get("steps")

    def optimizer(self) -> Any:
        """The optimizer of the model that is trained.

        Raises:
            ModelError: if a loop of the user's own has another one.
        """
        found = getattr(self.model, "optimizer", None)
        if found is None:
            raise ModelError(
                f"Expected a compiled model for {type(self).__name__}, which reads its optimizer. "
                f"Received: '{self.model.name}', which has none. In a loop of your own call "
                "model.compile(optimizer), and train with model.optimizer."
            )
        return found

    def control(self, layers: Sequence[Quantizing], field: str, initial: float) -> keras.Variable:
        """One variable for a number of all `layers`, which the training step reads.

        A step that was traced without it is traced anew, before the first batch.

        Args:
            layers: whose `Controls`.
            field: the attribute of these.
            initial: the number of a new variable.

        Raises:
            ModelError: on a backend whose compiled steps do not read variables outside layers.
        """
        check_backend(type(self).__name__)
        found = [getattr(layer.controls, field) for layer in layers]
        variable = next((v for v in found if v is not None), None)
        if variable is None:
            variable = keras.Variable(initial, trainable=False, dtype="float32", name=field)
        if any(v is None for v in found):
            for layer in layers:
                setattr(layer.controls, field, variable)
            self.trace_again(layers)
        self._changed = tuple(layers)
        return variable

    def trace_again(self, layers: Sequence[Quantizing]) -> None:
        """Lets the steps of training and of inference be traced anew: `layers` changed.

        Those of inference of each model inside too, as of the one that a trainer trains.
        """
        for layer in layers:
            layer.controls.are_read = False
        self._changed = tuple(layers)
        self.model.make_train_function(force=True)
        for part in parts_of(self.model):
            if isinstance(part, keras.Model):
                part.test_function = part.predict_function = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Warns where no training step of the epoch knew of what changed."""
        if self._changed and not any(layer.controls.are_read for layer in self._changed):
            warnings.warn(
                f"{type(self).__name__} changed nothing in epoch {epoch}: the training step was "
                "compiled before, or calls the QAT model without training=True. Call "
                "on_train_begin before the first step of a tf.function, or make a new one.",
                TrainerWarning,
                stacklevel=2,
            )
        self._changed = ()


def check_backend(name: str) -> None:
    """Checks that a compiled training step reads variables that no layer owns.

    Raises:
        ModelError: if it does not, naming the callback `name`.
    """
    if keras.backend.backend() != "tensorflow":
        raise ModelError(
            f"Expected the TensorFlow backend for {name}. Received: {keras.backend.backend()}, "
            "whose compiled steps do not see what callbacks change. Train on TensorFlow, or "
            "without this callback."
        )


def check_epoch(name: str, epoch: Any) -> int:
    """`epoch`, if it is the number of one.

    Raises:
        ModelError: if not; `name` is the argument's.
    """
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise ModelError(
            f"Expected the epoch to freeze at, 0 for the first. Received: {name}={epoch!r}. Use "
            "an integer from 0 on."
        )
    return epoch


class _FreezeAt(QatCallback):
    """Freezes layers of a QAT model at the beginning of an epoch, and keeps them frozen.

    The training step reads a flag, so it is not traced anew. It is where flags do not work: on
    other backends than TensorFlow, for statistics under a distribution strategy, and for a layer
    with an activity regularizer.
    """

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = check_epoch("epoch", epoch)
        self._frozen = False
        self._flag: keras.Variable | None = None
        self._traces_again = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that there is something to freeze, and lets the training step read the flag."""
        super().on_train_begin(logs)
        self._frozen, self._flag = False, None
        layers = [layer for layer in self.quantizing_layers() if self._freezes(layer)]
        flagged = [layer for layer in layers if self._takes_flag(layer)]
        self._traces_again = len(flagged) < len(layers)
        if flagged:
            self._flag = self.control(flagged, "frozen", 0.0)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Freezes, once `epoch` is reached."""
        if epoch < self.epoch or self._frozen:
            return
        frozen = [layer for layer in self.quantizing_layers() if self._freezes(layer)]
        for layer in frozen:
            self._freeze(layer)
        self._frozen = True
        if self._flag is not None:
            self._flag.assign(1.0)
        if self._traces_again:
            # The training step was traced with the old settings.
            self.trace_again(frozen)

    def _freezes(self, layer: Quantizing) -> bool:
        raise NotImplementedError

    def _takes_flag(self, layer: Quantizing) -> bool:
        return keras.backend.backend() == "tensorflow"

    def _freeze(self, layer: Any) -> None:
        raise NotImplementedError


class FreezeObservers(_FreezeAt):
    """Fixes the ranges of all quantizers from epoch `epoch` on, observed and learned ones.

    The first epoch is 0. The training step is not traced anew.

    Raises:
        ModelError: if `epoch` is not an epoch number, or the model in `fit` is not a QAT model.
    """

    def _freezes(self, layer: Quantizing) -> bool:
        return isinstance(layer, ActivationQuantizer)

    def _freeze(self, layer: ActivationQuantizer) -> None:
        layer.freeze()


class FreezeBatchNorm(_FreezeAt):
    """Makes BatchNormalization use its moving statistics from epoch `epoch` on.

    The first epoch is 0. The statistics no longer change, while gamma and beta still train.
    BatchNormalization layers that the plan leaves float are not affected. The training step is
    traced anew only on other backends than TensorFlow, under a distribution strategy, and for a
    layer with an activity regularizer.

    Raises:
        ModelError: if `epoch` is not an epoch number, or the model in `fit` is not a QAT model.
    """

    def _freezes(self, layer: Quantizing) -> bool:
        return isinstance(layer, QuantizeWrapper) and layer.takes_statistics

    def _takes_flag(self, layer: Quantizing) -> bool:
        assert isinstance(layer, QuantizeWrapper)
        # A loss cannot leave a conditional, nor can statistics meet there across replicas.
        plain = getattr(layer.layer, "activity_regularizer", None) is None
        strategy = getattr(self.model, "distribute_strategy", None)
        alone = strategy is None or strategy.num_replicas_in_sync == 1
        return super()._takes_flag(layer) and plain and alone

    def _freeze(self, layer: QuantizeWrapper) -> None:
        layer.freeze_statistics = True
