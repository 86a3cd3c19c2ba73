"""SmoothQuant: outliers of activations move into the weights, which round them better."""

from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import SpecError
from kqat.parts import ChannelAffine
from kqat.training.algorithms.scaling import Pair, Statistics, rescaled

TINY = 1e-5


def smooth_quant(qat: keras.Model, data: Any, *, alpha: float = 0.5) -> keras.Model:
    """A copy of a QAT model whose normalized activations have no outlier channels.

    Between a normalization and the layers that read it, channel `j` is divided by

        s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)

    and row `j` of every kernel multiplied by it: the float function stays. One scale per tensor
    then serves all channels alike. It pays where a few channels of a transformer are tens of
    times larger than the rest.

    Args:
        qat: a QAT model; it is left alone. Do this before training.
        data: typical inputs, as for `kqat.quantize_model`; ranges are found anew with them.
        alpha: how much of the difficulty goes to the weights, in [0, 1].

    Raises:
        SpecError: if `alpha` is outside.
        ModelError: if `qat` has no normalization right before layers with weights.
        CalibrationError: if the data do not fit the model.

    Reference: Xiao et al. 2023, section 4 (https://arxiv.org/abs/2211.10438).
    """
    if not 0.0 <= alpha <= 1.0:
        raise SpecError(f"Expected alpha inside [0, 1]. Received: alpha={alpha!r}. Use 0.5.")

    def factors(pair: Pair, statistics: Statistics) -> np.ndarray:
        weights = np.max([np.abs(kernel).max(axis=1) for kernel in pair.kernels()], axis=0)
        smoothed = np.maximum(statistics.largest, TINY) ** alpha
        return smoothed / np.maximum(weights, TINY) ** (1.0 - alpha)

    return rescaled(qat, data, factors, _follows_normalization)


def _follows_normalization(pair: Pair) -> bool:
    kinds = (ChannelAffine, layers.BatchNormalization)
    return isinstance(pair.producer.layer, kinds)
