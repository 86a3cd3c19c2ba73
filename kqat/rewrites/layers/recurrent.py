"""Rewrites recurrent layers, and their cells called by hand, as products and a `Recurrence`.

A mask is a sequence of truth values beside the others: where it is false, a step's `Hold` chooses
the states before the step, which is exact in integers.

The product of the input with a gate's kernel does not depend on the state. So it is one `Dense`
over the whole sequence, one FULLY_CONNECTED in the file. Convolutions of the input are part of the
step, and so is all that a cell of the user's own computes. Gates with the same activation are
computed together.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Node, Part, called_as_run, duplicate, give_readers, is_tensor, trace
from kqat.parts import Hold, Recurrence, Slice
from kqat.rewrites.layers.basic import Decomposed, activation_layer
from kqat.rewrites.layers.step_masks import truth_of_steps
from kqat.rewrites.operations.weights import computed, is_weight


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The parts of a cell: projections of the whole sequence, and the recurrence over them."""

    dropout: float
    projections: tuple[Callable[..., Any], ...]
    recurrence: Recurrence
    name: str

    @property
    def states(self) -> int:
        """How many states it may be given."""
        return len(self.recurrence.step.outputs) - self.recurrence.own_output

    def __call__(self, x: Any, states: Sequence[Any], mask: Any = None) -> Any:
        if self.dropout:
            # Keras's cells use one dropout mask for all steps.
            shape = (None, 1, *(None,) * (len(x.shape) - 2))
            x = layers.Dropout(self.dropout, shape, name=f"{self.name}_dropout")(x)
        sequences = [project(x) for project in self.projections]
        if mask is not None:
            sequences.append(layers.Reshape((mask.shape[1], 1), name=f"{self.name}_mask")(mask))
        return self.recurrence([*sequences, *states])


def rnn(layer: Any, name: str, *, flip: bool = False, cells: "Cells | None" = None) -> Decomposed:
    """`SimpleRNN`, `LSTM`, `GRU`, `ConvLSTM`, or `RNN` around any cell or a stack of them.

    Dropout draws one mask for each matrix product; Keras may draw one for each gate.

    Args:
        layer, name: the layer, and its name in the model.
        flip: whether to reverse the steps of the output.
        cells: class of a cell -> the function that builds the model of its step; by default those
            of Keras, and for others what their own `call` computes.

    Raises:
        UnsupportedLayerError: if the layer is stateful, or its cell is not in `cells`.
    """
    _check(layer, name, cells)
    stacked = isinstance(layer.cell, layers.StackedRNNCells)
    inner = list(layer.cell.cells) if stacked else [layer.cell]
    made: list[_Cell] = []
    shown: list[_Held | None] = []

    def part(index: int, x: Any, held: _Held | None) -> _Cell:
        """A cell, made for the first call: later ones share its weights."""
        if index < len(made):
            return made[index]
        cell, last = inner[index], index == len(inner) - 1
        options = {
            "return_sequences": layer.return_sequences or not last,
            "return_state": layer.return_state,
            "go_backwards": layer.go_backwards,
            # Between cells the steps are in their own order, as those of the mask are.
            "flip": flip if last else layer.go_backwards,
        }
        cell_name = name if last else f"{name}_{cell.name}"
        part_held = held if last or held is None else _Held(False, False)
        trainable = layer.trainable and cell.trainable
        make_step = (cells or _steps()).get(type(cell), _own_step)
        builder = _builder_of(cell)(cell, cell_name, trainable, tuple(x.shape[2:]), part_held)
        made.append(_take_apart(builder, make_step, options))
        return made[index]

    def call(x: Any, initial_state: Any = None, mask: Any = None) -> Any:
        given = keras.tree.flatten(initial_state) if initial_state is not None else []
        masks = [m for m in keras.tree.flatten(mask) if m is not None]
        mask = truth_of_steps(masks[0] if masks else None, name)
        held = None if mask is None else _Held(layer.zero_output_for_mask, bool(given))
        if held not in (shown or [held]):
            raise UnsupportedLayerError(
                f"Expected a mask in all calls of layer '{name}' or in none, and initial states "
                "in all calls with a mask or in none. Received: both. Its calls share one step, "
                "which is made for the one or the other. Use two layers."
            )
        shown.append(held)
        states: list[Any] = []
        for index in range(len(inner)):
            one = part(index, x, held)
            initial, given = given[: one.states], given[one.states :]
            x = one(x, initial, mask)
            if layer.return_state:
                x, *last_states = x
                states += last_states
        return [x, *states] if layer.return_state else x

    return call


