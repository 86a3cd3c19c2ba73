"""`StochasticRounding`: training rounds weights up or down at random."""

from typing import Any

import keras

from kqat.base import ModelError
from kqat.grids import Binary, LearnedTernary, Ternary
from kqat.training.callbacks import QatCallback, check_epoch


class StochasticRounding(QatCallback):
    """Rounds weights at random until epoch `until`, and to the nearest integer from then on.

    A weight `w = (n + r) * s` with `0 <= r < 1` becomes `(n + 1) * s` with the probability `r`,
    else `n * s`: the mean is `w`. Gradients are those of the config. `evaluate` and the file round
    to the nearest integer at all times. The training step is not traced anew. The random numbers
    are not in a backup: a fit that goes on from one draws them from the seed again.

    Args:
        until: the first epoch that rounds to the nearest; `None` for none.
        seed: of the random numbers.

    Raises:
        ModelError: if `until` is no epoch number, or the model in `fit` is not a QAT model, or has
            ternary or binary weights, whose values are not neighbours on a grid of equal steps.

    Reference: Gupta et al. 2015, section 3.1 (https://arxiv.org/abs/1502.02551).
    """

    def __init__(self, until: int | None = None, *, seed: int = 0):
        super().__init__()
        self.until = None if until is None else check_epoch("until", until)
        self.seed = seed
        self._random: keras.Variable | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Lets the training step read how much noise it adds before rounding."""
        super().on_train_begin(logs)
        wrappers = self.wrappers()
        for wrapper in wrappers:
            if isinstance(wrapper.weight_step, Ternary | LearnedTernary | Binary):
                raise ModelError(
                    f"Expected weights with integers in equal steps for StochasticRounding. "
                    f"Received: '{wrapper.layer.name}' with {wrapper.weight_step}. Use another "
                    "weight_step, such as kqat.LearnedStep(), with 2 bits or more."
                )
        self._random = self.control(wrappers, "random", 0.0)
        seeds = next((w.controls.seeds for w in wrappers if w.controls.seeds is not None), None)
        for wrapper in wrappers:
            wrapper.controls.seeds = seeds = seeds or keras.random.SeedGenerator(self.seed)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Switches to the nearest integer, once `until` is reached."""
        assert self._random is not None
        self._random.assign(float(self.until is None or epoch < self.until))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Rounds to the nearest: a later `fit` without this callback is an ordinary one."""
        if self._random is not None:
            self._random.assign(0.0)
