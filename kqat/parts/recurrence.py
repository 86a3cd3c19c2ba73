"""A recurrence as one layer: a model of one step, run along time.

What happens in a step is an ordinary model, so that it is planned, quantized and frozen like any
other; only the loop is special. In training the loop is run here; in the file it is unrolled, or
one operator, where the step is of that operator's layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers, ops

from kqat.parts.lstm_step import LstmState, RecurrenceKind

Step = Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]]


@keras.saving.register_keras_serializable("kqat")
class Unstack(layers.Layer):
    """The steps of a sequence: `(batch, steps, …)` to `steps` times `(batch, …)`."""

    def call(self, x: Any) -> list[Any]:
        """The steps, in order."""
        if keras.backend.standardize_dtype(x.dtype) == "bool":
            # TFLite Micro's UNPACK takes no booleans; its STRIDED_SLICE does.
            return [x[:, step] for step in range(x.shape[1])]
        return ops.unstack(x, axis=1)

    def compute_output_spec(self, x: Any) -> list[Any]:
        """One spec per step."""
        shape = (x.shape[0], *x.shape[2:])
        return [keras.KerasTensor(shape, dtype=x.dtype) for _ in range(x.shape[1])]


@keras.saving.register_keras_serializable("kqat")
class Stack(layers.Layer):
    """The inverse of `Unstack`: a list of `(batch, …)` to `(batch, steps, …)`."""

    def call(self, inputs: Sequence[Any]) -> Any:
        """The sequence."""
        return ops.stack(list(inputs), axis=1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """`(batch, steps, features)`."""
        return (input_shape[0][0], len(input_shape), *input_shape[0][1:])


@keras.saving.register_keras_serializable("kqat")
class Recurrence(layers.Layer):
    """`h[t], … = step(x[t], …, h[t-1], …)` along the second axis, beginning with zeros.

    Takes a list: sequences of shape `(batch, steps, features)`, then, if given, one initial state
    of shape `(batch, units)` per state; both may have more axes, as images have. Returns the first
    state of the last step, or of all steps; with `return_state` a list of that and the last step's
    states.

    Args:
        step: model of one step: a step of each sequence, then the states, to the next states.
        sequences: how many of the step's inputs are sequences.
        return_sequences: whether the output is that of all steps, `(batch, steps, units)`.
        return_state: whether the last states are returned, too.
        go_backwards: whether the last step comes first, in time and in the output.
        flip: whether the output's steps are put in reverse order.
        own_output: whether the step's first state is the output alone. It begins with zeros even
            where states are given, and is none of the states that are returned.
    """

    def __init__(
        self,
        step: keras.Model,
        sequences: int,
        *,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        flip: bool = False,
        own_output: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.step = step
        self.sequences = sequences
        self.return_sequences = return_sequences
        self.return_state = return_state
        self.go_backwards = go_backwards
        self.flip = flip
        self.own_output = own_output

    def call(self, inputs: Sequence[Any], training: bool | None = None) -> Any:
        """The states; see the class."""

        def step(values: list[Any], notes: list[Any]) -> tuple[list[Any], list[Any]]:
            return _as_list(self.step(values, training=training)), notes

        return self.scan(inputs, step, [])[0]

    def scan(self, inputs: Sequence[Any], step: Step, notes: list[Any]) -> tuple[Any, list[Any]]:
        """What `call` returns, by a loop that is traced once, and what was noted on the way.

        Args:
            inputs: as for `call`.
            step: `step(values, notes)` returns the next states and notes.
            notes: tensors that go from step to step.
        """
        sequences = [ops.swapaxes(x, 0, 1) for x in inputs[: self.sequences]]
        if self.go_backwards:
            sequences = [ops.flip(x, axis=0) for x in sequences]

        def body(carry: Any, values: Any) -> tuple[Any, Any]:
            carry = step([*values, *carry[0]], list(carry[1]))
            # On TensorFlow, what is stacked must have the structure of what is carried.
            return carry, carry

        states = self.first_states(inputs)
        (states, notes), (stacked, _) = ops.scan(body, (states, notes), sequences)
        outputs = ops.flip(stacked[0], axis=0) if self.flip else stacked[0]
        return self.results(ops.swapaxes(outputs, 0, 1), states), notes

    def first_states(self, inputs: Sequence[Any]) -> list[Any]:
        """The states before the first step: those given, and zeros for the others."""
        given = list(inputs[self.sequences :])
        batch = ops.shape(inputs[0])[0]
        rest = self.step.inputs[self.sequences : len(self.step.inputs) - len(given)]
        zeros = [ops.zeros((batch, *state.shape[1:]), dtype=inputs[0].dtype) for state in rest]
        return [*zeros, *given]

    def steps(self, sequences: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """The sequences' values step by step, in the order in which the steps run."""
        steps = list(zip(*sequences, strict=True))
        return steps[::-1] if self.go_backwards else steps

    def results(self, outputs: Any, states: list[Any]) -> Any:
        """What the layer returns, of the output of all steps and the last states."""
        output = outputs if self.return_sequences else states[0]
        return [output, *states[self.own_output :]] if self.return_state else output

    def in_order(self, outputs: list[Any]) -> list[Any]:
        """The steps' outputs, in the order in which they ran, as they stand in the output."""
        return outputs[::-1] if self.flip else outputs

    def compute_output_spec(self, inputs: Sequence[Any], training: bool | None = None) -> Any:
        """Specs of what `call` returns."""
        batch, steps = inputs[0].shape[:2]
        states = [
            keras.KerasTensor((batch, *state.shape[1:]), dtype=self.compute_dtype)
            for state in self.step.outputs
        ]
        whole = (batch, steps, *states[0].shape[1:])
        output = keras.KerasTensor(whole, dtype=self.compute_dtype)
        output = output if self.return_sequences else states[0]
        return [output, *states[self.own_output :]] if self.return_state else output

    def get_config(self) -> dict[str, Any]:
        """The serialized step and the options."""
        return {**self.options(), "step": keras.saving.serialize_keras_object(self.step)}

    def options(self) -> dict[str, Any]:
        """The config without the step."""
        return {
            **super().get_config(),
            "sequences": self.sequences,
            "return_sequences": self.return_sequences,
            "return_state": self.return_state,
            "go_backwards": self.go_backwards,
            "flip": self.flip,
            "own_output": self.own_output,
        }

    @property
    def kind(self) -> RecurrenceKind:
        """How it ships: as one operator where the step is made of that operator's layers."""
        parts = [getattr(layer, "layer", layer) for layer in self.step.layers]
        if not any(isinstance(part, LstmState) for part in parts):
            return RecurrenceKind.UNROLLED
        turned = self.go_backwards or self.flip
        return RecurrenceKind.FUSED_BACKWARDS if turned else RecurrenceKind.FUSED

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Recurrence":
        """The inverse of `get_config`."""
        return cls(keras.saving.deserialize_keras_object(config.pop("step")), **config)


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]
