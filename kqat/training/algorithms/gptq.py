"""GPTQ: rounds weights one input at a time and lets those not yet rounded make up for the error."""

from typing import Any

import keras
import numpy as np

from kqat.base import SpecError
from kqat.training.algorithms.linear_layers import (
    LinearProblem,
    nearest_integers,
    with_chosen_integers,
)


def gptq(qat: keras.Model, data: Any, *, damping: float = 0.01) -> keras.Model:
    """A copy of a QAT model whose later weights make up for the rounding of earlier ones.

    With `H = 2 X^T X` of a layer's inputs and `U` the upper Cholesky factor of its inverse, the
    weights `w_i` of input `i` are rounded to `q_i`, and the error is spread over the inputs
    `j > i` that are still to come:

        e = (w_i - q_i) / U_ii;    w_j -= e * U_ij

    Steps stay as they are. Convolutions are products of patches; of a depthwise layer each channel
    is a problem of its own. Dense, Conv and DepthwiseConv layers of one or two dimensions that
    are called once take part; others stay as they are.

    Args:
        qat: a QAT model, before training; it is not changed.
        data: typical inputs, as for `kqat.quantize_model`; at most 256 samples are used.
        damping: share of the mean diagonal of `H` that is added to the diagonal.

    Raises:
        SpecError: if `damping` is not above zero, or weights are binary.
        ModelError: if `qat` has no such layer.
        CalibrationError: if the data do not fit the model.

    Reference: Frantar et al. 2023, section 4, algorithm 1 (https://arxiv.org/abs/2210.17323). The
    paper's blocks of columns only save time. It rounds to asymmetric min-max grids (section 5);
    here the grids are those of the model.
    """
    if not damping > 0.0:
        raise SpecError(f"Expected damping above 0. Received: damping={damping!r}. Use 0.01.")

    def choose(problem: LinearProblem) -> np.ndarray:
        groups = range(len(problem.weights))
        return np.stack([rounded_in_order(problem, group, damping) for group in groups])

    return with_chosen_integers(qat, data, choose, "gptq")


def rounded_in_order(problem: LinearProblem, group: int, damping: float) -> np.ndarray:
    """The integers of one group."""
    hessian = 2.0 * problem.gram[group]
    weights, scale = problem.weights[group].copy(), problem.scale[group]
    diagonal = np.diag(hessian)
    dead = diagonal == 0.0
    mean = float(diagonal.mean()) or 1.0
    hessian = hessian + np.diag(np.where(dead, 1.0, 0.0) + damping * mean)
    # The upper factor: inverse(H) = U^T U.
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    integers = np.zeros_like(weights)
    for row in range(len(weights)):
        integers[row] = nearest_integers(weights[row] / scale[row], problem.limit)
        error = (weights[row] - integers[row] * scale[row]) / upper[row, row]
        weights[row + 1 :] -= np.outer(upper[row, row + 1 :], error)
    return integers
