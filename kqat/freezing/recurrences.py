"""Recurrences as they ship: step by step, or as the one operator that an LSTM may be."""

import math
from collections.abc import Callable
from typing import Any

import keras

from kqat.freezing.folding import freeze_layer, gate_numbers
from kqat.freezing.frozen_parts import FrozenParts, Value
from kqat.graph import Node
from kqat.grids import Site
from kqat.parts import FrozenLSTM, GateNumbers, Slice, Stack, Take, Unstack
from kqat.training import QuantizedRecurrence

Step = Callable[[list[Value]], list[Value]]
Rounding = Callable[[Node, Any], Value]


def unrolled(
    node: Node, inputs: list[Value], parts: FrozenParts, step: Step, rounding: Rounding
) -> list[Value]:
    """A recurrence as as many steps as its sequences have, which share weights and grids.

    Args:
        node: the call of the recurrence.
        inputs: its sequences, then its initial states, if it is given any.
        parts: what is collected of the model.
        step: values of one step of each sequence, then the states, to the next states.
        rounding: one of the recurrence's `state_roundings` and a tensor, to the rounded state.

    Returns:
        The node's outputs.
    """
    layer: QuantizedRecurrence = node.layer
    sequences = _sequences(node, inputs[: layer.sequences], parts)
    states = _initial_states(node, inputs[layer.sequences :], sequences[0][0], parts)
    roundings = layer.parts.state_roundings
    states = [rounding(n, state.tensor) for n, state in zip(roundings, states, strict=True)]
    outputs = []
    for values in layer.steps(sequences):
        states = step([*values, *states])
        outputs.append(states[0].tensor)
    return _results(node, outputs, states, parts)


def _sequences(node: Node, inputs: list[Value], parts: FrozenParts) -> list[list[Value]]:
    """The steps of each sequence, in its order."""
    sequences = []
    for index, value in enumerate(inputs):
        unstack = Unstack(dtype="float32", name=parts.free_name(f"{node.name}_unstack_{index}"))
        sequences.append([Value(tensor, value.grid) for tensor in unstack(value.tensor)])
    return sequences


def _initial_states(
    node: Node, given: list[Value], first: Value, parts: FrozenParts
) -> list[Value]:
    """The states before the first step: those given, zeros for the batch of `first` for others."""
    layer: QuantizedRecurrence = node.layer
    inputs = layer.parts.graph.inputs[layer.sequences :]
    shapes = [tuple(size or 0 for size in ref.shape[1:]) for ref in inputs]
    zeros = [
        Value(_zeros(first.tensor, shape, f"{node.name}_zeros_{index}", parts))
        for index, shape in enumerate(shapes[: len(shapes) - len(given)])
    ]
    return [*zeros, *given]


def _zeros(x: Any, shape: tuple[int, ...], name: str, parts: FrozenParts) -> Any:
    """Zeros of a shape without the batch, computed from `x`: a constant would be folded away."""
    size, given = math.prod(shape), math.prod(x.shape[1:])
    if len(x.shape) > 2:
        x = keras.layers.Reshape((given,), dtype="float32", name=parts.free_name(f"{name}_row"))(x)
    if size > given:
        longer = keras.layers.Concatenate(dtype="float32", name=parts.free_name(f"{name}_longer"))
        x = longer([x] * -(-size // given))
    part = Slice([0], [size], [1], dtype="float32", name=parts.free_name(f"{name}_part"))(x)
    if len(shape) > 1:
        part = keras.layers.Reshape(shape, dtype="float32", name=parts.free_name(f"{name}_shaped"))(
            part
        )
    return keras.layers.Subtract(dtype="float32", name=parts.free_name(name))([part, part])


def _results(
    node: Node, outputs: list[Any], states: list[Value], parts: FrozenParts
) -> list[Value]:
    """The node's outputs, of the first state after each step and the states after the last."""
    layer: QuantizedRecurrence = node.layer
    stacked = Stack(dtype="float32", name=parts.free_name(f"{node.name}_stack"))(
        layer.in_order(outputs)
    )
    tensors = layer.results(stacked, [state.tensor for state in states])
    tensors = tensors if layer.return_state else [tensors]
    grids = [states[0].grid, *(state.grid for state in states[layer.own_output :])]
    results = [Value(tensor, grid) for tensor, grid in zip(tensors, grids, strict=False)]
    if layer.return_sequences and grids[0] is not None:
        results[0] = parts.mark(node.name, results[0].tensor, grids[0])
    return results


def fused(
    node: Node, name: str, x: Value, grids: tuple[Site, Site], parts: FrozenParts
) -> list[Value]:
    """A recurrence as the one layer that its operator is; what turns sequences stays apart.

    Args:
        node: the call of the recurrence.
        name: what its value is called.
        x: the sequence, rounded.
        grids: those of the output and of the carry.
        parts: what is collected of the model.
    """
    layer: QuantizedRecurrence = node.layer
    source, (result, carry) = x.grid, grids
    assert source is not None, "a quantizer stands before a fused LSTM"
    gates: dict[str, GateNumbers] = {}
    for wrapper in layer.parts.wrappers:
        frozen, _ = freeze_layer(wrapper)
        parts.weights.extend(frozen)
        gates |= gate_numbers(wrapper.layer, dict(zip(wrapper.weight_specs, frozen, strict=True)))
    backwards = [*range(x.tensor.shape[1])][::-1]
    if layer.go_backwards:
        turned = f"{name}_backwards"
        tensor = Take(backwards, 1, dtype="float32", name=parts.free_name(turned))(x.tensor)
        x = parts.mark(turned, tensor, source)
    own_name = name if name == layer.label else parts.free_name(name)
    whole = FrozenLSTM(gates, source=source, carry=carry, result=result, name=own_name)
    parts.lstms.append(whole)
    if layer.return_sequences and not layer.flip:
        return [parts.mark(name, whole(x.tensor), result)]
    y = parts.mark(f"{name}_steps", whole(x.tensor), result).tensor
    if layer.return_sequences:
        y = Take(backwards, 1, dtype="float32", name=parts.free_name(f"{name}_flip"))(y)
    else:
        y = _last(y, f"{name}_last", parts)
    return [parts.mark(name, y, result)]


def _last(x: Any, name: str, parts: FrozenParts) -> Any:
    """The last step of a sequence, shape `(batch, units)`."""
    steps, units = x.shape[1:]
    part = Slice(
        [steps - 1, 0],
        [steps, units],
        [1, 1],
        dtype="float32",
        name=parts.free_name(f"{name}_slice"),
    )(x)
    return keras.layers.Reshape((units,), dtype="float32", name=parts.free_name(name))(part)
