"""Compares a runtime's integers, operator by operator, with our integer model of its kernels.

Lockstep compares with the trained model's floats, from which a kernel may differ by a step. Here
nothing may differ, because `tflite_export.integer_model` has the arithmetic of each runtime.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kqat.base import ExportError
from kqat.kernels import KERAS, NUMPY, Arrays
from tflite_export.flatbuffer import ModelT
from tflite_export.integer_model import Step, carry_out, read_program
from tflite_export.verification.report import Exactness


def exactness(model: ModelT, computed: Mapping[int, np.ndarray], runtime: str) -> Exactness:
    """Compares every operator's outputs, each fed the values that the runtime computed before it.

    Args:
        model: the file.
        computed: index of a tensor -> the values that the runtime computed, (samples, …).
        runtime: the name of the runtime.
    """
    try:
        program = read_program(model)
    except ExportError as error:
        return Exactness(elements=0, differing=0, unknown=(str(error),))
    samples = _samples(program.inputs, computed)
    if samples is None:
        return Exactness(elements=0, differing=0, unknown=("a batch of more than one sample",))
    values = {
        tensor.index: computed[tensor.index].reshape(samples, *tensor.shape)
        for step in program.steps
        for tensor in (*step.inputs, *step.outputs)
        if tensor is not None and tensor.index in computed
    }
    elements = differing = 0
    first, unknown = "", []
    for step in program.steps:
        try:
            found = carry_out(step, values, runtime, _arrays(step))
        except ExportError:
            unknown.append(f"{step.name} of '{step.result.name}'")
            continue
        for tensor in step.outputs:
            if tensor.index not in values:
                continue
            wrong = int(np.count_nonzero(found[tensor.index] != values[tensor.index]))
            elements += values[tensor.index].size
            differing += wrong
            if wrong and not first:
                first = f"{step.name}, '{tensor.name}' ({wrong:,})"
    return Exactness(elements=elements, differing=differing, first=first, unknown=tuple(unknown))


def _arrays(step: Step) -> Arrays:
    """The array library for a step: Keras for its fast convolutions, else NumPy."""
    return KERAS if "CONV" in step.name else NUMPY


def _samples(inputs: tuple[Any, ...], computed: Mapping[int, np.ndarray]) -> int | None:
    """The number of samples; `None` if the file's batch size is not one."""
    tensor = inputs[0]
    batch = tensor.shape[0] if tensor.shape else 1
    return len(computed[tensor.index]) if batch == 1 and tensor.index in computed else None
