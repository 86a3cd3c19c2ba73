"""Rewrites LayerNormalization, RMSNormalization, GroupNormalization and SpectralNormalization.

Every intermediate value gets its own quantizer, and so its own range. The reciprocal square root
becomes a lookup table.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, clone, config_of
from kqat.parts import ChannelAffine, ReciprocalSquareRoot, Reduce, ReduceKind, Remainder
from kqat.rewrites.layers.basic import Decomposed


def layer_normalization(layer: Any, name: str) -> Decomposed:
    """`(x - mean) / sqrt(variance + epsilon) * gamma + beta` over the last axis.

    The mean is subtracted twice. The first time is before the division: where a mean is large, the
    values would need a coarse grid otherwise. Its error of rounding is then multiplied by
    `1 / sqrt(variance)`, which is large in rows of small values. So the mean of what was divided,
    which is that error, is subtracted as well. `benchmarks/normalization.md` compares the three.
    Reference: Ba et al. 2016, section 3 (https://arxiv.org/abs/1607.06450).
    """
    _check_last_axis(layer, name)
    if config_of(layer).get("rms_scaling"):
        raise UnsupportedLayerError(
            f"Expected rms_scaling=False in layer '{name}'. Received: True. Use RMSNormalization."
        )
    affine = channel_affine(layer, name, layer.scale, layer.center)

    def call(x: Any) -> Any:
        axes, unit = [len(x.shape) - 1], f"{name}_unit" if affine else name
        mean = Reduce(ReduceKind.MEAN, axes, name=f"{name}_mean")(x)
        centered = layers.Subtract(name=f"{name}_centered")([x, mean])
        scale = _inverse_root(centered, layer.epsilon, unit, axes)
        scaled = layers.Multiply(name=f"{unit}_scaled")([centered, scale])
        shift = Remainder(ReduceKind.MEAN, axes, name=f"{unit}_shift")(scaled)
        y = layers.Subtract(name=unit)([scaled, shift])
        return affine(y) if affine else y

    return call


def rms_normalization(layer: Any, name: str) -> Decomposed:
    """`x / sqrt(mean(x**2) + epsilon) * gamma` over the last axis.

    Reference: Zhang & Sennrich 2019, section 4 (https://arxiv.org/abs/1910.07467).
    """
    _check_last_axis(layer, name)
    affine = channel_affine(layer, name, True, False)

    def call(x: Any) -> Any:
        axes, unit = [len(x.shape) - 1], f"{name}_unit" if affine else name
        y = scaled_to_unit(x, layer.epsilon, unit, axes)
        return affine(y) if affine else y

    return call


def scaled_to_unit(x: Any, epsilon: float, name: str, axes: list[int]) -> Any:
    """`x / sqrt(mean(x**2) + epsilon)`, with the mean over `axes`."""
    return layers.Multiply(name=name)([x, _inverse_root(x, epsilon, name, axes)])


def _inverse_root(x: Any, epsilon: float, name: str, axes: list[int]) -> Any:
    """`1 / sqrt(mean(x**2) + epsilon)`."""
    square = layers.Multiply(name=f"{name}_square")([x, x])
    variance = Reduce(ReduceKind.MEAN, axes, name=f"{name}_variance")(square)
    return ReciprocalSquareRoot(epsilon, name=f"{name}_rsqrt")(variance)


def channel_affine(layer: Any, name: str, scale: bool, center: bool) -> Part | None:
    """Multiplies by the layer's gamma and adds its beta; `scale` and `center` say which it has."""
    if not scale and not center:
        return None
    config = config_of(layer)
    options = {
        key: config.get(key)
        for key in (
            "gamma_regularizer",
            "beta_regularizer",
            "gamma_constraint",
            "beta_constraint",
        )
    }
    affine = ChannelAffine(scale, center, name=name, trainable=layer.trainable, **options)
    return Part(affine, layer.get_weights())


def _check_last_axis(layer: Any, name: str) -> None:
    axis = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    rank = len(layer.input.shape)
    if [a % rank for a in axis] != [rank - 1]:
        raise UnsupportedLayerError(
            f"Expected normalization over the last axis in layer '{name}'. Received: "
            f"axis={layer.axis}. Permute the input."
        )


def unit_normalization(layer: Any, name: str) -> Decomposed | None:
    """`UnitNormalization` over other axes than the last, which is all that the kernel takes."""
    axes = list(layer.axis) if isinstance(layer.axis, list | tuple) else [layer.axis]
    if axes == [-1]:
        return None

    def call(x: Any) -> Any:
        rank = len(x.shape)
        gone = sorted({axis % rank for axis in axes})
        if 0 in gone:
            raise UnsupportedLayerError(
                f"Expected normalization within each sample in layer '{name}'. Received: "
                f"axis={layer.axis}, which has the batch. Leave the batch axis out."
            )
        if gone == [rank - 1]:
            return layers.UnitNormalization(name=name)(x)
        kept = [axis for axis in range(1, rank) if axis not in gone]
        order = [*kept, *gone]
        moves = order != [*range(1, rank)]
        y = layers.Permute(order, name=f"{name}_moved")(x) if moves else x
        moved = y.shape[1:]
        if len(gone) > 1:
            shape = (*moved[: len(kept)], math.prod(moved[len(kept) :]))
            y = layers.Reshape(shape, name=f"{name}_rows")(y)
        y = layers.UnitNormalization(name=f"{name}_unit")(y)
        if len(gone) > 1:
            y = layers.Reshape(moved, name=f"{name}_shaped" if moves else name)(y)
        back = [order.index(axis) + 1 for axis in range(1, rank)]
        return layers.Permute(back, name=name)(y) if moves else y

    return call


def group_normalization(layer: Any, name: str) -> Decomposed:
    """`(x - mean) / sqrt(variance + epsilon) * gamma + beta`, the mean over a group of channels.

    Reference: Wu & He 2018, section 3 (https://arxiv.org/abs/1803.08494).
    """
    rank = len(layer.input.shape)
    if layer.axis % rank != rank - 1:
        raise UnsupportedLayerError(
            f"Expected channels on the last axis in layer '{name}'. Received: axis={layer.axis}. "
            "Permute the input."
        )
    affine = channel_affine(layer, name, layer.scale, layer.center)

    def call(x: Any) -> Any:
        # Not of `layer.input`: the layer may have been called on values of several sizes.
        shape = x.shape
        channels = shape[-1]
        groups = channels if layer.groups == -1 else layer.groups
        positions = int(np.prod(shape[1:-1], dtype=int))
        grouped = (positions, groups, channels // groups)
        y = layers.Reshape(grouped, name=f"{name}_groups")(x)
        mean = Reduce(ReduceKind.MEAN, [1, 3], name=f"{name}_mean")(y)
        centered = layers.Subtract(name=f"{name}_centered")([y, mean])
        unit = scaled_to_unit(centered, layer.epsilon, f"{name}_unit", [1, 3])
        last = f"{name}_shape" if affine else name
        y = layers.Reshape(shape[1:], name=last)(unit)
        return affine(y) if affine else y

    return call


def spectral(layer: Any, name: str) -> Decomposed:
    """The layer inside a `SpectralNormalization`, with a constraint that keeps the norm at one.

    The Keras wrapper divides the kernel by its estimated spectral norm in each training step.
    Here a constraint does so after each step. Reference: Miyato et al. 2018, section 2.1
    (https://arxiv.org/abs/1802.05957).
    """
    inner = layer.layer
    constraint = SpectralNorm(layer.power_iterations)
    weights = [np.asarray(v) for v in layer.weights if v is not layer.vector_u]
    key = "embeddings_constraint" if isinstance(inner, layers.Embedding) else "kernel_constraint"
    if key not in inner.get_config():
        raise UnsupportedLayerError(
            f"Expected a layer with a {key} inside '{name}'. Received: {type(inner).__name__}. "
            "Use that layer without SpectralNormalization."
        )
    return Part(clone(inner, name, **{key: constraint}), weights)


@keras.saving.register_keras_serializable("kqat")
class SpectralNorm(keras.constraints.Constraint):
    """Divides a kernel by its largest singular value, found by power iteration from ones."""

    def __init__(self, power_iterations: int = 1):
        # The Keras wrapper keeps its vector from step to step. The constraint starts from ones
        # each time, and so needs more iterations.
        self.power_iterations = max(power_iterations, 10)

    def __call__(self, w: Any) -> Any:
        """The kernel as a matrix whose columns are the last axis, divided by its spectral norm."""
        matrix = keras.ops.reshape(w, (-1, w.shape[-1]))
        u = keras.ops.ones((1, w.shape[-1]), w.dtype)
        for _ in range(self.power_iterations):
            v = keras.ops.normalize(keras.ops.matmul(u, keras.ops.transpose(matrix)), order=2)
            u = keras.ops.normalize(keras.ops.matmul(v, matrix), order=2)
        norm = keras.ops.sum(keras.ops.matmul(v, matrix) * u)
        return w / keras.ops.maximum(norm, keras.config.epsilon())

    def get_config(self) -> dict[str, Any]:
        """The number of iterations."""
        return {"power_iterations": self.power_iterations}
