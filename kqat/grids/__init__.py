"""Integer grids and their arithmetic: `QuantSpec`, `Site`, fake quantization, range methods for
activations and step methods for weights.
"""

from kqat.grids import arithmetic
from kqat.grids.arithmetic import HIDDEN, LOWEST
from kqat.grids.bias import bias_steps, least_bias_step, on_bias_grid
from kqat.grids.clamp import Clamp
from kqat.grids.histogram import Histogram
from kqat.grids.methods import (
    CALIBRATION_METHODS,
    RANGE_METHODS,
    STEP_METHODS,
    CalibrationMethod,
    RangeMethod,
    StepMethod,
    calibration_method,
    range_method_from_dict,
    range_method_to_dict,
    step_method_from_dict,
    step_method_to_dict,
)
from kqat.grids.ranges.entropy import Entropy
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.last_value import LastValue
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import FOLLOWING, Anchor, MovingAverage
from kqat.grids.ranges.mse import MSE
from kqat.grids.ranges.percentile import Percentile
from kqat.grids.site import Site
from kqat.grids.spec import INT8_ACTIVATION, INT8_WEIGHTS, INT16_ACTIVATION, QuantSpec
from kqat.grids.weight_steps.binary import Binary
from kqat.grids.weight_steps.learned_step import LearnedStep
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.max_abs import MaxAbs
from kqat.grids.weight_steps.ternary import Ternary

__all__ = [
    "CALIBRATION_METHODS",
    "FOLLOWING",
    "HIDDEN",
    "INT8_ACTIVATION",
    "INT8_WEIGHTS",
    "INT16_ACTIVATION",
    "LOWEST",
    "MSE",
    "RANGE_METHODS",
    "STEP_METHODS",
    "Anchor",
    "Binary",
    "CalibrationMethod",
    "Clamp",
    "Entropy",
    "Fixed",
    "Histogram",
    "LastValue",
    "LearnedStep",
    "LeastSquares",
    "MaxAbs",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "QuantSpec",
    "RangeMethod",
    "Site",
    "StepMethod",
    "Ternary",
    "arithmetic",
    "bias_steps",
    "calibration_method",
    "least_bias_step",
    "on_bias_grid",
    "range_method_from_dict",
    "range_method_to_dict",
    "step_method_from_dict",
    "step_method_to_dict",
]
