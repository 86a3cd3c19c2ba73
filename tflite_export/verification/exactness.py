"""Compares a runtime's integers, operator by operator, with our integer model of its kernels.

Lockstep compares with the trained model's floats, from which a kernel may differ by a step. Here
nothing may differ, because `tflite_export.integer_model` has the arithmetic of each runtime.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kqat.base import ExportError
from kqat.kernels import KERAS, NUMPY, Arrays
from tflite_export.flatbuffer import ModelT
from tflite_export.integer_model import Program, Step, carry_out, read_program
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
    values, damaged = _values(program, computed, samples)
    elements = differing = 0
    first, unknown = (
        "",
        [f"'{name}', whose shape is not the runtime's" for name in damaged.values()],
    )
    for step in program.steps:
        if any(tensor and tensor.index in damaged for tensor in (*step.inputs, *step.outputs)):
            continue
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


def _values(
    program: Program, computed: Mapping[int, np.ndarray], samples: int
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """What the runtime computed, of the file's shapes, and the names of tensors of other shapes.

    Runtimes find the shapes anew, so they run a file in which one is damaged.
    """
    values, damaged = {}, {}
    for step in program.steps:
        for tensor in (*step.inputs, *step.outputs):
            if tensor is None or tensor.index not in computed:
                continue
            value = computed[tensor.index]
            if value.size == samples * math.prod(tensor.shape):
                values[tensor.index] = value.reshape(samples, *tensor.shape)
            else:
                damaged[tensor.index] = tensor.name
    return values, damaged


def _arrays(step: Step) -> Arrays:
    """The array library for a step: Keras for its fast convolutions, else NumPy."""
    return KERAS if "CONV" in step.name else NUMPY


def _samples(inputs: tuple[Any, ...], computed: Mapping[int, np.ndarray]) -> int | None:
    """The number of samples; `None` if the file's batch size is not one."""
    tensor = inputs[0]
    batch = tensor.shape[0] if tensor.shape else 1
    return len(computed[tensor.index]) if batch == 1 and tensor.index in computed else None
