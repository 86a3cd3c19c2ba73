"""Rewrites SimpleRNN, LSTM, GRU and Bidirectional as Dense layers and a `Recurrence`.

A mask is a sequence of truth values beside the others: where it is false, a step's `Hold` chooses
the states before the step, which is exact in integers.

The product of the input with a gate's kernel does not depend on the state. So it is one `Dense`
over the whole sequence, one FULLY_CONNECTED in the file. Gates with the same activation are
computed together.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Part
from kqat.parts import Hold, Recurrence, Slice
from kqat.rewrites.layers.basic import Decomposed, activation_layer
from kqat.rewrites.layers.step_masks import truth_of_steps


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The parts of a cell: projections of the whole sequence, and the recurrence over them."""

    dropout: float
    projections: tuple[Callable[..., Any], ...]
    recurrence: Recurrence
    name: str

    def __call__(self, x: Any, states: Sequence[Any], mask: Any = None) -> Any:
        if self.dropout:
            # Keras's cells use one dropout mask for all steps.
            x = layers.SpatialDropout1D(self.dropout, name=f"{self.name}_dropout")(x)
        sequences = [project(x) for project in self.projections]
        if mask is not None:
            sequences.append(layers.Reshape((mask.shape[1], 1), name=f"{self.name}_mask")(mask))
        return self.recurrence([*sequences, *states])


def rnn(layer: Any, name: str, *, flip: bool = False, cells: "Cells | None" = None) -> Decomposed:
    """`SimpleRNN`, `LSTM`, `GRU`, or `RNN` around such a cell or a stack of them.

    Dropout draws one mask for each matrix product; Keras may draw one for each gate.

    Args:
        layer, name: the layer, and its name in the model.
        flip: whether to reverse the steps of the output.
        cells: class of a cell -> the function that builds the model of its step.

    Raises:
        UnsupportedLayerError: if the layer is stateful, or its cell is not in `cells`.
    """
    steps = cells or _CELLS
    _check(layer, name, steps)
    stacked = isinstance(layer.cell, layers.StackedRNNCells)
    inner = list(layer.cell.cells) if stacked else [layer.cell]
    made: dict[_Held | None, list[_Cell]] = {}

    def parts(held: _Held | None) -> list[_Cell]:
        """The cells, made for the first call: later ones share their weights."""
        if made and held not in made:
            raise UnsupportedLayerError(
                f"Expected a mask in all calls of layer '{name}' or in none, and initial states "
                "in all calls with a mask or in none. Received: both. Its calls share one step, "
                "which is made for the one or the other. Use two layers."
            )
        for index, cell in enumerate(inner if not made else []):
            last = index == len(inner) - 1
            options = {
                "return_sequences": layer.return_sequences or not last,
                "return_state": layer.return_state,
                "go_backwards": layer.go_backwards,
                # Between cells the steps are in their own order, as those of the mask are.
                "flip": flip if last else layer.go_backwards,
            }
            cell_name = name if last else f"{name}_{cell.name}"
            part_held = held if last or held is None else _Held(False, False)
            part = _take_apart(cell, layer, cell_name, options, steps[type(cell)], part_held)
            made.setdefault(held, []).append(part)
        return made[held]

    def call(x: Any, initial_state: Any = None, mask: Any = None) -> Any:
        given = keras.tree.flatten(initial_state) if initial_state is not None else []
        masks = [m for m in keras.tree.flatten(mask) if m is not None]
        mask = truth_of_steps(masks[0] if masks else None, name)
        held = None if mask is None else _Held(layer.zero_output_for_mask, bool(given))
        states: list[Any] = []
        for part, cell in zip(parts(held), inner, strict=True):
            count = len(keras.tree.flatten(cell.state_size)) if given else 0
            initial, given = given[:count], given[count:]
            x = part(x, initial, mask)
            if layer.return_state:
                x, *last_states = x
                states += last_states
        return [x, *states] if layer.return_state else x

    return call


