"""Normalization over groups of channels, and of kernels by their spectral norm."""

from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.attention import channel_affine, scaled_to_unit
from kqat.decompositions import Decomposed, Part, clone
from kqat.errors import UnsupportedLayerError
from kqat.primitives import Reduce


def group_normalization(layer: Any, name: str) -> Decomposed:
    """`(x - mean) / sqrt(variance + epsilon) * gamma + beta` over positions and a group's channels.

    Reference: Wu & He 2018, section 3 (https://arxiv.org/abs/1803.08494).
    """
    shape = layer.input.shape
    if layer.axis % len(shape) != len(shape) - 1:
        raise UnsupportedLayerError(
            f"Expected channels on the last axis in layer '{name}'. Received: axis={layer.axis}. "
            "Permute the input."
        )
    affine = channel_affine(layer, name, layer.scale, layer.center)
    channels = shape[-1]
    groups = channels if layer.groups == -1 else layer.groups
    positions = int(np.prod(shape[1:-1], dtype=int))

    def call(x: Any) -> Any:
        grouped = (positions, groups, channels // groups)
        y = layers.Reshape(grouped, name=f"{name}_groups")(x)
        mean = Reduce("mean", [1, 3], name=f"{name}_mean")(y)
        centered = layers.Subtract(name=f"{name}_centered")([y, mean])
        unit = scaled_to_unit(centered, layer.epsilon, f"{name}_unit", [1, 3])
        last = f"{name}_shape" if affine else name
        y = layers.Reshape(shape[1:], name=last)(unit)
        return affine(y) if affine else y

    return call


def spectral(layer: Any, name: str) -> Decomposed:
    """The layer inside a `SpectralNormalization`, whose kernel stays of spectral norm one.

    The wrapper divides the kernel by an estimate of its norm in each step of training; here a
    constraint does, after each step. Reference: Miyato et al. 2018, section 2.1
    (https://arxiv.org/abs/1802.05957).
    """
    inner = layer.layer
    constraint = SpectralNorm(layer.power_iterations)
    weights = [np.asarray(v) for v in layer.weights if v is not layer.vector_u]
    key = "embeddings_constraint" if isinstance(inner, layers.Embedding) else "kernel_constraint"
    if key not in inner.get_config():
        raise UnsupportedLayerError(
            f"Expected a layer with a {key} inside '{name}'. Received: {type(inner).__name__}. "
            "Use its layer without SpectralNormalization."
        )
    return Part(clone(inner, name, **{key: constraint}), weights)


@keras.saving.register_keras_serializable("kqat")
class SpectralNorm(keras.constraints.Constraint):
    """Divides a kernel by its largest singular value, found by power iteration from ones."""

    def __init__(self, power_iterations: int = 1):
        # The wrapper goes on from the last step's vector; this starts anew, and so needs more.
        self.power_iterations = max(power_iterations, 10)

    def __call__(self, w: Any) -> Any:
        """The kernel, its columns being the last axis."""
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
