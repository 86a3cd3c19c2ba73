"""SmoothQuant: moves outlier channels of activations into the weights, which round more easily."""

from typing import Any, Literal

import keras
import numpy as np
from keras import layers

from kqat.base import SpecError
from kqat.parts import ChannelAffine
from kqat.training.algorithms.awq import EXPONENTS, rounding_error
from kqat.training.algorithms.scaling import Pair, Statistics, rescaled
from kqat.training.weight_wrapper import QuantizeWrapper

TINY = 1e-5


def smooth_quant(
    qat: keras.Model, data: Any, *, alpha: float | Literal["search"] = 0.5
) -> keras.Model:
    """A copy of a QAT model whose normalized activations have no outlier channels.

    Between a normalization and the layers that read it, channel `j` is divided by

        s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)

    and row `j` of every kernel is multiplied by it, so the float function stays the same. The
    activation's single scale then fits all channels. This helps transformers in which a few
    channels are tens of times larger than the others.

    Args:
        qat: a QAT model, before training; it is not changed.
        data: typical inputs, as for `kqat.quantize_model`. The copy is calibrated on them.
        alpha: how much of the activations' spread moves into the weights, in [0, 1]; `"search"`
            takes for each normalization the one of 0, 0.05, … 1 whose rounded activation and
            kernels are expected to give the outputs closest to the unrounded ones.

    Raises:
        SpecError: if `alpha` is not in [0, 1], nor `"search"`.
        ModelError: if `qat` has no normalization right before layers with weights.
        CalibrationError: if the data do not fit the model.

    Reference: Xiao et al. 2023, section 4, equation 4 (https://arxiv.org/abs/2211.10438). The paper
    searches one alpha for a whole model, by its results on validation data (section 5.1).
    """
    if alpha != "search" and not (isinstance(alpha, float | int) and 0.0 <= alpha <= 1.0):
        raise SpecError(
            f"Expected alpha inside [0, 1], or 'search'. Received: alpha={alpha!r}. Use 0.5."
        )

    def factors(pair: Pair, statistics: Statistics) -> np.ndarray:
        weights = np.max([np.abs(kernel).max(axis=1) for kernel in pair.kernels()], axis=0)

        def smoothed(exponent: float) -> np.ndarray:
            largest = np.maximum(statistics.largest, TINY) ** exponent
            return largest / np.maximum(weights, TINY) ** (1.0 - exponent)

        def error(exponent: float) -> float:
            return _error(pair, smoothed(exponent), statistics)

        return smoothed(min(EXPONENTS, key=error) if isinstance(alpha, str) else alpha)

    wanted = "a normalization of its own (not folded into a layer)"
    return rescaled(qat, data, factors, _is_normalization, wanted=wanted)


def _error(pair: Pair, scale: np.ndarray, statistics: Statistics) -> float:
    """Expected squared error of the outputs with channels divided by `scale`.

    The activation's error is that of 255 even steps up to its largest channel, a twelfth of a
    square step for each value; that of the kernels is taken as in AWQ.
    """
    step = 2.0 * float((statistics.largest / scale).max()) / 255.0
    found = 0.0
    for consumer, kernel in zip(pair.consumers, pair.kernels(), strict=True):
        found += step**2 / 12.0 * float(np.sum(np.square(kernel * scale[:, None])))
        found += rounding_error(consumer, scale, statistics.products)
    return found


def _is_normalization(wrapper: QuantizeWrapper) -> bool:
    return isinstance(wrapper.layer, ChannelAffine | layers.BatchNormalization)
