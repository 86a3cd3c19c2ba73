"""Losses that calls add (`add_loss`, `activity_regularizer`), apart from what a model computes.

They tell nothing about outputs, so the nodes of a graph are without them. They are kept beside it,
as functions of values in it, and every model that is rebuilt from the graph adds them again.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


@keras.saving.register_keras_serializable("kqat")
class AddedLoss(keras.layers.Layer):
    """Hands its first input on, and adds a loss that it computes of the others.

    Args:
        function: a functional model of the other inputs, or its serialized form. Its output is the
            loss, or what the regularizer is of. Either this or a regularizer is given, or both.
        activity_penalty: a regularizer, as a layer's `activity_regularizer`; without a function it
            is of the second input.
        label: the name of the user's layer that adds the loss.
        problem: why there is no such function, as it goes on after "a loss that"; no loss is added
            then.
    """

    def __init__(
        self,
        function: Any = None,
        activity_penalty: Any = None,
        label: str = "",
        problem: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        if function is not None and not isinstance(function, keras.Model):
            function = keras.saving.deserialize_keras_object(function)
        self.function, self.label, self.problem = function, label, problem
        self.activity_penalty = keras.regularizers.get(activity_penalty)
        # Keras's own layers know by what a penalty is divided, which its versions do not agree on.
        self.penalized = None
        if self.activity_penalty is not None:
            penalty = {"activity_regularizer": self.activity_penalty}
            self.penalized = keras.layers.Activation("linear", autocast=False, **penalty)

    def call(self, inputs: Sequence[Any]) -> Any:
        """The first input."""
        first, *values = inputs
        if self.function is not None:
            values = [self.function(list(values))]
        if self.penalized is not None:
            self.penalized(values[0])
        elif self.function is not None:
            self.add_loss(values[0])
        return first

    def compute_mask(self, inputs: Sequence[Any], previous_mask: Any = None) -> Any:
        """The mask of the first input."""
        return previous_mask[0] if isinstance(previous_mask, list | tuple) else previous_mask

    def compute_output_spec(self, inputs: Sequence[Any]) -> Any:
        """The first input's."""
        return keras.KerasTensor(inputs[0].shape, dtype=inputs[0].dtype)

    def anew(self, name: str) -> "AddedLoss":
        """One for another model, which shares no variable with this one, and no loss."""
        function = self.function
        if function is not None and function.weights:
            function = keras.models.clone_model(function)
            function.set_weights(self.function.get_weights())
        return AddedLoss(function, self.activity_penalty, self.label, self.problem, name=name)

    def of_members(self, inputs: Sequence[Any], members: Sequence[Any], axis: int) -> "AddedLoss":
        """The same loss, for a model in which what it reads is not joined any more.

        Args:
            inputs: what the loss is made of, one symbolic tensor for each.
            members: for each of these, the members that stand for it, or `None`.
            axis: along which members were joined.

        Returns:
            A loss that takes the members in the place of what they were joined to.
        """
        given: list[Any] = []
        values: list[Any] = []
        for whole, parts in zip(inputs, members, strict=True):
            given += parts or [whole]
            values.append(keras.layers.Concatenate(axis=axis)(parts) if parts else whole)
        old = self.anew(self.name).function
        value = keras.layers.Identity()(values[0] if old is None else old(values))
        function = saved_and_read(keras.Model(given, value))
        return AddedLoss(function, self.activity_penalty, self.label, self.problem)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with function and regularizer serialized."""
        config = super().get_config()
        config.pop("autocast", None)
        function = self.function
        return {
            **config,
            "function": function and keras.saving.serialize_keras_object(function),
            "activity_penalty": keras.regularizers.serialize(self.activity_penalty),
            "label": self.label,
            "problem": self.problem,
        }


@keras.saving.register_keras_serializable("kqat")
class BatchSize(keras.layers.Layer):
    """The number of samples of its input, as a float32 scalar."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)

    def call(self, x: Any) -> Any:
        """The size of the first axis."""
        return keras.ops.cast(keras.ops.shape(x)[0], "float32")

    def compute_output_spec(self, x: Any) -> Any:
        """A scalar."""
        return keras.KerasTensor((), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        """That of every layer."""
        config = super().get_config()
        config.pop("autocast", None)
        return config


@keras.saving.register_keras_serializable("kqat")
class OfEachSample(keras.layers.Layer):
    """A constant for each sample of its input, as the lengths that a loss is given.

    Args:
        value: the constant, without the batch axis, as nested lists of numbers.
        kind: its type.
    """

    def __init__(self, value: Any, kind: str, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.value, self.kind = value, kind

    def call(self, x: Any) -> Any:
        """The constant, as often as `x` has samples."""
        one = keras.ops.convert_to_tensor(self.value, self.kind)
        return keras.ops.repeat(one[None], keras.ops.shape(x)[0], axis=0)

    def compute_output_spec(self, x: Any) -> Any:
        """The constant's shape behind the batch axis."""
        return keras.KerasTensor((x.shape[0], *np.shape(self.value)), dtype=self.kind)

    def get_config(self) -> dict[str, Any]:
        """That of every layer, with `value` and `kind`."""
        config = super().get_config()
        config.pop("autocast", None)
        return {**config, "value": self.value, "kind": self.kind}


def saved_and_read(function: keras.Model) -> keras.Model:
    """A functional model as it comes out of a file, with the same weights."""
    config = keras.saving.serialize_keras_object(function)
    copy = keras.saving.deserialize_keras_object(config)
    copy.set_weights(function.get_weights())
    return copy
