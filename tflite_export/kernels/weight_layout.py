"""Weights and biases in the file's layout."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

if TYPE_CHECKING:  # Both import Keras, which nobody needs who reads a file.
    from kqat.freezing import FrozenWeight
    from kqat.grids import Site

TENSOR_TYPES = {
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.int16): schema.TensorType.INT16,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int64): schema.TensorType.INT64,
}
PACKED_TYPES = {2: schema.TensorType.INT2, 4: schema.TensorType.INT4}
ACTIVATION_DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.int8), 16: np.dtype(np.int16)}
# Activation bits -> the dtype of the bias.
BIAS_DTYPES: dict[int, type[np.signedinteger]] = {8: np.int32, 16: np.int64}


# `QuantizeMultiplier` has no shift below -31
# (https://github.com/tensorflow/tensorflow/blob/master/tensorflow/lite/kernels/internal/quantization_util.cc).
_LEAST_MULTIPLIER = 2.0**-31


@dataclasses.dataclass(frozen=True)
class Weights:
    """Integer weights in the file's axis order.

    `scale` has one entry, or one per index of `axis`.
    """

    integers: np.ndarray
    scale: np.ndarray
    axis: int
    bits: int = 8

    @classmethod
    def in_file(
        cls, frozen: "FrozenWeight", shape: tuple[int, ...], order: tuple[int, ...], axis: int
    ) -> "Weights":
        """The weights of `frozen` in the file's layout.

        Args:
            frozen: the weights in Keras's order of axes.
            shape: of the file's tensor.
            order: the file's axes in the order in which Keras has them.
            axis: the file's axis along which scales differ.
        """
        keras_shape = tuple(shape[a] for a in order)
        integers = frozen.integers.reshape(keras_shape).transpose(np.argsort(order))
        scale = frozen.scale.reshape(-1)
        return cls(np.ascontiguousarray(integers), scale, axis, frozen.bits)


@dataclasses.dataclass(frozen=True)
class Bias:
    """Integer bias (int32 or int64) of scale input × weights, one scale per channel or one."""

    integers: np.ndarray
    scale: np.ndarray


def fit_bias(
    weights: Weights,
    bias: np.ndarray,
    input_scale: np.float32,
    bits: int = 8,
    output_scale: np.float32 | float = 0.0,
) -> tuple[Weights, Bias]:
    """The integer bias, and the weights on a coarser grid in channels where it would overflow.

    A channel whose weights are tiny beside its bias (a dead channel, often, after folding) has a
    scale too fine for the bias to fit int32. There the scale is enlarged until the bias has
    magnitude 2**30, and the weights are rounded anew: they move by half of `|bias| / 2**30` per
    input step at the most, far below one output step. For activations of 16 `bits` the bias is
    int64, and 2**46 in the place of 2**30. There a step of the sum must not be less than
    2**-31 of the `output_scale` either: TFLite takes a multiplier below 2**-32 for zero, and with
    it the whole bias.
    """
    from kqat.grids import bias_steps, least_bias_step

    product = np.float64(input_scale) * weights.scale.astype(np.float64)
    needed = least_bias_step(bias, bits)
    if bits > 8:
        needed = np.maximum(needed, np.where(bias != 0.0, output_scale * _LEAST_MULTIPLIER, 0.0))
    if len(weights.scale) == 1:
        needed = needed.max(keepdims=True)
    if np.any(needed > product):
        weights = _coarser(weights, np.maximum(product, needed) / np.float64(input_scale))
        product = np.float64(input_scale) * weights.scale.astype(np.float64)
    scale = product.astype(np.float32)
    integers = bias_steps(bias.astype(np.float64), product)
    return weights, Bias(integers.astype(BIAS_DTYPES[bits]), scale)


def _coarser(weights: Weights, scale: np.ndarray) -> Weights:
    scale = scale.astype(np.float32)
    shape = [1] * weights.integers.ndim
    if len(scale) > 1:
        shape[weights.axis] = -1
    ratio = (weights.scale.astype(np.float64) / scale.astype(np.float64)).reshape(shape)
    integers = np.rint(weights.integers * ratio).astype(np.int8)
    return dataclasses.replace(weights, integers=integers, scale=scale)


def pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """Integers of 2 or 4 bits in whole bytes, the first in the lowest bits; flat, uint8.

    Zeros fill the last byte. Source: the TFLite schema, `TensorType.INT4` and `INT2`.
    """
    count = 8 // bits
    flat = integers.reshape(-1).astype(np.uint8) & (2**bits - 1)
    padded = np.append(flat, np.zeros(-flat.size % count, np.uint8)).reshape(-1, count)
    shifted = padded << np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(shifted, axis=1).astype(np.uint8)


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The integers that `pack` packed, int8, in their shape."""
    parts = packed.reshape(-1, 1) >> np.arange(0, 8, bits, dtype=np.uint8) & (2**bits - 1)
    flat = parts.reshape(-1)[: math.prod(shape)].astype(np.int8)
    return np.where(flat >= 2 ** (bits - 1), flat - 2**bits, flat).astype(np.int8).reshape(shape)


def constant_on_grid(data: np.ndarray, site: "Site | None") -> tuple[np.ndarray, np.ndarray, int]:
    """Integers, scale and zero point of a constant in an activation's place.

    Args:
        data: its float32 values.
        site: the grid that it must have; `None` for the number of a comparison, which gets a grid
            of its own.
    """
    if site is not None:
        return site.integers(data), np.asarray(site.scale), site.zero_point
    size = float(np.abs(data).max())
    scale = np.float32(size / 127.0 or 2.0**-7)
    return np.rint(data / scale), np.asarray(scale), 0


def quantization(scale: Any, zero_point: Any, axis: int) -> schema.QuantizationParametersT:
    """Quantization parameters as the schema has them."""
    params = schema.QuantizationParametersT()
    params.scale = np.asarray(scale, np.float32).reshape(-1)
    params.zeroPoint = np.asarray(zero_point, np.int64).reshape(-1)
    params.quantizedDimension = axis
    return params
