"""Integer grids and their arithmetic: `QuantSpec`, `Site`, fake quantization, range methods for
activations and step methods for weights.
"""

from kqat.grids import arithmetic
from kqat.grids.arithmetic import HIDDEN, LOWEST
from kqat.grids.bias import bias_steps, least_bias_step, on_bias_grid
from kqat.grids.clamp import Bounds, Clamp, clamp_from_json, clamp_to_json
from kqat.grids.gradients.additive_noise import AdditiveNoise
from kqat.grids.gradients.clipped import Clipped
from kqat.grids.gradients.element_wise_scaling import ElementWiseScaling
from kqat.grids.gradients.estimator import GradientEstimator, estimated
from kqat.grids.gradients.identity import Identity
from kqat.grids.histogram import Histogram
from kqat.grids.methods import (
    CALIBRATION_METHODS,
    GRADIENTS,
    RANGE_METHODS,
    STEP_METHODS,
    CalibrationMethod,
    RangeMethod,
    StepMethod,
    calibration_method,
    gradient_estimator,
    gradient_from_dict,
    gradient_to_dict,
    named_range,
    named_step,
    nearest_name,
    range_method_from_dict,
    range_method_to_dict,
    step_method_from_dict,
    step_method_to_dict,
)
from kqat.grids.ranges.entropy import Entropy
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.last_value import LastValue
from kqat.grids.ranges.learned_clip import LearnedClip
from kqat.grids.ranges.learned_method import LearnedRangeMethod, RangeForm
from kqat.grids.ranges.learned_range import LearnedRange
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import FOLLOWING, Anchor, MovingAverage
from kqat.grids.ranges.mse import MSE
from kqat.grids.ranges.percentile import Percentile
from kqat.grids.site import Site
from kqat.grids.spec import INT8_ACTIVATION, INT8_WEIGHTS, INT16_ACTIVATION, QuantSpec
from kqat.grids.traced_once import traced_once
from kqat.grids.trained_threshold import TrainedThreshold
from kqat.grids.weight_steps.binary import Binary
from kqat.grids.weight_steps.learned_method import LearnedMethod
from kqat.grids.weight_steps.learned_step import LearnedStep
from kqat.grids.weight_steps.learned_ternary import LearnedTernary
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.max_abs import MaxAbs
from kqat.grids.weight_steps.ternary import Ternary

__all__ = [
    "CALIBRATION_METHODS",
    "FOLLOWING",
    "GRADIENTS",
    "HIDDEN",
    "INT8_ACTIVATION",
    "INT8_WEIGHTS",
    "INT16_ACTIVATION",
    "LOWEST",
    "MSE",
    "RANGE_METHODS",
    "STEP_METHODS",
    "AdditiveNoise",
    "Anchor",
    "Binary",
    "Bounds",
    "CalibrationMethod",
    "Clamp",
    "Clipped",
    "ElementWiseScaling",
    "Entropy",
    "Fixed",
    "GradientEstimator",
    "Histogram",
    "Identity",
    "LastValue",
    "LearnedClip",
    "LearnedMethod",
    "LearnedRange",
    "LearnedRangeMethod",
    "LearnedStep",
    "LearnedTernary",
    "LeastSquares",
    "MaxAbs",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "QuantSpec",
    "RangeForm",
    "RangeMethod",
    "Site",
    "StepMethod",
    "Ternary",
    "TrainedThreshold",
    "arithmetic",
    "bias_steps",
    "calibration_method",
    "clamp_from_json",
    "clamp_to_json",
    "estimated",
    "gradient_estimator",
    "gradient_from_dict",
    "gradient_to_dict",
    "least_bias_step",
    "named_range",
    "named_step",
    "nearest_name",
    "on_bias_grid",
    "range_method_from_dict",
    "range_method_to_dict",
    "step_method_from_dict",
    "step_method_to_dict",
    "traced_once",
]
