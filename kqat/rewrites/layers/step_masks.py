"""Rewrites layers that make masks of steps, or leave masked steps out of a mean."""

from typing import Any

import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.rewrites.layers.basic import Decomposed


def masking(layer: Any, name: str) -> Decomposed:
    """`Masking` of steps that are all zeros: it hands its input on, as they are zeros already.

    The mask itself stands in the graph as the comparisons that Keras makes it of. They read the
    rounded input. Zero is a point of every grid, so a step of zeros is masked in the file as well;
    so is a step in which each number rounds to zero, in training as in the file.

    Raises:
        UnsupportedLayerError: if another value than zero marks the steps.
    """
    if np.size(layer.mask_value) != 1 or float(np.asarray(layer.mask_value).item()) != 0.0:
        raise UnsupportedLayerError(
            f"Expected mask_value=0.0 in Masking layer '{name}'. Received: {layer.mask_value}. "
            "Zero alone is a point of every integer grid; another value is rounded, so that steps "
            "with it would not be found. Pad with zeros."
        )
    return layers.Identity(name=name)
