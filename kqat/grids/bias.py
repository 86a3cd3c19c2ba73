"""The grid of a bias: one step is the input's scale times the weights' scale.

Kernels add an int32 bias (int64 for activations of 16 bits) to their sums of integers. So a bias
ships as an integer number of such steps. Source: TFLite 8-bit quantization specification
(https://ai.google.dev/edge/litert/models/quantization_spec). The QAT model adds the bias from
`on_bias_grid`, and the file holds the integers from `bias_steps`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from kqat.grids.arithmetic import straight_through

# Activation bits -> the largest bias in steps: half of the range of the kernel's sums, which are
# int32, or the 48 bits of an int64 that requantization reads.
LARGEST_BIAS: dict[int, float] = {8: 2.0**30, 16: 2.0**46}


def bias_steps(bias: Any, step: Any, rint: Callable[[Any], Any] = np.rint) -> Any:
    """`bias` as an integer number of steps, rounded half to even, in the type that `rint` returns.

    Args:
        bias: one number per channel.
        step: input scale times weight scale; one number, or one per channel.
        rint: NumPy's function, or that of another array library.
    """
    return rint(bias / step)


def least_bias_step(bias: np.ndarray, bits: int) -> np.ndarray:
    """The smallest step for which `bias` has at most `LARGEST_BIAS[bits]` steps; float64.

    A channel whose weights are tiny compared with its bias (often a dead channel after folding)
    would have a smaller step. Its weights then get a larger scale.
    """
    return np.abs(np.asarray(bias, np.float64)) / LARGEST_BIAS[bits]


def on_bias_grid(bias: Any, step: Any) -> Any:
    """The value of the bias that ships, float32, with the gradient of `bias`.

    Args:
        bias: tensor of shape `(channels,)`.
        step: as for `bias_steps`. If it is zero, or so small that the bias has 2**24 steps or more,
            the bias is not rounded: float32 has only 24 bits there.
    """
    steps = bias_steps(bias, step, ops.round)
    exact = ops.abs(steps) < 2.0**24  # False for NaN and infinity, from a step of zero.
    return straight_through(ops.where(exact, steps * step, bias), bias)
