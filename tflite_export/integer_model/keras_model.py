"""A file as a Keras model of integer arithmetic: one layer per operator."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.base import ExportError
from kqat.kernels import KERAS
from tflite_export import flatbuffer
from tflite_export.integer_model.operators import Kernel, kernel_of
from tflite_export.integer_model.program import Program, Step, Tensor, fitting, read_program
from tflite_export.runtimes import RUNTIMES

ENDS = ("float", "integers")


def integer_model(
    blob: bytes,
    runtime: str = "litert",
    *,
    inputs: str | Sequence[str] = "float",
    outputs: str = "float",
) -> keras.Model:
    """The Keras model that computes what a runtime computes with a file, to the last integer.

    It has no trainable weights, takes any number of samples at once, and runs wherever Keras's
    backend does. Convolutions and matrix products add up integers in floats that hold them exactly.

    Args:
        blob: a full-integer `.tflite` for one sample at a time, of `tflite_export.convert` or of
            another writer.
        runtime: whose rounding: `"litert"` (XNNPACK where it has a kernel), `"litert_reference"`,
            `"litert_builtin"` or `"tflite_micro"` (which CMSIS-NN agrees with).
        inputs: `"float"` takes what the float model takes and rounds it onto the input's grid, half
            up, as `tflite_export.verify` does; `"integers"` takes the file's integers: for `uint8`
            inputs the bytes as they are. One for all, or one for each input.
        outputs: `"float"` gives real values on the output's grid, `"integers"` the integers.

    Raises:
        ExportError: if the file's batch is not 1, it has loops, or the arithmetic of an operator is
            not known; a runtime of another name; tensors that do not fit one another, as in a
            damaged file.
    """
    program = read_program(flatbuffer.read(blob))
    kinds = [inputs] * len(program.inputs) if isinstance(inputs, str) else [*inputs]
    _check_arguments(runtime, kinds, outputs)
    if not (program.inputs and program.outputs):
        raise ExportError(
            f"Expected a file with inputs and outputs. Received: {len(program.inputs)} inputs and "
            f"{len(program.outputs)} outputs. Convert the model again."
        )
    for tensor in program.inputs:
        if tensor.shape[:1] not in ((), (1,)):
            raise ExportError(
                f"Expected inputs of one sample. Received: shape {tensor.shape} of "
                f"{tensor.name!r}. Convert with batch_size=1."
            )
    names = _output_names(program)
    taken = {*names, *(_layer_name(tensor.name) for tensor in program.inputs)}
    with fitting("the file's inputs"):
        entries = [
            keras.Input(
                tensor.shape[1:],
                dtype="float32" if _is_real(tensor, kind) else _plain_dtype(tensor),
                name=_layer_name(tensor.name),
            )
            for tensor, kind in zip(program.inputs, kinds, strict=True)
        ]
        values: dict[int, Value] = {}
        for i, (tensor, kind, entry) in enumerate(zip(program.inputs, kinds, entries, strict=True)):
            layer = Entry(tensor, rounds=kind == "float", name=_free_name(f"entry_{i}", taken))
            given = Value(entry, np.zeros((1, *entry.shape[1:]), entry.dtype))
            (values[tensor.index],) = layer.of(given)
    for number, step in enumerate(program.steps):
        with fitting(step.name):
            name = _free_name(f"{step.name.lower()}_{number}", taken)
            found = _called(step, name, values, runtime)
            values |= {t.index: y for t, y in zip(step.outputs, found, strict=True)}
    with fitting("the file's outputs"):
        exits = []
        for tensor, name in zip(program.outputs, names, strict=True):
            (one,) = Exit(tensor, real=outputs == "float", name=name).of(values[tensor.index])
            exits.append(one.symbol)
    return keras.Model(
        entries[0] if len(entries) == 1 else entries,
        exits[0] if len(exits) == 1 else exits,
        name="integer_model",
    )


def _check_arguments(runtime: str, inputs: Sequence[str], outputs: str) -> None:
    if runtime not in RUNTIMES:
        raise ExportError(f"Expected a runtime of {RUNTIMES}. Received: {runtime!r}.")
    if not {*inputs, outputs} <= {*ENDS}:
        raise ExportError(
            f"Expected inputs and outputs to be of {ENDS}. Received: inputs={inputs!r}, "
            f"outputs={outputs!r}."
        )


def _is_real(tensor: Tensor, ends: str) -> bool:
    return tensor.dtype == "float32" or (ends == "float" and tensor.grid is not None)


def _plain_dtype(tensor: Tensor) -> str:
    return "bool" if tensor.dtype == "bool" else "int32"


def _layer_name(name: str) -> str | None:
    return name.replace("/", "_").replace(":", "_").replace(";", "_") or None


def _output_names(program: Program) -> list[str]:
    taken = {_layer_name(tensor.name) for tensor in program.inputs}
    names: list[str] = []
    for number, tensor in enumerate(program.outputs):
        name = _layer_name(tensor.name) or f"output_{number}"
        while name in taken:
            name = f"{name}_out"
        taken.add(name)
        names.append(name)
    return names


def _free_name(name: str, taken: Collection[str | None]) -> str:
    """The name of a layer inside: Keras may call what a user's model gives the same."""
    while name in taken:
        name = f"{name}_inside"
    return name


