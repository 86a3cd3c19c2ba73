"""Weights that oscillate between two integers: a penalty against it, and freezing those that do."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.base import ModelError
from kqat.training.callbacks import QatCallback
from kqat.training.weight_wrapper import QuantizeWrapper


class DampenOscillations(QatCallback):
    """Adds a penalty to the loss that draws weights to the middle of their grid cells,

        strength * sum((rounded - clip(w, -qmax * s, qmax * s))**2)

    over all weights, with no gradient of the rounded weight. The strength rises from zero to its
    full value along half a cosine over all steps of `fit`. The training step is not traced anew.

    Args:
        strength: the final weight of the penalty.

    Raises:
        ModelError: if `strength` is not above zero, or the model in `fit` is not a QAT model.

    Reference: Nagel et al. 2022, section 4.2 (https://arxiv.org/abs/2203.11086).
    """

    def __init__(self, strength: float = 1e-3):
        super().__init__()
        if not 0.0 < strength < math.inf:
            raise ModelError(
                f"Expected a strength above zero. Received: strength={strength!r}. Use 0.001."
            )
        self.strength = strength
        self._progress = _Progress()
        self._weight: keras.Variable | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Lets the training step read the weight of the penalty."""
        super().on_train_begin(logs)
        self._weight = self.control(self.wrappers(), "dampening", 0.0)
        self._progress.start(*self.epochs_and_steps())

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the epoch."""
        self._progress.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raises the strength."""
        assert self._weight is not None
        self._weight.assign(self.strength * self._progress.raised(batch))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """No penalty any more: a later `fit` without this callback is an ordinary one."""
        if self._weight is not None:
            self._weight.assign(0.0)


class FreezeOscillations(QatCallback):
    """Keeps a weight at its integer from the step on in which it oscillates too often.

    After each step, with the integer `n` of a weight,

        oscillates = n changed, against the direction of its last change
        f = momentum * oscillates + (1 - momentum) * f
        m = momentum * n + (1 - momentum) * m
        f > threshold: the weight stays `round(m) * s` for good

    The threshold falls along half a cosine over all steps of `fit`. In the logs of an epoch,
    `oscillating` is the share of weights with `f` above the final threshold, and `frozen` the share
    of those that stay. With `steps_per_execution` above one, a step is one execution. A backup does
    not hold what is followed: a fit that goes on from one follows the weights anew.

    Args:
        threshold: of the first and the last step.
        momentum: the weight of one step in the averages.

    Raises:
        ModelError: if a threshold or the momentum is not inside (0, 1), or the model in `fit` is
            not a QAT model.

    Reference: Nagel et al. 2022, section 4.3 and algorithm 1 (https://arxiv.org/abs/2203.11086).
    """

    def __init__(self, threshold: tuple[float, float] = (0.04, 0.01), *, momentum: float = 0.01):
        super().__init__()
        if not all(0.0 < number < 1.0 for number in (*threshold, momentum)):
            raise ModelError(
                f"Expected thresholds and a momentum inside (0, 1). Received: "
                f"threshold={threshold!r}, momentum={momentum!r}. Use (0.04, 0.01) and 0.01."
            )
        self.threshold = tuple(threshold)
        self.momentum = momentum
        self._progress = _Progress()
        self._tracked: list[tuple[QuantizeWrapper, str, FrozenOscillations]] = []
        self._step: Any = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts to follow the weights, at their integers now."""
        super().on_train_begin(logs)
        self._progress.start(*self.epochs_and_steps())
        self._tracked = [
            (wrapper, name, FrozenOscillations(integers_of(wrapper, name)))
            for wrapper in self.wrappers()
            for name in wrapper.weight_specs
        ]
        self._step = self._follow
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            self._step = tf.function(self._follow, autograph=False)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the epoch."""
        self._progress.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Follows the weights through the step, and puts the frozen ones back."""
        first, last = self.threshold
        threshold = first + (last - first) * self._progress.raised(batch)
        self._step(ops.convert_to_tensor(threshold, "float32"))

    def _follow(self, threshold: Any) -> None:
        for wrapper, name, followed in self._tracked:
            followed.freeze(integers_of(wrapper, name), self.momentum, threshold)
        self._hold()

    def _hold(self) -> None:
        for wrapper, name, followed in self._tracked:
            variable = getattr(wrapper.layer, name)
            held = followed.held.value * wrapper.scale(name) / wrapper.fold(name)
            held = ops.cast(held, variable.dtype)
            variable.assign(ops.where(followed.frozen.value > 0.0, held, variable.value))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Puts the frozen ones back: an optimizer with `use_ema` has just averaged all weights."""
        self._hold()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the shares to the logs."""
        if logs is None:
            return
        every = sum(followed.size for *_, followed in self._tracked)
        frozen = sum(float(ops.sum(followed.frozen.value)) for *_, followed in self._tracked)
        often = sum(
            np.count_nonzero(np.asarray(followed.frequency) > self.threshold[1])
            for *_, followed in self._tracked
        )
        logs["oscillating"], logs["frozen"] = float(often) / every, frozen / every


class Oscillations:
    """How often the weights of one tensor oscillate: change to and fro between integers.

    All are float32 variables of the tensor's shape.

    Attributes:
        integers: those of the last step.
        direction: the sign of each weight's last change.
        frequency: the moving average of oscillating.

    Reference: Nagel et al. 2022, section 4.1 (https://arxiv.org/abs/2203.11086).
    """

    def __init__(self, integers: Any) -> None:
        self.size = math.prod(integers.shape)
        self.integers = _variable(integers)
        self.direction, self.frequency = (_zeros(integers.shape) for _ in range(2))

    def update(self, integers: Any, momentum: float) -> None:
        """Takes in the integers after one more step (float32)."""
        change = ops.sign(integers - self.integers.value)
        changed = change != 0.0
        turned = ops.logical_and(changed, change * self.direction.value < 0.0)
        frequency = self.frequency.value
        frequency = frequency + momentum * (ops.cast(turned, "float32") - frequency)
        self.direction.assign(ops.where(changed, change, self.direction.value))
        self.frequency.assign(frequency)
        self.integers.assign(integers)


class FrozenOscillations(Oscillations):
    """The same, with the weights that stay at an integer since they oscillated too often.

    Attributes:
        mean: the moving average of the integers.
        frozen: 1 where a weight stays, else 0.
        held: the integers of frozen weights.
    """

    def __init__(self, integers: Any) -> None:
        super().__init__(integers)
        self.mean = _variable(integers)
        self.frozen, self.held = (_zeros(integers.shape) for _ in range(2))

    def freeze(self, integers: Any, momentum: float, threshold: Any) -> None:
        """Takes in the integers after one more step, and freezes what is above the threshold."""
        self.update(integers, momentum)
        mean = self.mean.value + momentum * (integers - self.mean.value)
        stays = self.frozen.value > 0.0
        new = ops.logical_and(self.frequency.value > threshold, ops.logical_not(stays))
        self.held.assign(ops.where(new, ops.round(mean), self.held.value))
        self.frozen.assign(ops.cast(ops.logical_or(new, stays), "float32"))
        self.mean.assign(mean)


def _variable(value: Any) -> keras.Variable:
    return keras.Variable(value, trainable=False, dtype="float32")


def _zeros(shape: Any) -> keras.Variable:
    return _variable(np.zeros(tuple(shape), np.float32))


def integers_of(wrapper: QuantizeWrapper, name: str) -> Any:
    """The integers of a weight as they are now, in the variable's shape, float32."""
    return ops.round(wrapper.on_grid(name) / wrapper.scale(name))


class _Progress:
    """How far a `fit` is, from its first step to its last."""

    def __init__(self) -> None:
        self.epoch = 0
        self.epochs: int = 1
        self.steps: int | None = None

    def start(self, epochs: int, steps: int | None) -> None:
        self.epochs, self.steps = epochs, steps

    def raised(self, batch: int) -> float:
        """From 0 to 1 along half a cosine; by whole epochs where their steps are not known."""
        done = self.epoch + (batch / self.steps if self.steps else 0.0)
        last = self.epochs - (1.0 / self.steps if self.steps else 1.0)
        share = min(done / last, 1.0) if last > 0.0 else 1.0
        return 0.5 - 0.5 * math.cos(math.pi * share)
