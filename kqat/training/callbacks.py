"""Callbacks for `fit`: when ranges and BatchNorm statistics stop moving.

Early in training both should follow the weights; at the end they should hold still, so that the
last epochs train the very numbers that ship (Krishnamoorthi 2018, section 3.2.3,
https://arxiv.org/abs/1806.08342).
"""

from typing import Any

import keras

from kqat.base import ModelError
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import all_layers, is_quantized
from kqat.training.weight_wrapper import QuantizeWrapper


class _FreezeAt(keras.callbacks.Callback):
    """Freezes something of a QAT model at the beginning of an epoch, and keeps it frozen."""

    def __init__(self, epoch: int):
        super().__init__()
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ModelError(
                f"Expected the epoch to freeze at, 0 for the first. Received: epoch={epoch!r}."
            )
        self.epoch = epoch
        self._frozen = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that there is something to freeze."""
        if not is_quantized(self.model):
            raise ModelError(
                f"Expected a QAT model for {type(self).__name__}. Received: '{self.model.name}'."
            )
        self._frozen = False

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Freezes, once `epoch` is reached."""
        if epoch < self.epoch or self._frozen:
            return
        for layer in all_layers(self.model):
            self._freeze(layer)
        self._frozen = True
        # The step was traced with the old flags.
        self.model.make_train_function(force=True)

    def _freeze(self, layer: Any) -> None:
        raise NotImplementedError


class FreezeObservers(_FreezeAt):
    """Stops the ranges of all quantizers from epoch `epoch` (0 is the first) on.

    Raises:
        ModelError: if `epoch` is no such number, or the model in `fit` is not a QAT model.
    """

    def _freeze(self, layer: Any) -> None:
        if isinstance(layer, ActivationQuantizer):
            layer.trainable = False


class FreezeBatchNorm(_FreezeAt):
    """Has BatchNormalization use its moving statistics from epoch `epoch` (0 is the first) on.

    The statistics stop; gamma and beta go on learning. BatchNormalization that the plan leaves
    float is left alone.

    Raises:
        ModelError: if `epoch` is no such number, or the model in `fit` is not a QAT model.
    """

    def _freeze(self, layer: Any) -> None:
        if isinstance(layer, QuantizeWrapper):
            layer.freeze_statistics = True
