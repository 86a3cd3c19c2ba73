"""Magnitude pruning: the smallest weights become zero and stay zero in all later training.

Han et al. 2015, "Learning both Weights and Connections", section 3
(https://arxiv.org/abs/1506.02626). Zero is on every symmetric grid, and folding BatchNormalization
only multiplies weights. So a weight that is zero here is zero in the integer file.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

import kqat
from tflite_export import flatbuffer

# Smaller kernels (stems, depthwise) are not pruned: they have few weights but matter much for the
# accuracy.
SMALLEST_KERNEL = 1000


def kernels(model: keras.Model) -> Iterator[keras.Variable]:
    """The kernels that are pruned, of a float or a QAT model, in the same order."""
    for layer in model.layers:
        inner = layer.layer if isinstance(layer, kqat.QuantizeWrapper) else layer
        if isinstance(inner, keras.layers.Conv2D | keras.layers.Dense):
            if np.prod(inner.kernel.shape) >= SMALLEST_KERNEL:
                yield inner.kernel


def prune(model: keras.Model, share: float) -> None:
    """Sets the smallest `share` of each kernel to zero, in place."""
    for kernel in kernels(model):
        value = np.array(kernel)
        count = round(share * value.size)
        smallest = np.argsort(np.abs(value), axis=None, kind="stable")[:count]
        value.reshape(-1)[smallest] = 0.0
        kernel.assign(value)


def keep_zeros(model: keras.Model) -> None:
    """Keeps the zeros of the kernels: a constraint restores them after each optimizer step."""
    for kernel in kernels(model):
        kernel.constraint = _Masked(np.array(kernel) != 0)


def zero_share(model: keras.Model) -> float:
    """Share of zeros among the weights of the kernels."""
    values = [np.array(kernel) for kernel in kernels(model)]
    return sum(int((v == 0).sum()) for v in values) / sum(v.size for v in values)


def zeros_are_kept(sparse: keras.Model, later: keras.Model) -> bool:
    """Whether all weights that are zero in `sparse` are zero in `later`, which was made from it."""
    pairs = zip(kernels(sparse), kernels(later), strict=True)
    return all(not np.array(after)[np.array(before) == 0].any() for before, after in pairs)


def zero_share_of_file(blob: bytes) -> float:
    """Share of zeros among the weights of the same kernels in any `.tflite`."""
    model = flatbuffer.read(blob)
    zeros = elements = 0
    for tensor in model.subgraphs[0].tensors:
        shape = flatbuffer.tensor_shape(tensor)
        values = flatbuffer.tensor_data(model, tensor)
        # A depthwise kernel is (1, height, width, channels); others have the filters first.
        if values is None or len(shape) < 2 or shape[0] == 1 or np.prod(shape) < SMALLEST_KERNEL:
            continue
        if values.ndim == 1:  # Two weights of four bits a byte.
            values = np.stack([values & 15, values >> 4])
        zeros += int((values == 0).sum())
        elements += values.size
    return zeros / elements


class _Masked(keras.constraints.Constraint):
    """Multiplies by a mask of zeros and ones."""

    def __init__(self, mask: np.ndarray):
        self.mask = mask.astype(np.float32)

    def __call__(self, w: Any) -> Any:
        return w * keras.ops.cast(self.mask, w.dtype)
