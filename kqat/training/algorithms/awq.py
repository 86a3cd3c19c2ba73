"""AWQ: scales up the weights that multiply large activations, so that rounding costs less."""

from typing import Any

import keras
import numpy as np

from kqat.training.algorithms.scaling import Pair, Statistics, input_axis, rescaled
from kqat.training.weight_wrapper import QuantizeWrapper

# The exponents to try: in [0, 1], as in the paper.
EXPONENTS = tuple(step / 20 for step in range(21))
TINY = 1e-4


def awq(qat: keras.Model, data: Any) -> keras.Model:
    """A copy of a QAT model whose weights are rounded with less error in the important channels.

    If the layer before can scale a layer's input channels, row `j` of the layer's kernel is
    multiplied by

        s_j = mean|X_j|**a, divided by the geometric mean of the largest and the smallest of these

    and channel `j` of the layer before is divided by it. Of the exponents `a` = 0, 0.05, … 1 the
    one is taken whose rounded kernels give the outputs closest to the unrounded ones. `a = 0`
    changes nothing, so by this measure no layer gets worse. The measure is exact for Dense; for
    convolutions it leaves out products of different positions. AWQ is meant for weights of 4 bits
    or fewer.

    Args:
        qat: a QAT model, before training; it is not changed.
        data: typical inputs, as for `kqat.quantize_model`. The copy is calibrated on them.

    Raises:
        ModelError: if no layer of `qat` can be scaled like this.
        CalibrationError: if the data do not fit the model.

    Reference: Lin et al. 2024, section 3.2, equations 4 and 5 (https://arxiv.org/abs/2306.00978).
    The division by the geometric mean is that of the authors' code
    (https://github.com/mit-han-lab/llm-awq). The paper also clips weights; here the method that
    finds their step decides what is clipped.
    """
    return rescaled(qat, data, _factors)


def _factors(pair: Pair, statistics: Statistics) -> np.ndarray:
    importance = np.maximum(statistics.mean_magnitude, TINY)

    def scale(exponent: float) -> np.ndarray:
        power = importance**exponent
        return power / np.sqrt(power.max() * power.min())

    def error(exponent: float) -> float:
        return sum(rounding_error(c, scale(exponent), statistics.products) for c in pair.consumers)

    return scale(min(EXPONENTS, key=error))


def rounding_error(consumer: QuantizeWrapper, scale: np.ndarray, products: np.ndarray) -> float:
    """Squared error of the outputs, from the mean products of the input's channels.

    For a convolution, products of channels at different positions are left out.
    """
    kernel: Any = np.asarray(consumer.layer.kernel)
    axis = input_axis(consumer)
    shape = np.ones(kernel.ndim, int)
    shape[axis] = -1
    factor = scale.reshape(shape).astype(np.float32)
    spec = consumer.weight_specs["kernel"]
    scaled = kernel * factor
    method = consumer.weight_step
    rounded = np.asarray(method.fake_quantize(scaled, method.step(scaled, spec), spec))
    difference = np.moveaxis(rounded / factor - kernel, axis, 0)
    columns = difference.reshape(kernel.shape[axis], -1)
    return float(np.sum(columns * (products @ columns)))
