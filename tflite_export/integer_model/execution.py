"""Steps carried out in NumPy: the oracle that runtimes and the Keras model are held against."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kqat.kernels import NUMPY
from tflite_export.integer_model.operators import kernel_of
from tflite_export.integer_model.program import Program, Step


@dataclasses.dataclass(frozen=True)
class StepDifference:
    """One operator whose arithmetic is not the runtime's: tensor, elements, largest difference."""

    operator: str
    tensor: str
    differing: int
    elements: int
    max_steps: float


def execute(program: Program, feeds: Sequence[np.ndarray], runtime: str) -> dict[int, np.ndarray]:
    """Every value of a file.

    Args:
        program: the file.
        feeds: in the file's own types, `(samples, *tensor shape)` for each input.
        runtime: a name in `tflite_export.RUNTIMES`.

    Returns:
        Tensor -> its values, `(samples, *tensor shape)`, in the tensor's dtype.

    Raises:
        ExportError: if the arithmetic of an operator is not known.
    """
    values = {
        tensor.index: np.asarray(feed) for tensor, feed in zip(program.inputs, feeds, strict=True)
    }
    for step in program.steps:
        values |= carry_out(step, values, runtime)
    return values


def carry_out(step: Step, values: Mapping[int, np.ndarray], runtime: str) -> dict[int, np.ndarray]:
    """The outputs of one step, of the values before it."""
    kernel = kernel_of(step, runtime)
    inputs = []
    for position, tensor in enumerate(step.inputs):
        value = None if tensor is None else values.get(tensor.index)
        if value is None:
            value = kernel.constants.get(f"input_{position}")
        inputs.append(_widened(value))
    outputs = kernel.compute(NUMPY, inputs, kernel.constants)
    return {
        tensor.index: np.asarray(value).astype(tensor.dtype)
        for tensor, value in zip(step.outputs, outputs, strict=True)
    }


def _widened(value: np.ndarray | None) -> np.ndarray | None:
    """Integers as int32, in which kernels compute."""
    small = value is not None and value.dtype.kind in "iu" and value.dtype.itemsize < 4
    return value.astype(np.int32) if small and value is not None else value


def differing_steps(
    program: Program, seen: Mapping[int, np.ndarray], runtime: str
) -> list[StepDifference]:
    """Which operators compute something else than a runtime did, each fed the runtime's values.

    Args:
        program: the file.
        seen: tensor -> what the runtime had there, `(samples, *tensor shape)`.
        runtime: which it was.

    Raises:
        ExportError: if the arithmetic of an operator is not known.
    """
    found = []
    for step in program.steps:
        for index, value in carry_out(step, seen, runtime).items():
            tensor = next(t for t in step.outputs if t.index == index)
            if index not in seen:
                continue
            actual = seen[index].reshape(value.shape)
            steps = np.abs(actual.astype(np.float64) - value.astype(np.float64))
            if steps.any():
                found.append(
                    StepDifference(
                        operator=step.name,
                        tensor=tensor.name,
                        differing=int(np.count_nonzero(steps)),
                        elements=steps.size,
                        max_steps=float(steps.max()),
                    )
                )
    return found
