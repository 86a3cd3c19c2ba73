"""Callbacks for `fit` that freeze ranges and BatchNormalization statistics from some epoch on.

Early in training both should follow the weights. At the end they should not change, so that the
last epochs train with exactly the numbers that ship (Krishnamoorthi 2018, section 3.2.3,
https://arxiv.org/abs/1806.08342).
"""

from typing import Any

import keras

from kqat.base import ModelError
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import all_layers, is_quantized
from kqat.training.weight_wrapper import QuantizeWrapper


class _FreezeAt(keras.callbacks.Callback):
    """Freezes layers of a QAT model at the beginning of an epoch, and keeps them frozen."""

    def __init__(self, epoch: int):
        super().__init__()
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ModelError(
                f"Expected the epoch to freeze at, 0 for the first. Received: epoch={epoch!r}. Use "
                "an integer from 0 on."
            )
        self.epoch = epoch
        self._frozen = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that there is something to freeze."""
        if not is_quantized(self.model):
            raise ModelError(
                f"Expected a QAT model for {type(self).__name__}. Received: '{self.model.name}', "
                "which is float. Use kqat.quantize_model first."
            )
        self._frozen = False

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Freezes, once `epoch` is reached."""
        if epoch < self.epoch or self._frozen:
            return
        for layer in all_layers(self.model):
            self._freeze(layer)
        self._frozen = True
        # The training step was traced with the old flags.
        self.model.make_train_function(force=True)

    def _freeze(self, layer: Any) -> None:
        raise NotImplementedError


class FreezeObservers(_FreezeAt):
    """Stops the observers: the ranges of all quantizers are fixed from epoch `epoch` on.

    The first epoch is 0.

    Raises:
        ModelError: if `epoch` is not an epoch number, or the model in `fit` is not a QAT model.
    """

    def _freeze(self, layer: Any) -> None:
        if isinstance(layer, ActivationQuantizer):
            layer.trainable = False


class FreezeBatchNorm(_FreezeAt):
    """Makes BatchNormalization use its moving statistics from epoch `epoch` on.

    The first epoch is 0. The statistics no longer change, while gamma and beta still train.
    BatchNormalization layers that the plan leaves float are not affected.

    Raises:
        ModelError: if `epoch` is not an epoch number, or the model in `fit` is not a QAT model.
    """

    def _freeze(self, layer: Any) -> None:
        if isinstance(layer, QuantizeWrapper):
            layer.freeze_statistics = True