def _called(
    step: Step, name: str, values: Mapping[int, "Value"], runtime: str
) -> tuple["Value", ...]:
    layer = IntegerOperator(step, kernel_of(step, runtime), name=name)
    given = [
        values[tensor.index]
        for tensor in step.inputs
        if tensor is not None and tensor.index in values
    ]
    if not given:
        raise ExportError(
            f"Expected {step.name} to read a value. Received: constants only, for "
            f"{step.result.name!r}. Use a file whose constants are folded."
        )
    layer.positions = tuple(
        position
        for position, tensor in enumerate(step.inputs)
        if tensor is not None and tensor.index in values
    )
    return layer.of(given)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value of the model while it is made: a symbolic tensor, and what it is for one sample."""

    symbol: Any
    sample: Any


class FileLayer(keras.layers.Layer):
    """A layer that is tried with one sample before its call is part of a model.

    The sample says what a symbolic run would, which has TensorFlow trace every operator: that takes
    many times as long as one sample. And a damaged file shows what symbolic tensors hide, as they
    may have any number of samples.
    """

    def of(self, given: Value | Sequence[Value]) -> tuple[Value, ...]:
        """Its outputs.

        Raises:
            ValueError: where one sample does not come out as one.
        """
        if isinstance(given, Value):
            sample, symbol = given.sample, given.symbol
        else:
            sample, symbol = [one.sample for one in given], [one.symbol for one in given]
        samples = keras.tree.flatten(self.call(sample))
        for y in samples:
            if y.shape[0] != 1:
                raise ValueError(f"{y.shape[0]} samples where the file has one")
        self.specs = [
            keras.KerasTensor((None, *y.shape[1:]), keras.backend.standardize_dtype(y.dtype))
            for y in samples
        ]
        return tuple(map(Value, keras.tree.flatten(self(symbol)), samples))

    def compute_output_spec(self, values: Any) -> Any:
        """The sample's shapes and dtypes, for any number of samples."""
        specs = [keras.KerasTensor(spec.shape, spec.dtype) for spec in self.specs]
        return specs if len(specs) > 1 else specs[0]


class IntegerOperator(FileLayer):
    """One operator: integers in, integers out, all with the file's own shape behind the samples.

    Args:
        step: the operator.
        kernel: its arithmetic. Float constants, the weights of sums, are the layer's weights.
        name: of the layer.
    """

    def __init__(self, step: Step, kernel: Kernel, name: str) -> None:
        super().__init__(name=name, trainable=False, autocast=False, dtype="float32")
        self.step = step
        self.kernel = kernel
        self.positions: tuple[int, ...] = ()
        self.constants = {}
        for key, value in kernel.constants.items():
            self.constants[key] = value
            if value.dtype.kind == "f":
                weight = self.add_weight(
                    shape=value.shape, dtype=str(value.dtype), trainable=False, name=key
                )
                weight.assign(value)
                self.constants[key] = weight
        self.built = True

    def call(self, values: Sequence[Any]) -> Any:
        """The operator's outputs."""
        given: list[Any] = [
            self.constants.get(f"input_{position}") for position in range(len(self.step.inputs))
        ]
        for position, value in zip(self.positions, values, strict=True):
            given[position] = value
        constants = {key: ops.convert_to_tensor(value) for key, value in self.constants.items()}
        computed = self.kernel.compute(KERAS, given, constants)
        outputs = [_shaped(y, t) for y, t in zip(computed, self.step.outputs, strict=True)]
        return outputs if len(outputs) > 1 else outputs[0]


def _shaped(y: Any, tensor: Tensor) -> Any:
    """What a kernel computed, with the file's own shape behind the samples."""
    sample = y.shape[1:]
    if None not in sample and math.prod(sample) != math.prod(tensor.shape):
        raise ValueError(f"a value of shape {tuple(sample)} where the file has {tensor.shape}")
    return ops.reshape(y, (-1, *tensor.shape))


class Entry(FileLayer):
    """From a model's input to the file's: floats rounded onto its grid, an axis for its batch."""

    def __init__(self, tensor: Tensor, rounds: bool, name: str) -> None:
        super().__init__(name=name, trainable=False, autocast=False, dtype="float32")
        self.tensor = tensor
        self.rounds = rounds and tensor.grid is not None and tensor.dtype != "float32"
        # A compiler that knows a divisor multiplies by its reciprocal, which rounds differently.
        self.scale: Any = None
        if self.rounds:
            self.scale = self.add_weight(shape=(), dtype="float32", trainable=False, name="scale")
            self.scale.assign(tensor.on_grid.scale)
        self.built = True

    def call(self, x: Any) -> Any:
        """The file's input."""
        if self.rounds:
            grid = self.tensor.on_grid
            low, high = grid.limits
            steps = ops.floor(x / ops.convert_to_tensor(self.scale) + np.float32(0.5))
            # A float beyond int32 has no integer; it is clipped anyway.
            steps = ops.clip(steps, -(2.0**24), 2.0**24) + np.float32(grid.zero_point)
            x = ops.cast(ops.clip(steps, low, high), "int32")
        return ops.reshape(x, (-1, *self.tensor.shape))


class Exit(FileLayer):
    """From the file's output to a model's: real values, or integers; without the file's batch."""

    def __init__(self, tensor: Tensor, real: bool, name: str) -> None:
        super().__init__(name=name, trainable=False, autocast=False, dtype="float32")
        self.tensor = tensor
        self.real = real and tensor.grid is not None

    def call(self, x: Any) -> Any:
        """The model's output."""
        if self.real:
            grid = self.tensor.on_grid
            x = ops.cast(x - grid.zero_point, "float32") * grid.scale
        shape = self.tensor.shape
        return ops.reshape(x, (-1, *(shape[1:] if shape[:1] == (1,) else shape)))
