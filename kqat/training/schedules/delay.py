"""`QuantizeAfter`: the first steps of training are not rounded."""

from typing import Any

import keras
from keras import ops

from kqat.base import ModelError
from kqat.training.callbacks import QatCallback


class QuantizeAfter(QatCallback):
    """Lets training run in floats for `steps` steps of the optimizer, and rounds from then on.

    Ranges are observed meanwhile. `evaluate` and the file are rounded at all times. What a fused
    LSTM rounds inside its operator is rounded from the first step on. The training step is not
    traced anew.

    Args:
        steps: how many steps; those that the optimizer has taken before count.

    Raises:
        ModelError: if `steps` is no number of steps, or the model in `fit` is not a QAT model.

    Reference: Jacob et al. 2018, section 3.1 (https://arxiv.org/abs/1712.05877), where activations
    wait; here weights do too.
    """

    def __init__(self, steps: int):
        super().__init__()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ModelError(
                f"Expected a number of steps, 0 or more. Received: steps={steps!r}. Use an integer."
            )
        self.steps = steps
        self._rounds: keras.Variable | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Lets the training step read whether it rounds."""
        super().on_train_begin(logs)
        self._rounds = self.control(list(self.quantizing_layers()), "rounds", 1.0)
        self._follow()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reads the steps again, which a callback behind this one may have given back."""
        self._follow()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Rounds, once the steps were taken."""
        if self._rounds is not None and self._done() >= self.steps:
            self._rounds.assign(1.0)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Rounds: a later `fit` without this callback is an ordinary one."""
        if self._rounds is not None:
            self._rounds.assign(1.0)

    def _follow(self) -> None:
        if self._rounds is not None:
            self._rounds.assign(float(self._done() >= self.steps))

    def _done(self) -> int:
        # A strategy has one variable for each replica, and accumulated gradients make it a tensor.
        return int(ops.convert_to_numpy(ops.convert_to_tensor(self.optimizer().iterations)))