def cell(layer: Any, name: str) -> Decomposed:
    """A cell that is called by hand: one step, whose weights are those of all of its calls."""
    _check_constraints([layer], name)
    make_step = _steps()[type(layer)]
    made: list[tuple[StepBuilder, Any]] = []

    def call(x: Any, states: Any, training: bool | None = None) -> Any:
        del training
        if not made:
            builder = _builder_of(layer)(layer, name, layer.trainable, tuple(x.shape[1:]))
            made.append((builder, trace(make_step(builder))))
        builder, step = made[0]
        flat = keras.tree.flatten(states)
        like = next(t for t in (x, *flat) if is_tensor(t))
        x = computed(x, like, 2, f"{name}_input") if is_weight(x) else x
        if layer.dropout:
            x = layers.Dropout(layer.dropout, name=f"{name}_dropout")(x)
        sequences = [project(x) for project in builder.projections]
        run = _FromZeros(like, name)
        values = step.run([*sequences, *map(run.state, flat)], run)
        outputs = keras.tree.flatten(values)
        return outputs[0], keras.tree.pack_sequence_as(states, outputs)

    return call


class _FromZeros:
    """Calls the layers of a step that may begin with zeros, of which nothing is computed.

    A layer without weights is made anew for each call, to have its own grid.

    Args:
        like: a tensor of the batch.
        name: that the names of parts begin with.
    """

    def __init__(self, like: Any, name: str) -> None:
        self.like, self.name = like, name

    def state(self, value: Any) -> Any:
        """A state as a tensor; `None` stands for constant zeros."""
        if not is_weight(value):
            return value
        trained = isinstance(value, keras.Variable) and value.trainable
        zero = not trained and not np.any(np.asarray(value))
        return None if zero else computed(value, self.like, 2, f"{self.name}_state")

    def __call__(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        layer, x = node.layer, args[0]
        if isinstance(layer, layers.Multiply) and any(part is None for part in x):
            return None
        if isinstance(layer, layers.Add | layers.Subtract) and x[1] is None:
            return x[0]
        if isinstance(layer, layers.Add) and x[0] is None:
            return x[1]
        if x is None and not (node.has_weights and layer.use_bias):
            return None
        if x is None:
            zero = np.zeros((1, node.inputs[0].shape[-1] or 0), np.float32)
            args = (computed(zero, self.like, 2, f"{self.name}_state"),)
        layer = layer if node.has_weights else duplicate(layer, node.name)
        return layer(*args, **kwargs)


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
        if inner.activity_regularizer is not None:
            raise UnsupportedLayerError(
                f"Expected no activity_regularizer in the layers of Bidirectional layer '{name}', "
                "whose values kqat computes in simpler layers. Received: one. Give it to the "
                "Bidirectional layer itself, or put keras.layers.ActivityRegularization after it."
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


def _check(layer: Any, name: str, cells: "Cells | None") -> None:
    if layer.stateful:
        raise UnsupportedLayerError(
            f"Expected stateful=False in layer '{name}'. Received: True. The file keeps no state "
            "from one invocation to the next. Use return_state=True and initial_state, and pass "
            "the states yourself."
        )
    inner = getattr(layer.cell, "cells", [layer.cell])
    unknown = [type(cell).__name__ for cell in inner if cells and type(cell) not in cells]
    if cells and unknown:
        raise UnsupportedLayerError(
            f"Expected one of the cells {sorted(cls.__name__ for cls in cells)} in layer "
            f"'{name}'. Received: {', '.join(unknown)}. Leave the layer float, or use one of these "
            "cells."
        )
    _check_constraints(inner, name)
    _check_first_states(layer, name)


def _check_constraints(cells: Sequence[Any], name: str) -> None:
    asked = [
        option
        for cell in cells
        if type(cell) in _steps()
        for option in ("kernel_constraint", "recurrent_constraint", "bias_constraint")
        if getattr(cell, option) is not None
    ]
    if asked:
        raise UnsupportedLayerError(
            f"Expected no {' or '.join(sorted(set(asked)))} in layer '{name}': kqat splits its "
            "kernels by gate. Use a regularizer, or remove the constraint."
        )


def _check_first_states(layer: Any, name: str) -> None:
    """Refuses a cell of the user's own that begins with another state than zeros."""
    cells = getattr(layer.cell, "cells", [layer.cell])
    own = [cell for cell in cells if type(cell) not in _steps()]
    if any(
        np.any(np.asarray(state))
        for cell in own
        for state in keras.tree.flatten(_first_states(cell))
    ):
        raise UnsupportedLayerError(
            f"Expected cells that begin with zeros in layer '{name}'. Received: "
            f"{', '.join(type(cell).__name__ for cell in own)}, whose get_initial_state returns "
            "other values. Call the layer with initial_state=..., and let the states be tensors "
            "of the model."
        )


def _first_states(cell: Any) -> list[Any]:
    """The states of one sample with which a cell begins, as `keras.layers.RNN` finds them."""
    if hasattr(cell, "get_initial_state"):
        found = cell.get_initial_state(batch_size=1)
    else:
        sizes = keras.tree.flatten(cell.state_size)
        found = [keras.ops.zeros((1, size)) for size in sizes]
    return list(found) if keras.tree.is_nested(found) else [found]


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


def _take_apart(builder: "StepBuilder", make_step: "MakeStep", options: dict[str, bool]) -> _Cell:
    step = make_step(builder)
    sequences = len(builder.sequences) + (builder.held is not None)
    recurrence = Recurrence(
        step, sequences, name=builder.name, own_output=builder.own_output, **options
    )
    if type(builder.cell) in _steps():  # A cell of the user's own stands in the step itself.
        recurrence.trainable = builder.trainable
    dropout = builder.cell.dropout if isinstance(builder, Builder) else 0.0
    return _Cell(dropout, tuple(builder.projections), recurrence, builder.name)


class StepBuilder:
    """Builds the model of one step; each kind of cell has a function that uses it.

    Args:
        cell: the cell.
        name: that the names of the parts begin with.
        trainable: whether the parts are.
        shape: of one step of the input, without the batch.
        held: what a mask leaves of the output; `None` without a mask.

    `sequences` are the inputs of the step that differ from step to step, and `projections` compute
    each from the sequence that the cell is given.
    """

    def __init__(
        self,
        cell: Any,
        name: str,
        trainable: bool,
        shape: tuple[int, ...],
        held: _Held | None = None,
    ) -> None:
        self.cell, self.name, self.trainable = cell, name, trainable
        self.shape, self.held = shape, held
        self.own_output = held is not None and held.own_output
        self.projections: list[Callable[..., Any]] = []
        self.sequences: list[Any] = []

    def part_name(self, part: str) -> str:
        """The name of a part: the layer's name, and what the part is."""
        return f"{self.name}_{part}"

    def read(self) -> Any:
        """One step of the input itself."""
        return self.project_by(lambda x: x, self.shape, self.part_name("input_step"))

    def project_by(self, function: Callable[..., Any], shape: tuple[int, ...], name: str) -> Any:
        """One step of what a function computes of all steps, outside of the step."""
        self.projections.append(function)
        self.sequences.append(keras.Input(shape, name=name))
        return self.sequences[-1]

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

    def model(self, states: list[Any], after: list[Any], output: Any = None) -> keras.Model:
        """The model of the step: steps of the sequences and states in, new states out.

        With a mask, it is the last of the sequences, and states are held where it is false.

        Args:
            states: before the step.
            after: the step.
            output: of the step, where it is not the first state.
        """
        before, shown = list(states), list(after)
        inputs = list(self.sequences)
        if self.held is not None:
            inputs.append(keras.Input((1,), dtype="bool", name=self.part_name("mask_step")))
            shown = [
                self._hold(f"held_{i}", inputs[-1], new, state)
                for i, (new, state) in enumerate(zip(after, states, strict=True))
            ]
        if self.own_output:
            first = after[0] if output is None else output
            earlier = keras.Input(first.shape[1:], name=self.part_name("output_before"))
            before, shown = [earlier, *before], [self._shown(first, earlier, inputs), *shown]
        # A cell may leave one of its states alone, and nothing reads an output that no mask holds.
        give_readers([*inputs, *before])
        return keras.Model([*inputs, *before], shown, name=self.part_name("step"))

    def _shown(self, output: Any, before: Any, inputs: list[Any]) -> Any:
        """The output of a step that a mask may leave out."""
        if self.held is None:
            return output
        other = before
        if self.held.zero:
            zero = self.part_name("output_zero")
            other = layers.Subtract(name=zero)([before, before])
        return self._hold("shown", inputs[-1], output, other)

    def _hold(self, part: str, counts: Any, new: Any, before: Any) -> Any:
        """`new` where the step counts, else `before`."""
        name, more = self.part_name(part), len(new.shape) - 2
        if more:
            counts = layers.Reshape((1,) * (more + 1), name=f"{name}_mask")(counts)
        return Hold(name=name)([counts, new, before])


class Builder(StepBuilder):
    """Builds the step of one of Keras's cells, gate by gate.

    `project` makes `x W + b` of some gates, `recur` makes `h R + b` of them. The products `x W` are
    not part of the step: each becomes a `Dense` over the whole sequence.
    """

    def __init__(self, cell: Any, *args: Any) -> None:
        super().__init__(cell, *args)
        self.kernel = np.asarray(cell.kernel)
        self.recurrent_kernel = np.asarray(cell.recurrent_kernel)
        self.bias: np.ndarray | None = None
        self.recurrent_bias: np.ndarray | None = None
        if cell.use_bias:
            bias = np.asarray(cell.bias)
            # GRU with reset_after has one bias for `x W` and another for `h R`.
            self.bias, self.recurrent_bias = bias if bias.ndim == 2 else (bias, None)

    @property
    def units(self) -> int:
        """The channels of a gate."""
        return int(self.cell.units)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of a state, without the batch."""
        return (self.units,)

    def project(self, part: str, gates: Sequence[int], signs: Sequence[int] = ()) -> Any:
        """One step of `x W + b` for some gates, which is computed for all steps outside."""
        name = self.part_name(f"{part}_input")
        dense = self.product_of_input(name, gates, signs)
        return self.project_by(dense, (len(gates) * self.units,), f"{name}_step")

    def product_of_input(self, name: str, gates: Sequence[int], signs: Sequence[int]) -> Part:
        """The layer `x W + b` for some gates."""
        options = self.regularizers("kernel_regularizer")
        return self._product(name, self.kernel, self.bias, gates, signs, options)

    def recur(self, part: str, h: Any, gates: Sequence[int], signs: Sequence[int] = ()) -> Any:
        """`h R + b` for some gates."""
        name = self.part_name(f"{part}_recurrent")
        if self.cell.recurrent_dropout:
            h = layers.Dropout(self.cell.recurrent_dropout, name=f"{name}_dropout")(h)
        options = self.regularizers("recurrent_regularizer")
        kernel, bias = self.recurrent_kernel, self.recurrent_bias
        return self._product(name, kernel, bias, gates, signs, options)(h)

    def regularizers(self, kernel: str, recurrent: str | None = None) -> dict[str, Any]:
        """The cell's regularizers of these names, as arguments of a part."""
        copies = {"kernel_regularizer": kernel, "bias_regularizer": "bias_regularizer"}
        if recurrent is not None:
            copies["recurrent_regularizer"] = recurrent
        return {key: getattr(self.cell, name) for key, name in copies.items()}

    def _product(
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

        options = {"use_bias": bias is not None, "name": name, **options}
        layer = self._layer(len(gates) * self.units, kernel is self.kernel, options)
        layer.trainable = self.trainable
        return Part(layer, [chosen(kernel)] if bias is None else [chosen(kernel), chosen(bias)])

    def _layer(self, channels: int, of_input: bool, options: dict[str, Any]) -> layers.Layer:
        """The layer of a product, of the input or of a state."""
        del of_input
        return layers.Dense(channels, **options)

    def divide(self, x: Any, *parts: str) -> list[Any]:
        """Splits gates that were computed together into one tensor for each of `parts`."""
        units, sizes = self.units, self.state_shape[:-1]
        return [
            Slice(
                [*(0 for _ in sizes), i * units],
                [*sizes, (i + 1) * units],
                [1] * (len(sizes) + 1),
                name=self.part_name(part),
            )(x)
            for i, part in enumerate(parts)
        ]

    def state(self, part: str) -> Any:
        """A state as it is before the step."""
        return keras.Input(self.state_shape, name=self.part_name(part))


class ConvolutionBuilder(Builder):
    """The same for a cell whose products are convolutions, which are all part of the step."""

    @property
    def units(self) -> int:
        """The channels of a gate."""
        return int(self.cell.filters)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of a state, without the batch."""
        shape, _ = self.cell.compute_output_shape((None, *self.shape))
        return tuple(shape[1:])

    def project(self, part: str, gates: Sequence[int], signs: Sequence[int] = ()) -> Any:
        """`x W + b` for some gates."""
        x = self.sequences[0] if self.sequences else self.read()
        return self.product_of_input(self.part_name(f"{part}_input"), gates, signs)(x)

    def _layer(self, channels: int, of_input: bool, options: dict[str, Any]) -> layers.Layer:
        """A convolution; those of states keep their sizes."""
        cell, conv = self.cell, (layers.Conv1D, layers.Conv2D, layers.Conv3D)[self.cell.rank - 1]
        geometry = {key: getattr(cell, key) for key in ("strides", "padding", "dilation_rate")}
        geometry = geometry if of_input else {"padding": "same"}
        return conv(channels, cell.kernel_size, **geometry, **options)


def _simple(builder: Builder) -> keras.Model:
    """`h = f(x W + h R + b)`."""
    x, h = builder.project("sum", [0]), builder.state("state")
    total = builder.add("sum", x, builder.recur("sum", h, [0]))
    return builder.model([h], [builder.activate("output", builder.cell.activation, total)])


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
    return builder.model([h, c], [output, carry])


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
    return builder.model([h], [output])


def _own_step(builder: StepBuilder) -> keras.Model:
    """What the `call` of a cell of the user's own computes; its output may be none of its states.

    The cell itself stands in the step, and is opened there as any custom layer.
    """
    x, first = builder.read(), _first_states(builder.cell)
    states = [
        keras.Input(state.shape[1:], name=builder.part_name(f"state_{i}"))
        for i, state in enumerate(keras.tree.flatten(first))
    ]
    output, after = called_as_run(builder.cell, x, keras.tree.pack_sequence_as(first, states))
    builder.own_output = True
    return builder.model(states, keras.tree.flatten(after), output)


@functools.cache
def _steps() -> dict[type, "MakeStep"]:
    """Class of a cell of Keras -> the function that builds the model of its step."""
    return {
        layers.SimpleRNNCell: _simple,
        layers.LSTMCell: _lstm,
        layers.GRUCell: _gru,
        _convolutional(): _lstm,
    }


@functools.cache
def _convolutional() -> type:
    """The class of the cells of ConvLSTM, which has no public name."""
    return type(layers.ConvLSTM2D(1, 1).cell)


def _builder_of(cell: Any) -> type[StepBuilder]:
    if type(cell) is _convolutional():
        return ConvolutionBuilder
    return Builder if type(cell) in _steps() else StepBuilder


MakeStep = Callable[[Any], keras.Model]
Cells = Mapping[type, MakeStep]
