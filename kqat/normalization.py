"""Normalization over groups of channels, or to unit length, as layers with one operator each."""

from typing import Any

import numpy as np
from keras import layers

from kqat.attention import channel_affine, scaled_to_unit
from kqat.decompositions import Decomposed
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
