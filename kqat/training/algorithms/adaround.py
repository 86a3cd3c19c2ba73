"""AdaRound: learns for each weight whether it rounds up or down, by the error of the output."""

from typing import Any

import keras
import numpy as np

from kqat.base import SpecError
from kqat.training.algorithms.linear_layers import LinearProblem, with_chosen_integers

# The stretch of the rectified sigmoid is the paper's. How the exponent of its regularization falls,
# and the share of the steps without it, are those of the authors' own code, AIMET.
ZETA, GAMMA = 1.1, -0.1
FIRST_EXPONENT, LAST_EXPONENT = 20.0, 2.0
WARM_UP = 0.2
# The weight of the regularization. AIMET's 0.01 is for errors in units of the values; here they
# are in units of the error of nearest rounding, one for each weight. From 3 to 10 the error of
# random layers of 3 and 4 bits is the same, below 1 it is larger.
WEIGHT = 3.0
# Adam's rate and moments. AIMET has a rate of 0.001 and 10,000 steps or more.
RATE, BETA_1, BETA_2, TINY = 1e-2, 0.9, 0.999, 1e-8


def adaround(qat: keras.Model, data: Any, *, iterations: int = 1000) -> keras.Model:
    """A copy of a QAT model whose weights are rounded up or down so that outputs stay the same.

    A weight becomes `(floor(w / s) + h(v)) * s` with `h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)`.
    Adam minimizes the squared error of the layer's output over `v`, and a multiple of
    `sum(1 - |2 h - 1|**b)`, which drives each `h` to 0 or 1 while `b` falls from 20 to 2.
    The output is that before the activation function; its error is against the layer without
    rounding, on inputs that the rounded layers before it give (equation 25 of the paper), in units
    of the error of nearest rounding. An output channel that comes out worse than with nearest
    rounding is rounded to nearest, so no layer gets worse on `data`.

    Steps stay as they are. Dense, Conv and DepthwiseConv layers of one or two dimensions take part;
    others stay as they are. It is meant for weights of 4 bits or fewer.

    Args:
        qat: a QAT model, before training; it is not changed.
        data: typical inputs, as for `kqat.quantize_model`; at most 256 samples are used.
        iterations: steps of Adam for each layer.

    Raises:
        SpecError: if `iterations` is not a number above zero, or weights are binary.
        ModelError: if `qat` has no such layer.
        CalibrationError: if the data do not fit the model.

    Reference: Nagel et al. 2020, section 3.3, equations 21 to 25, with the products of the inputs
    computed before, as in equation 19 (https://arxiv.org/abs/2004.10568). Equation 25 compares
    outputs behind the activation function.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise SpecError(
            f"Expected a number of iterations of at least 1. Received: {iterations!r}. Use 1000."
        )
    return with_chosen_integers(qat, data, lambda p: learned_integers(p, iterations), "adaround")


def learned_integers(problem: LinearProblem, iterations: int) -> np.ndarray:
    limit = float(problem.limit)
    below = np.floor(problem.weights / problem.scale)
    rest = problem.weights / problem.scale - below
    # h(v) starts at the fraction, so that the first weights are the unrounded ones.
    share = np.clip((rest - GAMMA) / (ZETA - GAMMA), 1e-4, 1.0 - 1e-4)
    v = np.log(share / (1.0 - share))
    nearest = problem.nearest()
    unit = _unit(problem, nearest)
    mean, square = np.zeros_like(v), np.zeros_like(v)
    for step in range(1, iterations + 1):
        gradient = objective_gradient(problem, below, v, unit, step / iterations)
        mean = BETA_1 * mean + (1.0 - BETA_1) * gradient
        square = BETA_2 * square + (1.0 - BETA_2) * gradient**2
        moved = mean / (1.0 - BETA_1**step)
        v -= RATE * moved / (np.sqrt(square / (1.0 - BETA_2**step)) + TINY)
    integers = np.clip(below + (_rectified(v)[0] >= 0.5), -limit, limit)
    worse = problem.error(integers) > problem.error(nearest)
    return np.where(worse[:, None, :], nearest, integers)


def _unit(problem: LinearProblem, nearest: np.ndarray) -> float:
    """The mean squared error of nearest rounding, all outputs together."""
    lost = nearest * problem.scale - problem.weights
    error = float(np.sum(lost * (problem.gram @ lost)))
    return error if error > 0.0 else 1.0


def _rectified(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`h(v)` and its derivative."""
    sigmoid = 1.0 / (1.0 + np.exp(-v))
    raw = sigmoid * (ZETA - GAMMA) + GAMMA
    inside = (raw > 0.0) & (raw < 1.0)
    return np.clip(raw, 0.0, 1.0), inside * sigmoid * (1.0 - sigmoid) * (ZETA - GAMMA)


def objective_gradient(
    problem: LinearProblem, below: np.ndarray, v: np.ndarray, unit: float, progress: float
) -> np.ndarray:
    """That of the objective over `v`; `progress` is the share of the steps that are done."""
    h, slope = _rectified(v)
    limit = float(problem.limit)
    integers = below + h
    free = (integers >= -limit) & (integers <= limit)
    weights = np.clip(integers, -limit, limit) * problem.scale
    residual = problem.gram @ weights - problem.wanted
    gradient = 2.0 / unit * v.size * residual * problem.scale * free
    if progress > WARM_UP:
        done = (progress - WARM_UP) / (1.0 - WARM_UP)
        # A half cosine, as in the authors' own code.
        exponent = LAST_EXPONENT + 0.5 * (FIRST_EXPONENT - LAST_EXPONENT) * (
            1.0 + np.cos(np.pi * done)
        )
        away = 2.0 * h - 1.0
        gradient -= WEIGHT * exponent * np.abs(away) ** (exponent - 1.0) * np.sign(away) * 2.0
    return gradient * slope
