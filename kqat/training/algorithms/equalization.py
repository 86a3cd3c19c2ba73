"""Cross-layer equalization: scales channels between two layers so that their weights match."""

from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.training.algorithms.scaling import (
    INPUT_AXES,
    Pair,
    Statistics,
    input_axis,
    rescaled,
)
from kqat.training.weight_wrapper import QuantizeWrapper

TINY = 1e-8
# Chains of pairs settle in fewer rounds than this, or are then close to it.
ROUNDS = 50


def equalize(qat: keras.Model, data: Any, *, absorb_biases: bool = False) -> keras.Model:
    """A copy of a QAT model whose weights have similar magnitudes in neighbouring layers.

    Channel `j` between two layers is divided by `s_j = sqrt(r1_j / r2_j)`. Here `r1_j` is the
    largest weight that computes the channel and `r2_j` the largest weight that reads it. Both
    become `sqrt(r1_j * r2_j)`. A layer between two others takes part in two such pairs, so all
    pairs are scaled again until the factors are within 0.1 % of 1, at most 50 times. This helps
    weights with one scale per tensor, and depthwise networks.

    With `absorb_biases`, what a BatchNormalization adds to a channel beyond three of its standard
    deviations, `c_j = max(0, beta_j - 3 * |gamma_j|)`, moves through the ReLU into the next layer's
    bias, `W c`, so that the activation's range is narrower. For 99.865 % of normally distributed
    values that changes nothing. It is done where the next layer has a bias or a
    BatchNormalization, and pads with no zeros, to which nothing was added.

    Args:
        qat: a QAT model, before training; it is not changed.
        data: typical inputs, as for `kqat.quantize_model`. The copy is calibrated on them.
        absorb_biases: whether high biases are absorbed too.

    Raises:
        ModelError: if `qat` has no pair of layers with a value between them that nothing else reads
            and that only what commutes with positive factors works on: ReLU, LeakyReLU, PReLU,
            max and average pooling, zero padding, cropping, upsampling, dropout, and reshapes that
            keep the channels. The message names what is in the way.
        CalibrationError: if the data do not fit the model.

    Reference: Nagel et al. 2019, sections 4.1.1, 4.1.2 and, for biases, 4.1.3
    (https://arxiv.org/abs/1906.04721).
    """
    then = _absorb if absorb_biases else _nothing
    return rescaled(qat, data, _factors, _has_kernel, then, "a linear layer", ROUNDS)


def _nothing(pair: Pair) -> None:
    """What is done after scaling where biases stay."""


def _absorb(pair: Pair) -> None:
    norm: Any = pair.producer.normalization
    if not isinstance(norm, layers.BatchNormalization) or not (norm.center and norm.scale):
        return
    if pair.pads or not all(_takes_bias(consumer) for consumer in pair.consumers):
        return
    beta = np.asarray(norm.beta)
    high = np.maximum(0.0, beta - 3.0 * np.abs(np.asarray(norm.gamma))).astype(np.float32)
    norm.beta.assign(beta - high)
    for consumer in pair.consumers:
        layer: Any = consumer.layer
        if isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D):
            kernel = np.asarray(layer.kernel)
            taps = kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0)
            added = (taps * high[:, None]).reshape(-1)
        else:
            axis = input_axis(consumer)
            moved = np.moveaxis(np.asarray(layer.kernel), axis, 0)
            added = np.tensordot(high, moved, 1).reshape(-1, layer.kernel.shape[-1]).sum(axis=0)
        if consumer.normalization is None:
            layer.bias.assign(np.asarray(layer.bias) + added)
        for one in consumer.normalizations:
            mean: Any = one.moving_mean
            mean.assign(np.asarray(mean) - added)


def _takes_bias(consumer: QuantizeWrapper) -> bool:
    """Whether a constant in the inputs is one in the outputs, which the layer can add."""
    layer: Any = consumer.layer
    padded = getattr(layer, "padding", "valid") != "valid" and set(layer.kernel_size) != {1}
    return not padded and (consumer.normalization is not None or bool(layer.use_bias))


def _has_kernel(wrapper: QuantizeWrapper) -> bool:
    return type(wrapper.layer) in INPUT_AXES


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
