"""Steps carried out in NumPy: the oracle that runtimes and the Keras model are held against."""

from collections.abc import Mapping, Sequence

import numpy as np

from kqat.kernels import NUMPY, Arrays
from tflite_export.integer_model.operators import kernel_of
from tflite_export.integer_model.program import Program, Step, fitting


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


def carry_out(
    step: Step, values: Mapping[int, np.ndarray], runtime: str, xp: Arrays = NUMPY
) -> dict[int, np.ndarray]:
    """The outputs of one step, of the values before it; `KERAS` has faster convolutions.

    Raises:
        ExportError: if its arithmetic is not known, or its tensors do not fit one another.
    """
    with fitting(step.name):
        kernel = kernel_of(step, runtime)
        inputs = []
        for position, tensor in enumerate(step.inputs):
            value = None if tensor is None else values.get(tensor.index)
            if value is None:
                value = kernel.constants.get(f"input_{position}")
            inputs.append(_widened(value))
        outputs = kernel.compute(xp, inputs, kernel.constants)
        return {
            tensor.index: np.asarray(value).astype(tensor.dtype)
            for tensor, value in zip(step.outputs, outputs, strict=True)
        }


def _widened(value: np.ndarray | None) -> np.ndarray | None:
    """Integers as int32, in which kernels compute."""
    small = value is not None and value.dtype.kind in "iu" and value.dtype.itemsize < 4
    return value.astype(np.int32) if small and value is not None else value
