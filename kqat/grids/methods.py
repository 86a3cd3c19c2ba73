"""**Tables**: the range methods of activations and the step methods of weights, by saved name.

Each method is a frozen dataclass in a module of its own. `RANGE_METHODS` and `STEP_METHODS` map the
names in a saved model to them.
"""

from collections.abc import Mapping
from typing import Any

from kqat.base import CalibrationError, SpecError
from kqat.grids.ranges.entropy import Entropy
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.last_value import LastValue
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import MovingAverage
from kqat.grids.ranges.mse import MSE
from kqat.grids.ranges.percentile import Percentile
from kqat.grids.weight_steps.binary import Binary
from kqat.grids.weight_steps.learned_step import LearnedStep
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.max_abs import MaxAbs
from kqat.grids.weight_steps.ternary import Ternary

RangeMethod = MinMax | Percentile | MSE | Entropy | MovingAverage | LastValue | Fixed
CalibrationMethod = MinMax | Percentile | MSE | Entropy
StepMethod = MaxAbs | LearnedStep | LeastSquares | Ternary | Binary

RANGE_METHODS: dict[str, type] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
    "moving_average": MovingAverage,
    "last_value": LastValue,
    "fixed": Fixed,
}

# The name that `calibrate` takes -> the calibration method.
CALIBRATION_METHODS: dict[str, type] = {
    name: RANGE_METHODS[name] for name in ("minmax", "percentile", "mse", "entropy")
}

STEP_METHODS: dict[str, type] = {
    "max_abs": MaxAbs,
    "lsq": LearnedStep,
    "mse": LeastSquares,
    "ternary": Ternary,
    "binary": Binary,
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
    "MSE",
    "RANGE_METHODS",
    "STEP_METHODS",
    "Binary",
    "CalibrationMethod",
    "Entropy",
    "Fixed",
    "LastValue",
    "LearnedStep",
    "LeastSquares",
    "MaxAbs",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "RangeMethod",
    "StepMethod",
    "Ternary",
    "calibration_method",
    "range_method_from_dict",
    "range_method_to_dict",
    "step_method_from_dict",
    "step_method_to_dict",
]
