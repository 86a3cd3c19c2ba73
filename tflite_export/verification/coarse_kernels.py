"""By how many steps a kernel may be off whose arithmetic is coarser than its output's grid."""

import math
from collections.abc import Mapping

import numpy as np

from kqat.devices import APPROXIMATE, SUMMED_TOO_MUCH
from kqat.kernels import resizing
from tflite_export.integer_model import kind_of
from tflite_export.verification.site_tensors import SiteTensors


def allowed_steps(
    tensors: SiteTensors, tensor: int, bits: int, runtime: str, computed: Mapping[int, np.ndarray]
) -> int:
    """The steps by which an output may differ from exact arithmetic.

    One is the rounding. `kqat.devices.APPROXIMATE` lists the kernels that are off by more on any
    input. RESIZE_BILINEAR is off by what it misses a place, times how unlike neighbours are there.
    `SUMMED_TOO_MUCH` there has those that divide by too large a sum, as SOFTMAX of 16 bits does
    where all classes but one are far below the largest.

    Args:
        tensors: those of the file.
        tensor: the output.
        bits: of the output.
        runtime: the name of the runtime.
        computed: index of a tensor -> the integers that the runtime computed, (samples, …).
    """
    operator = tensors.operator(tensor)
    allowed = APPROXIMATE.get((operator, bits), 1)
    if (per_number := SUMMED_TOO_MUCH.get((operator, bits))) is not None:
        return allowed + per_number * int(computed[tensor].shape[-1])
    # Reading a step takes reading the file's constants.
    step = tensors.step(tensor) if operator == "RESIZE_BILINEAR" else None
    images = None if step is None else computed.get(step.given(0).index)
    if step is None or images is None:
        return allowed
    given, result = step.given(0).shape, step.result.shape
    images = images.reshape(-1, *given[1:]).astype(np.int64)
    options = step.options
    off = 0.0
    for axis in (1, 2):
        missed = resizing.misplaced(
            given[axis],
            result[axis],
            corners=bool(options.alignCorners),
            centers=bool(options.halfPixelCenters),
            xnnpack=kind_of(step, runtime) == "xnnpack",
        )
        off += missed * float(np.abs(np.diff(images, axis=axis)).max(initial=0))
    # The two roundings fall together to one step more than what is missed.
    return allowed + math.floor(off)
