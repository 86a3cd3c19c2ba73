"""**Tables**: range methods of activations, step methods of weights, gradient estimators, by name.

Each method is a frozen dataclass in a module of its own. `RANGE_METHODS`, `STEP_METHODS` and
`GRADIENTS` map the names in a saved model, and in a config, to them.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from kqat.base import CalibrationError, SpecError
from kqat.grids.gradients.additive_noise import AdditiveNoise
from kqat.grids.gradients.clipped import Clipped
from kqat.grids.gradients.element_wise_scaling import ElementWiseScaling
from kqat.grids.gradients.estimator import FunctionGradient, GradientEstimator
from kqat.grids.gradients.identity import Identity
from kqat.grids.ranges.entropy import Entropy
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.last_value import LastValue
from kqat.grids.ranges.learned_clip import LearnedClip
from kqat.grids.ranges.learned_range import LearnedRange
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import MovingAverage
from kqat.grids.ranges.mse import MSE
from kqat.grids.ranges.percentile import Percentile
from kqat.grids.trained_threshold import TrainedThreshold
from kqat.grids.weight_steps.binary import Binary
from kqat.grids.weight_steps.learned_step import LearnedStep
from kqat.grids.weight_steps.learned_ternary import LearnedTernary
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.max_abs import MaxAbs
from kqat.grids.weight_steps.ternary import Ternary

RangeMethod = (
    MinMax
    | Percentile
    | MSE
    | Entropy
    | MovingAverage
    | LastValue
    | Fixed
    | LearnedRange
    | LearnedClip
    | TrainedThreshold
)
CalibrationMethod = MinMax | Percentile | MSE | Entropy
StepMethod = (
    MaxAbs | LearnedStep | LeastSquares | TrainedThreshold | Ternary | LearnedTernary | Binary
)

RANGE_METHODS: dict[str, type] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
    "moving_average": MovingAverage,
    "last_value": LastValue,
    "fixed": Fixed,
    "lsq_plus": LearnedRange,
    "pact": LearnedClip,
    "tqt": TrainedThreshold,
}

# The name that `calibrate` takes -> the calibration method.
CALIBRATION_METHODS: dict[str, type] = {
    name: RANGE_METHODS[name] for name in ("minmax", "percentile", "mse", "entropy")
}

STEP_METHODS: dict[str, type] = {
    "max_abs": MaxAbs,
    "lsq": LearnedStep,
    "mse": LeastSquares,
    "tqt": TrainedThreshold,
    "ternary": Ternary,
    "ttq": LearnedTernary,
    "binary": Binary,
}

GRADIENTS: dict[str, type] = {
    "identity": Identity,
    "clipped": Clipped,
    "ewgs": ElementWiseScaling,
    "noise": AdditiveNoise,
}

# Names that papers use for what a row of these tables is, or for what has none.
_ALSO_KNOWN_AS = {
    "xnor": "binary",
    "twn": "ternary",
    "lsq+": "lsq_plus",
    "pact": "pact",
    "lsq": "lsq_plus",
    "ema": "moving_average",
    "ste": "identity",
    "straight_through": "identity",
    "diffq": "noise",
}


def calibration_method(method: Any) -> CalibrationMethod:
    """The calibration method of a name; a calibration method is returned as it is.

    Raises:
        CalibrationError: if there is no method of that name, or `method` is something else.
    """
    if isinstance(method, str) and method in CALIBRATION_METHODS:
        return CALIBRATION_METHODS[method]()
    if type(method) in CALIBRATION_METHODS.values():
        return method
    raise CalibrationError(
        f"Expected 'auto' or one of {sorted(CALIBRATION_METHODS)} as calibration method, or "
        f"kqat.MinMax(), Percentile(), MSE() or Entropy(). Received: {method!r}."
    )


def range_method_to_dict(method: RangeMethod) -> dict[str, Any]:
    """`method` as plain JSON types.

    Raises:
        SpecError: if its type is not in `RANGE_METHODS`.
    """
    return _to_dict(method, RANGE_METHODS, "range")


def range_method_from_dict(config: Mapping[str, Any]) -> RangeMethod:
    """The inverse of `range_method_to_dict`.

    Raises:
        SpecError: if the name is not in `RANGE_METHODS`.
    """
    return _from_dict(config, RANGE_METHODS, "range")


def step_method_to_dict(method: StepMethod) -> dict[str, Any]:
    """`method` as plain JSON types.

    Raises:
        SpecError: if its type is not in `STEP_METHODS`.
    """
    return _to_dict(method, STEP_METHODS, "step")


def step_method_from_dict(config: Mapping[str, Any]) -> StepMethod:
    """The inverse of `step_method_to_dict`.

    Raises:
        SpecError: if the name is not in `STEP_METHODS`.
    """
    return _from_dict(config, STEP_METHODS, "step")


def gradient_estimator(estimator: Any) -> GradientEstimator | None:
    """The estimator of a name or of a registered function; an estimator or `None` as it is.

    Raises:
        SpecError: if it is none of these, naming the nearest.
    """
    if estimator is None or type(estimator) in (*GRADIENTS.values(), FunctionGradient):
        return estimator
    if isinstance(estimator, str):
        return _named(estimator, GRADIENTS, "gradient")
    if callable(estimator):
        return FunctionGradient(estimator)
    raise SpecError(
        f"Expected one of {sorted(GRADIENTS)}, a function or None as gradient method. Received: "
        f"{estimator!r}."
    )


def gradient_to_dict(estimator: GradientEstimator | None) -> dict[str, Any] | None:
    """`estimator` as plain JSON types.

    Raises:
        SpecError: if its type is not in `GRADIENTS`.
    """
    if estimator is None:
        return None
    if isinstance(estimator, FunctionGradient):
        return {"function": estimator.registered_name}
    return _to_dict(estimator, GRADIENTS, "gradient")


def gradient_from_dict(config: Mapping[str, Any] | None) -> GradientEstimator | None:
    """The inverse of `gradient_to_dict`.

    Raises:
        SpecError: if the name is not in `GRADIENTS`, or no function of that name is registered.
    """
    if config is None:
        return None
    if "function" not in config:
        return _from_dict(config, GRADIENTS, "gradient")
    function = keras.saving.get_registered_object(config["function"])
    if function is None:
        raise SpecError(
            f"Expected the gradient function '{config['function']}' to be registered. Received: no "
            "function of that name. Import the module that registers it before loading."
        )
    return FunctionGradient(function)


def named_step(name: str) -> StepMethod:
    """The step method of a name, with its defaults.

    Raises:
        SpecError: if there is no method of that name, naming the nearest.
    """
    return _named(name, STEP_METHODS, "step")


def named_range(name: str) -> RangeMethod:
    """The range method of a name, with its defaults.

    Raises:
        SpecError: if there is no method of that name, naming the nearest; or it has no defaults.
    """
    return _named(name, RANGE_METHODS, "range")


def _named(name: str, table: dict[str, type], kind: str) -> Any:
    if name not in table:
        raise SpecError(
            f"Expected one of {sorted(table)} as {kind} method. Received: {name!r}."
            + nearest_name(name, table)
        )
    if table[name] is Fixed:
        raise SpecError(
            f"Expected a range for the {kind} method {name!r}. Received: its name only. Give "
            "kqat.Fixed(low, high)."
        )
    return table[name]()


def nearest_name(name: str, names: Iterable[str]) -> str:
    """A sentence with the one of `names` that `name` is most like; empty where none is."""
    names = list(names)
    known = _ALSO_KNOWN_AS.get(name.lower(), name.lower())
    near = [known] if known in names else difflib.get_close_matches(known, names, 1, 0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _to_dict(method: Any, table: dict[str, type], kind: str) -> dict[str, Any]:
    for name, cls in table.items():
        if cls is type(method):
            return {"name": name, **vars(method)}
    raise SpecError(f"Expected one of {sorted(table)} as {kind} method. Received: {method!r}.")


def _from_dict(config: Mapping[str, Any], table: dict[str, type], kind: str) -> Any:
    options = dict(config)
    name = options.pop("name", None)
    if name not in table:
        raise SpecError(f"Expected one of {sorted(table)} as {kind} method. Received: {name!r}.")
    return table[name](**options)


__all__ = [
    "CALIBRATION_METHODS",
    "GRADIENTS",
    "MSE",
    "RANGE_METHODS",
    "STEP_METHODS",
    "AdditiveNoise",
    "Binary",
    "CalibrationMethod",
    "Clipped",
    "ElementWiseScaling",
    "Entropy",
    "Fixed",
    "FunctionGradient",
    "GradientEstimator",
    "Identity",
    "LastValue",
    "LearnedClip",
    "LearnedRange",
    "LearnedStep",
    "LearnedTernary",
    "LeastSquares",
    "MaxAbs",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "RangeMethod",
    "StepMethod",
    "Ternary",
    "TrainedThreshold",
    "calibration_method",
    "gradient_estimator",
    "gradient_from_dict",
    "gradient_to_dict",
    "named_range",
    "named_step",
    "nearest_name",
    "range_method_from_dict",
    "range_method_to_dict",
    "step_method_from_dict",
    "step_method_to_dict",
]
