"""The grid of a bias: one step is the input's scale times the weights' scale.

Kernels add an int32 bias to their sums of integers (int64 where activations have 16 bits), so a
bias ships as a whole number of such steps. Source: TFLite 8-bit quantization specification
(https://ai.google.dev/edge/litert/models/quantization_spec). Training adds what `on_bias_grid`
gives; the file holds `bias_steps`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from kqat.grids.arithmetic import straight_through

# Activation bits -> the largest bias in steps: half of what the kernel may add up, int32, or the 48
# bits that rescaling takes of int64.
LARGEST_BIAS: dict[int, float] = {8: 2.0**30, 16: 2.0**46}


def bias_steps(bias: Any, step: Any, rint: Callable[[Any], Any] = np.rint) -> Any:
    """`bias` as a whole number of steps, rounded half to even; of the type that `rint` gives.

    Args:
        bias: one number per channel.
        step: input scale times weight scale: one, or one per channel.
        rint: NumPy's, or that of another library of arrays.
    """
    return rint(bias / step)


def least_bias_step(bias: np.ndarray, bits: int) -> np.ndarray:
    """The finest step in which `bias` has no more than `LARGEST_BIAS[bits]` steps; float64.

    A channel whose weights are tiny beside its bias (a dead channel, often, after folding) has a
    finer one. There the scale of the weights gives way.
    """
    return np.abs(np.asarray(bias, np.float64)) / LARGEST_BIAS[bits]


def on_bias_grid(bias: Any, step: Any) -> Any:
    """The value of the bias that ships, float32, with the gradient of `bias`.

    Args:
        bias: tensor of shape `(channels,)`.
        step: as for `bias_steps`. Where it is zero or so fine that float32 has no fraction left the
            bias stays as it is: the file's grid has 30 bits there, and float32 24.
    """
    steps = bias_steps(bias, step, ops.round)
    exact = ops.abs(steps) < 2.0**24  # Nor is NaN or infinity, of a step of zero.
    return straight_through(ops.where(exact, steps * step, bias), bias)
