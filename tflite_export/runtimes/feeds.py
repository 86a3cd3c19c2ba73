"""Inputs and outputs of a file: floats to a tensor's integers and back, and random inputs."""

import math
from typing import Any

import numpy as np

from kqat.base import ExportError
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, TensorT

# More than any sensible input. A damaged or hostile shape may ask for more than there is memory.
LARGEST_INPUT_BYTES = 1 << 30


def as_type(x: np.ndarray, tensor: TensorT) -> np.ndarray:
    """Floats as a tensor's integers, rounded half up and clipped; as floats for a float tensor.

    Integers, which are indexes (token ids), are returned as they are.

    Raises:
        ExportError: if an integer tensor has no scale, the tensor holds no numbers, or `x` has NaN
            or infinity, which no integer stands for.
    """
    dtype = flatbuffer.tensor_dtype(tensor)
    if dtype.kind == "f":
        return x.astype(dtype)
    if x.dtype == np.uint8 and dtype == np.int8:
        return (x ^ 0x80).view(np.int8)  # bytes, of which the file's integers are 128 less
    if not np.issubdtype(x.dtype, np.floating):
        return x
    if dtype.kind not in "iu":
        raise ExportError(
            f"Expected an input of numbers. Received: {flatbuffer.tensor_name(tensor)!r} of type "
            f"{dtype}. Use a file that was made of this model."
        )
    # Infinity is where the grid ends, as on a device.
    check_finite(np.where(np.isinf(x), 0.0, x), flatbuffer.tensor_name(tensor))
    limits = np.iinfo(dtype)
    scale, zero = _grid(tensor)
    return np.clip(np.floor(x / scale + 0.5) + zero, limits.min, limits.max).astype(dtype)


def check_finite(x: np.ndarray, name: str) -> None:
    """Checks the values for an input; `name` is for the message.

    Raises:
        ExportError: if there is NaN or infinity among them, or what is no number.
    """
    if x.dtype.kind not in "biuf" and x.dtype.name != "bfloat16":
        raise ExportError(f"Expected numbers for input '{name}'. Received: dtype {x.dtype}.")
    finite = np.isfinite(x)
    if not finite.all():
        sample = int(np.argwhere(~finite)[0][0])
        raise ExportError(
            f"Expected finite data for input '{name}'. Received: NaN or infinity in "
            f"{np.count_nonzero(~finite)} of {x.size} values, first in sample {sample} (counted "
            "from 0). Clean the data."
        )


def real(x: np.ndarray, tensor: TensorT) -> np.ndarray:
    """A tensor's values as float32; integers without a scale are returned as they are."""
    if x.dtype.kind == "f":
        return x.astype(np.float32)
    if not has_grid(tensor):
        return x
    scale, zero = _grid(tensor)
    return (x.astype(np.float32) - zero) * scale


def has_grid(tensor: TensorT) -> bool:
    """Whether the tensor has a scale."""
    grid = tensor.quantization
    return grid is not None and grid.scale is not None and len(grid.scale) > 0


def random_inputs(model: ModelT, samples: int, seed: int = 0) -> list[np.ndarray]:
    """Inputs of the file's own types: integers over their whole range, normal floats.

    Args:
        model: of the file.
        samples: how many; so many batches for a file whose batch is larger than one.
        seed: equal ones give equal inputs.

    Raises:
        ExportError: if an input has no numbers, is empty, or is larger than a gigabyte.
    """
    generator = np.random.default_rng(seed)
    feeds = []
    for index in model.subgraphs[0].inputs:
        tensor = model.subgraphs[0].tensors[index]
        dtype = flatbuffer.tensor_dtype(tensor)
        batch, *rest = flatbuffer.tensor_shape(tensor) or (1,)
        shape = (samples * batch, *rest)
        if not 0 < math.prod(shape) * dtype.itemsize <= LARGEST_INPUT_BYTES:
            raise ExportError(
                f"Expected input {flatbuffer.tensor_name(tensor)!r} to have values, and at most "
                f"{LARGEST_INPUT_BYTES:,} bytes of them. Received: shape {shape} of {dtype}."
            )
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            values: Any = generator.integers(limits.min, limits.max, shape, dtype, endpoint=True)
        elif dtype.kind == "b":
            values = generator.integers(0, 2, shape).astype(bool)
        else:
            values = generator.normal(size=shape).astype(dtype)
        feeds.append(values)
    return feeds


def _grid(tensor: TensorT) -> tuple[np.float32, int]:
    if not has_grid(tensor):
        raise ExportError(
            f"Expected a scale for tensor {flatbuffer.tensor_name(tensor)!r} of integers. "
            "Received: none. Give data of the file's own dtype."
        )
    zeros = tensor.quantization.zeroPoint
    return tensor.quantization.scale[0], int(zeros[0]) if zeros is not None and len(zeros) else 0
