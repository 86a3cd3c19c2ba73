"""`Controls`: numbers that callbacks change during training, without tracing the step anew."""

from typing import Any

import keras
from keras import ops


class Controls:
    """What the callbacks of a `fit` ask of one quantizing layer.

    Each is a scalar float32 variable that a callback made, or `None` where no callback asks for it:
    then the training step has no operator for it. Keras, which would save such variables with the
    layer, does not look in here.

    Attributes:
        frozen: 1 where ranges, or the statistics of BatchNormalization, are to stay; else 0.
        rounds: 1 where training rounds, 0 where it does not yet.
        random: how much of a step's width is added to weights as noise before rounding: 1 rounds
            at random, up or down with the probability that keeps the mean, 0 to the nearest.
        seeds: where that noise comes from.
        dampening: the weight of the oscillation penalty in the loss.
        still: whether weights are rounded as in inference, without noise, in training too.
        are_read: whether a training step called the layer since a callback last asked for more of
            it. A step that was compiled before goes on without what was asked.
    """

    def __init__(self, *, still: bool = False) -> None:
        self.still = still
        self.frozen: keras.Variable | None = None
        self.rounds: keras.Variable | None = None
        self.random: keras.Variable | None = None
        self.seeds: Any = None
        self.dampening: keras.Variable | None = None
        self.are_read = False

    def thaws(self) -> Any:
        """A boolean tensor, whether values may still move; `None` if no callback may freeze."""
        return None if self.frozen is None else self.frozen.value < 0.5

    def if_rounding(self, rounded: Any, plain: Any) -> Any:
        """The first while training rounds, the second before."""
        if self.rounds is None:
            return rounded
        return ops.where(self.rounds.value > 0.5, rounded, plain)

    def shaken(self, weight: Any, scale: Any) -> Any:
        """`weight` with the noise that makes rounding random; `scale` is one step."""
        if self.random is None:
            return weight
        noise = keras.random.uniform(ops.shape(weight), -0.5, 0.5, seed=self.seeds)
        return weight + ops.stop_gradient(noise * (scale * self.random.value))
