"""**Tables**: the range methods of activations and the step methods of weights, by saved name.

Each method is a frozen dataclass in a module of its own. `RANGE_METHODS` and `STEP_METHODS` map the
names in a saved model to them.
"""

from collections.abc import Mapping
from typing import Any

from kqat.base import SpecError
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.last_value import LastValue
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import MovingAverage
from kqat.grids.weight_steps.binary import Binary
from kqat.grids.weight_steps.learned_step import LearnedStep
from kqat.grids.weight_steps.least_squares import LeastSquares
from kqat.grids.weight_steps.max_abs import MaxAbs
from kqat.grids.weight_steps.ternary import Ternary

RangeMethod = MinMax | MovingAverage | LastValue | Fixed
StepMethod = MaxAbs | LearnedStep | LeastSquares | Ternary | Binary

RANGE_METHODS: dict[str, type] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "last_value": LastValue,
    "fixed": Fixed,
}

STEP_METHODS: dict[str, type] = {
    "max_abs": MaxAbs,
    "lsq": LearnedStep,
    "mse": LeastSquares,
    "ternary": Ternary,
    "binary": Binary,
}


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
    "RANGE_METHODS",
    "STEP_METHODS",
    "Binary",
    "Fixed",
    "LastValue",
    "LearnedStep",
    "LeastSquares",
    "MaxAbs",
    "MinMax",
    "MovingAverage",
    "RangeMethod",
    "StepMethod",
    "Ternary",
    "range_method_from_dict",
    "range_method_to_dict",
    "step_method_from_dict",
    "step_method_to_dict",
]
