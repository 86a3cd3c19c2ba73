"""Keras's `compile` as it is, but that a step is traced once instead of twice.

TensorFlow traces a step twice that makes variables: the optimizer's own, or those of a metric that
is given by its name. A trace takes seconds, and it is most of what a `fit` of few batches costs.
Code that is run as its readers see it (pages, notebooks, the README) cannot make them before.
"""

from typing import Any

import keras

# The class that has it: loading warns of a model class whose `compile` is another than that.
OWNER: Any = next(kind for kind in keras.Model.__mro__ if "compile" in vars(kind))
_compile = OWNER.compile


def compile(
    self: keras.Model,
    optimizer: Any = None,
    loss: Any = None,
    loss_weights: Any = None,
    metrics: Any = None,
    **options: Any,
) -> None:
    """`keras.Model.compile`, with all variables made at once."""
    kind = keras.losses.SparseCategoricalCrossentropy
    named = metrics == ["accuracy"]
    if named and (loss == "sparse_categorical_crossentropy" or isinstance(loss, kind)):
        # What Keras takes for the name, once it sees the loss.
        metrics = [keras.metrics.SparseCategoricalAccuracy("accuracy")]
    _compile(self, optimizer or "rmsprop", loss, loss_weights, metrics, **options)
    if optimizer is not None and self.built:
        self.optimizer.build(self.trainable_variables)


def use() -> None:
    """Makes it the `compile` of this process."""
    OWNER.compile = compile
