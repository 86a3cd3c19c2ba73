"""The step methods that tests run over, and weights for them."""

from typing import Any

import numpy as np

from kqat.grids.spec import QuantSpec
from kqat.grids.trained_threshold import TrainedThreshold
from kqat.grids.weight_steps.binary import Binary
from kqat.grids.weight_steps.learned_step import LearnedStep
from kqat.grids.weight_steps.learned_ternary import LearnedTernary
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.max_abs import MaxAbs
from kqat.grids.weight_steps.ternary import Ternary

# One method or more for every row of the table, with the widths that it takes.
METHODS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "max_abs": (MaxAbs(), (2, 3, 4, 8)),
    "lsq": (LearnedStep(start="mean"), (2, 3, 4, 8)),
    "mse": (LeastSquares(), (2, 3, 4, 8)),
    "tqt": (TrainedThreshold(), (2, 3, 4, 8)),
    "ternary": (Ternary(), (2,)),
    "ttq": (LearnedTernary(), (2, 3, 4, 8)),
    "binary": (Binary(), (1,)),
}
CASES = [(name, bits) for name, (_, widths) in METHODS.items() for bits in widths]

# The step is a mean of float32 numbers: as many roundings as weights at the most, 180 here.
MEAN_ERROR = 180 * 2.0**-24


def grid(bits: int, axes: tuple[int, ...] = (-1,)) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=True, narrow_range=bits > 1, axis=axes or None)


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