def bidirectional(layer: Any, name: str, *, make: Callable[..., Decomposed] = rnn) -> Decomposed:
    """`Bidirectional` as two recurrent layers whose outputs are merged.

    Reference: Schuster & Paliwal 1997, section III (https://doi.org/10.1109/78.650093).
    """
    for inner in (layer.forward_layer, layer.backward_layer):
        if not hasattr(inner, "cell"):
            raise UnsupportedLayerError(
                f"Expected a recurrent layer in Bidirectional layer '{name}'. Received: "
                f"{type(inner).__name__}. Use SimpleRNN, LSTM, GRU, or RNN around their cells."
            )
    forward = make(layer.forward_layer, f"{name}_forward")
    backward = make(layer.backward_layer, f"{name}_backward", flip=layer.return_sequences)
    merges = {
        "concat": layers.Concatenate,
        "sum": layers.Add,
        "ave": layers.Average,
        "mul": layers.Multiply,
    }
    merge = merges[layer.merge_mode](name=name) if layer.merge_mode else list

    def call(x: Any, initial_state: Any = None, mask: Any = None) -> Any:
        half = len(initial_state) // 2 if initial_state is not None else 0
        given = (initial_state[:half], initial_state[half:]) if half else (None, None)
        ahead, back = (
            run(x, initial_state=state, mask=mask)
            for run, state in zip((forward, backward), given, strict=True)
        )
        if not layer.return_state:
            return merge([ahead, back])
        merged = merge([ahead[0], back[0]])
        first = merged if isinstance(merged, list) else [merged]
        return [*first, *ahead[1:], *back[1:]]

    return call


def _check(layer: Any, name: str, cells: "Cells") -> None:
    if layer.stateful:
        raise UnsupportedLayerError(
            f"Expected stateful=False in layer '{name}'. Received: True. The file keeps no state "
            "from one invocation to the next. Use return_state=True and initial_state, and pass "
            "the states yourself."
        )
    if layer.activity_regularizer is not None:
        raise UnsupportedLayerError(
            f"Expected no activity_regularizer in layer '{name}', which kqat splits into simpler "
            "layers. Put keras.layers.ActivityRegularization after it."
        )
    inner = getattr(layer.cell, "cells", [layer.cell])
    unknown = [type(cell).__name__ for cell in inner if type(cell) not in cells]
    if unknown:
        raise UnsupportedLayerError(
            f"Expected one of the cells {sorted(cls.__name__ for cls in cells)} in layer "
            f"'{name}'. Received: {', '.join(unknown)}. Leave the layer float, or use one of these "
            "cells."
        )
    asked = [
        option
        for cell in inner
        for option in ("kernel_constraint", "recurrent_constraint", "bias_constraint")
        if getattr(cell, option) is not None
    ]
    if asked:
        raise UnsupportedLayerError(
            f"Expected no {' or '.join(sorted(set(asked)))} in layer '{name}': kqat splits its "
            "kernels by gate. Use a regularizer, or remove the constraint."
        )


@dataclasses.dataclass(frozen=True)
class _Held:
    """What the output of a step is that the mask leaves out.

    Args:
        zero: whether it is zero, and not that of the step before.
        starts: whether states are given to start with, which no output is before a step counted.
    """

    zero: bool
    starts: bool

    @property
    def own_output(self) -> bool:
        """Whether the output may be another than the state."""
        return self.zero or self.starts


def _take_apart(
    cell: Any,
    layer: Any,
    name: str,
    options: dict[str, bool],
    make_step: "MakeStep",
    held: _Held | None,
) -> _Cell:
    builder = Builder(cell, name, layer.trainable and cell.trainable, held)
    step = make_step(builder)
    trainable = builder.trainable
    sequences = len(builder.projections) + (held is not None)
    own_output = held is not None and held.own_output
    recurrence = Recurrence(step, sequences, name=name, own_output=own_output, **options)
    recurrence.trainable = trainable
    return _Cell(cell.dropout, tuple(builder.projections), recurrence, name)


