"""Cross-layer equalization: scales channels between two layers so that their weights match."""

from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.training.algorithms.scaling import INPUT_AXES, Pair, Statistics, rescaled

TINY = 1e-8


def equalize(qat: keras.Model, data: Any) -> keras.Model:
    """A copy of a QAT model whose weights have similar magnitudes in neighbouring layers.

    Channel `j` between two layers is divided by `s_j = sqrt(r1_j / r2_j)`. Here `r1_j` is the
    largest weight that computes the channel and `r2_j` the largest weight that reads it. Both
    become `sqrt(r1_j * r2_j)`. This helps weights with one scale per tensor, and depthwise
    networks.

    Args:
        qat: a QAT model, before training; it is not changed.
        data: typical inputs, as for `kqat.quantize_model`. The copy is calibrated on them.

    Raises:
        ModelError: if `qat` has no pair of layers with at most a ReLU between them and a value
            between that nothing else reads.
        CalibrationError: if the data do not fit the model.

    Reference: Nagel et al. 2019, section 4.1 (https://arxiv.org/abs/1906.04721).
    """
    return rescaled(qat, data, _factors, _has_kernel)


def _has_kernel(pair: Pair) -> bool:
    return type(pair.producer.layer) in INPUT_AXES


def _factors(pair: Pair, statistics: Statistics) -> np.ndarray:
    layer: Any = pair.producer.layer
    kernel = np.abs(np.asarray(layer.kernel))
    depthwise = isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D)
    before = kernel.reshape(-1, statistics.largest.size if depthwise else kernel.shape[-1]).max(
        axis=0
    )
    if pair.producer.normalization is not None:
        before = before * np.abs(np.asarray(pair.producer.fold_factor("kernel"))).reshape(-1)
    behind = np.max([np.abs(k).max(axis=1) for k in pair.kernels()], axis=0)
    alive = (before > TINY) & (behind > TINY)
    return np.where(alive, np.sqrt(np.maximum(before, TINY) / np.maximum(behind, TINY)), 1.0)
