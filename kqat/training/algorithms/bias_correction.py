"""Bias correction: takes the mean error that rounding causes out of each layer's output."""

from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.graph import trace
from kqat.training.algorithms.linear_layers import (
    copied,
    layer_by_layer,
    linear_layers,
    samples,
)
from kqat.training.weight_wrapper import QuantizeWrapper


def correct_biases(qat: keras.Model, data: Any) -> keras.Model:
    """A copy of a QAT model whose layers have the mean outputs of the layers without rounding.

    Rounded weights shift the mean of an output channel by `E[w~ x~] - E[w x]`. This shift is
    subtracted from the bias, or added to the moving mean of a BatchNormalization that will be
    folded in. A layer that has neither gets a bias. Calibration corrects biases too, but adds none.
    Layers are corrected in the order in which they run, each on the input that the corrected layers
    before it give, by means over `data` (the paper's empirical variant). Dense, Conv and
    DepthwiseConv layers of one or two dimensions take part.

    Args:
        qat: a QAT model, before training; it is not changed. Ranges stay as they are.
        data: typical inputs, as for `kqat.quantize_model`; at most 256 samples are used.

    Raises:
        ModelError: if `qat` has no such layer.
        CalibrationError: if the data do not fit the model.

    Reference: Nagel et al. 2019, section 4.2 and appendix D (https://arxiv.org/abs/1906.04721).
    """
    linear_layers(qat, "correct_biases")
    copy = copied(qat, biased=True)
    graph = trace(copy)
    layer_by_layer(graph, samples(data, graph), _correct)
    return copy


def _correct(wrapper: QuantizeWrapper, exact: Any, rounded: Any) -> None:
    layer, norm = wrapper.layer, wrapper.normalization
    # Before the normalization: it scales both means alike.
    wanted = _mean(_linear(wrapper, layer.kernel.value, exact))
    found = _mean(_linear(wrapper, wrapper.rounded("kernel"), rounded))
    shift = (found - wanted).astype(np.float32)
    if norm is None:
        bias: Any = layer.bias
        bias.assign(np.asarray(bias) - shift)
        return
    for one in wrapper.normalizations:
        mean: Any = one.moving_mean
        mean.assign(np.asarray(mean) + shift)


def _linear(wrapper: QuantizeWrapper, kernel: Any, x: Any) -> Any:
    variables = wrapper.layer.variables
    mapping = [(v, kernel if v is wrapper.layer.kernel else v.value) for v in variables]
    with keras.StatelessScope(state_mapping=mapping):
        return wrapper.layer(x)


def _mean(y: Any) -> np.ndarray:
    values = np.asarray(ops.convert_to_numpy(ops.cast(y, "float32")), np.float64)
    return values.reshape(-1, values.shape[-1]).mean(axis=0)