class Builder:
    """Builds the model of one step, gate by gate; each kind of cell has a function that uses it.

    `project` makes `x W + b` of some gates, `recur` makes `h R + b` of them. The products `x W` are
    not part of the step: each becomes a `Dense` over the whole sequence in `projections`.
    """

    def __init__(self, cell: Any, name: str, trainable: bool, held: _Held | None = None):
        self.cell, self.name, self.trainable, self.held = cell, name, trainable, held
        self.units = cell.units
        self.projections: list[Callable[..., Any]] = []
        self.kernel = np.asarray(cell.kernel)
        self.recurrent_kernel = np.asarray(cell.recurrent_kernel)
        self.bias: np.ndarray | None = None
        self.recurrent_bias: np.ndarray | None = None
        if cell.use_bias:
            bias = np.asarray(cell.bias)
            # GRU with reset_after has one bias for `x W` and another for `h R`.
            self.bias, self.recurrent_bias = bias if bias.ndim == 2 else (bias, None)

    def part_name(self, part: str) -> str:
        """The name of a part: the layer's name, and what the part is."""
        return f"{self.name}_{part}"

    def project(self, part: str, gates: Sequence[int], signs: Sequence[int] = ()) -> Any:
        """One step of `x W + b` for some gates, which is computed for all steps outside."""
        options = self.regularizers("kernel_regularizer")
        name = self.part_name(f"{part}_input")
        dense = self._dense(name, self.kernel, self.bias, gates, signs, options)
        self.projections.append(dense)
        return keras.Input((len(gates) * self.units,), name=f"{name}_step")

    def recur(self, part: str, h: Any, gates: Sequence[int], signs: Sequence[int] = ()) -> Any:
        """`h R + b` for some gates."""
        name = self.part_name(f"{part}_recurrent")
        if self.cell.recurrent_dropout:
            h = layers.Dropout(self.cell.recurrent_dropout, name=f"{name}_dropout")(h)
        options = self.regularizers("recurrent_regularizer")
        kernel, bias = self.recurrent_kernel, self.recurrent_bias
        return self._dense(name, kernel, bias, gates, signs, options)(h)

    def regularizers(self, kernel: str, recurrent: str | None = None) -> dict[str, Any]:
        """The cell's regularizers of these names, as arguments of a part."""
        copies = {"kernel_regularizer": kernel, "bias_regularizer": "bias_regularizer"}
        if recurrent is not None:
            copies["recurrent_regularizer"] = recurrent
        return {key: getattr(self.cell, name) for key, name in copies.items()}

    def _dense(
        self,
        name: str,
        kernel: np.ndarray,
        bias: np.ndarray | None,
        gates: Sequence[int],
        signs: Sequence[int],
        options: dict[str, Any],
    ) -> Part:
        def chosen(array: np.ndarray) -> np.ndarray:
            columns = [array[..., g * self.units : (g + 1) * self.units] for g in gates]
            signed = zip(columns, signs or [1] * len(columns), strict=True)
            return np.concatenate([sign * part for part, sign in signed], axis=-1)

        units = len(gates) * self.units
        dense = layers.Dense(units, use_bias=bias is not None, name=name, **options)
        dense.trainable = self.trainable
        return Part(dense, [chosen(kernel)] if bias is None else [chosen(kernel), chosen(bias)])

    def add(self, part: str, a: Any, b: Any) -> Any:
        """The layer `a + b`."""
        return layers.Add(name=self.part_name(part))([b, a])

    def multiply(self, part: str, a: Any, b: Any) -> Any:
        """The layer `a * b`."""
        return layers.Multiply(name=self.part_name(part))([a, b])

    def activate(self, part: str, function: Any, x: Any) -> Any:
        """`function(x)`; a linear one needs no layer."""
        if function is keras.activations.linear:
            return x
        return activation_layer(function, self.part_name(part))(x)

    def divide(self, x: Any, *parts: str) -> list[Any]:
        """Splits gates that were computed together into one tensor for each of `parts`."""
        units = self.units
        return [
            Slice([i * units], [(i + 1) * units], [1], name=self.part_name(part))(x)
            for i, part in enumerate(parts)
        ]

    def state(self, part: str) -> Any:
        """A state as it is before the step."""
        return keras.Input((self.units,), name=self.part_name(part))

    def model(self, inputs: list[Any], outputs: list[Any]) -> keras.Model:
        """The model of the step: projections and states in, new states out.

        With a mask, it is the last of the sequences, and states are held where it is false.
        """
        if self.held is not None:
            inputs, outputs = self._held(self.held, inputs, outputs)
        return keras.Model(inputs, outputs, name=self.part_name("step"))

    def _held(
        self, held: _Held, inputs: list[Any], outputs: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        sequences, states = inputs[: -len(outputs)], inputs[-len(outputs) :]
        counts = keras.Input((1,), dtype="bool", name=self.part_name("mask_step"))
        names = ["held_state", "held_carry"]
        after = [
            Hold(name=self.part_name(name))([counts, new, before])
            for name, new, before in zip(names, outputs, states, strict=False)
        ]
        if held.own_output:
            before = other = self.state("output_before")
            if held.zero:
                zero = self.part_name("output_zero")
                other = layers.Subtract(name=zero)([before, before])
            shown = Hold(name=self.part_name("shown"))([counts, outputs[0], other])
            states, after = [before, *states], [shown, *after]
        return [*sequences, counts, *states], after


def _simple(builder: Builder) -> keras.Model:
    """`h = f(x W + h R + b)`."""
    x, h = builder.project("sum", [0]), builder.state("state")
    total = builder.add("sum", x, builder.recur("sum", h, [0]))
    return builder.model([x, h], [builder.activate("output", builder.cell.activation, total)])


def _lstm(builder: Builder) -> keras.Model:
    """`c = f c + i g`, `h = o tanh(c)`.

    Reference: Gers et al. 2000, section 3.1 (https://doi.org/10.1162/089976600300015015).
    """
    cell = builder.cell
    # Keras's order of gates: input, forget, candidate, output.
    x, x_candidate = builder.project("gates", [0, 1, 3]), builder.project("candidate", [2])
    h, c = builder.state("state"), builder.state("carry_state")
    gates = builder.add("gates_sum", x, builder.recur("gates", h, [0, 1, 3]))
    gates = builder.activate("gates", cell.recurrent_activation, gates)
    i, f, o = builder.divide(gates, "input_gate", "forget_gate", "output_gate")
    g = builder.add("candidate_sum", x_candidate, builder.recur("candidate", h, [2]))
    g = builder.activate("candidate", cell.activation, g)
    carry = builder.add("carry", builder.multiply("kept", f, c), builder.multiply("new", i, g))
    squashed = builder.activate("squashed", cell.activation, carry)
    output = builder.multiply("output", o, squashed)
    return builder.model([x, x_candidate, h, c], [output, carry])


# Functions with f(-x) == 1 - f(x).
_COMPLEMENTARY = (keras.activations.sigmoid, keras.activations.hard_sigmoid)


def _gru(builder: Builder) -> keras.Model:
    """`h' = h + (1 - z) (g - h)`.

    Where `1 - z` is the integer zero, this keeps `h` exactly, for any number of steps. The usual
    form `z h + (1 - z) g` would lose 1/256 of `h` in every step, because an 8-bit sigmoid cannot
    be one. The weights of z are negated, so that the sigmoid itself gives `1 - z`.
    Reference: Cho et al. 2014, section 2.3 (https://arxiv.org/abs/1406.1078).
    """
    cell = builder.cell
    signs = [-1 if cell.recurrent_activation in _COMPLEMENTARY else 1, 1]
    # Keras's order of gates: update, reset, candidate.
    x, x_candidate = builder.project("gates", [0, 1], signs), builder.project("candidate", [2])
    h = builder.state("state")
    gates = builder.add("gates_sum", x, builder.recur("gates", h, [0, 1], signs))
    gates = builder.activate("gates", cell.recurrent_activation, gates)
    update, reset = builder.divide(gates, "update_gate", "reset_gate")
    if signs[0] == 1:
        update = layers.Rescaling(-1.0, 1.0, name=builder.part_name("complement"))(update)
    if cell.reset_after:
        recurrent = builder.multiply("reset", reset, builder.recur("candidate", h, [2]))
    else:
        recurrent = builder.recur("candidate", builder.multiply("reset", reset, h), [2])
    candidate = builder.add("candidate_sum", x_candidate, recurrent)
    candidate = builder.activate("candidate", cell.activation, candidate)
    change = layers.Subtract(name=builder.part_name("difference"))([candidate, h])
    output = builder.add("output", h, builder.multiply("change", update, change))
    return builder.model([x, x_candidate, h], [output])


_CELLS: dict[type, Callable[[Builder], keras.Model]] = {
    layers.SimpleRNNCell: _simple,
    layers.LSTMCell: _lstm,
    layers.GRUCell: _gru,
}

MakeStep = Callable[[Builder], keras.Model]
Cells = Mapping[type, MakeStep]
