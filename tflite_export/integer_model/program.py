"""A file as a list of steps: which operator, which tensors, their grids and constants."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.base import ExportError
from kqat.kernels import Grid
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT
from tflite_export.kernels import unpack

ACTIVATIONS = {
    schema.ActivationFunctionType.NONE: "none",
    schema.ActivationFunctionType.RELU: "relu",
    schema.ActivationFunctionType.RELU_N1_TO_1: "relu_n1_to_1",
    schema.ActivationFunctionType.RELU6: "relu6",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of subgraph 0.

    Attributes:
        index: in the subgraph.
        name: of the tensor.
        shape: with the file's batch.
        dtype: the schema's type in lower case, as `"int8"` or `"int4"`.
        grid: `None` for a float, a truth value, and integers without a scale.
        data: a constant's values, packed ones unpacked; `None` for what is computed.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: Grid | None
    data: np.ndarray | None

    @property
    def on_grid(self) -> Grid:
        """The grid of a tensor that must have one.

        Raises:
            ExportError: if it has none.
        """
        if self.grid is None:
            raise ExportError(
                f"Expected tensor {self.name!r} to have a scale. Received: {self.dtype} without "
                "one. Use a full-integer file."
            )
        return self.grid


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One operator: its name in the schema, tensors (`None`: left out) and options."""

    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Any

    def given(self, position: int) -> Tensor:
        """The input at a position, which must be there.

        Raises:
            ExportError: if it is left out.
        """
        found = self.inputs[position] if position < len(self.inputs) else None
        if found is None:
            raise ExportError(f"Expected input {position} of {self.name}. Received: none.")
        return found

    @property
    def result(self) -> Tensor:
        """The first output."""
        return self.outputs[0]

    @property
    def activation(self) -> str:
        """The fused activation.

        Raises:
            ExportError: if integer kernels have no such activation.
        """
        code = getattr(self.options, "fusedActivationFunction", 0)
        if code not in ACTIVATIONS:
            raise ExportError(
                f"Expected a fused RELU, RELU6, RELU_N1_TO_1 or none of {self.name}. "
                f"Received: activation {code}."
            )
        return ACTIVATIONS[code]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A file: inputs, outputs, and steps in the order in which they run."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    description: str


@contextlib.contextmanager
def fitting(what: str) -> Iterator[None]:
    """Turns whatever arithmetic raises where a file's tensors do not fit one another into words.

    A damaged file may have any shape, type or constant in any place, so no list of checks is whole.

    Args:
        what: is computed, as an operator by its name.

    Raises:
        ExportError: in the place of any other exception.
    """
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"Expected the tensors and options of {what} to fit one another. Received: a file "
            f"with which its arithmetic raises {type(error).__name__}: {error}. Convert the model "
            "anew, or run tflite_export.verify without the model to see which runtimes take it."
        ) from error


def read_program(model: ModelT) -> Program:
    """Reads subgraph 0.

    Raises:
        ExportError: if there are more subgraphs, as loops have, or a packed type is unknown.
    """
    if len(model.subgraphs) > 1:
        raise ExportError(
            f"Expected one subgraph. Received: {len(model.subgraphs)}, as files with loops have. "
            "Unroll the recurrence before conversion."
        )
    graph = model.subgraphs[0]
    tensors = [_tensor(model, index, tensor) for index, tensor in enumerate(graph.tensors)]

    def of(indices: Any) -> tuple[Tensor | None, ...]:
        return tuple(tensors[int(i)] if i >= 0 else None for i in indices)

    def there(indices: Any) -> tuple[Tensor, ...]:
        return tuple(tensors[int(i)] for i in indices)

    return Program(
        inputs=there(graph.inputs),
        outputs=there(graph.outputs),
        steps=tuple(
            Step(
                name=flatbuffer.op_name(model, operator),
                inputs=of(operator.inputs),
                outputs=there(operator.outputs),
                options=operator.builtinOptions,
            )
            for operator in graph.operators
        ),
        description=flatbuffer.inspect_model(model, 0).description,
    )


def _tensor(model: ModelT, index: int, tensor: Any) -> Tensor:
    dtype = flatbuffer.type_name(tensor)
    shape = flatbuffer.tensor_shape(tensor)
    data = None
    if flatbuffer.is_numeric(tensor):
        data = flatbuffer.tensor_data(model, tensor)
        if data is not None and dtype in ("int2", "int4"):
            data = unpack(data, int(dtype.removeprefix("int")), shape)
    return Tensor(index, flatbuffer.tensor_name(tensor), shape, dtype, _grid(tensor, dtype), data)


def _grid(tensor: Any, dtype: str) -> Grid | None:
    found = tensor.quantization
    if found is None or found.scale is None or not len(found.scale) or dtype.startswith("float"):
        return None
    zeros = found.zeroPoint
    zero = int(zeros[0]) if zeros is not None and len(zeros) else 0
    # Packed weights are computed with as int8.
    dtype = "int8" if dtype in ("int2", "int4") else dtype
    return Grid(tuple(np.float32(scale) for scale in found.scale), zero, dtype)
