"""Ways to find the range of a tensor, one file each; all frozen, all plain data.

`RANGE_METHODS` is the table that a saved model is read back through.
"""

from typing import Any

from kqat.errors import SpecError
from kqat.quantizers.fixed import Fixed
from kqat.quantizers.last_value import LastValue
from kqat.quantizers.minmax import MinMax
from kqat.quantizers.moving_average import MovingAverage

RangeMethod = MinMax | MovingAverage | LastValue | Fixed

RANGE_METHODS: dict[str, type] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "last_value": LastValue,
    "fixed": Fixed,
}


def range_method_to_dict(method: RangeMethod) -> dict[str, Any]:
    """`method` as plain JSON types.

    Raises:
        SpecError: if its type is not in `RANGE_METHODS`.
    """
    for name, cls in RANGE_METHODS.items():
        if cls is type(method):
            return {"name": name, **vars(method)}
    raise SpecError(
        f"Expected one of {sorted(RANGE_METHODS)} as range method. Received: {method!r}."
    )


def range_method_from_dict(config: dict[str, Any]) -> RangeMethod:
    """The inverse of `range_method_to_dict`.

    Raises:
        SpecError: if the name is not in `RANGE_METHODS`.
    """
    options = dict(config)
    name = options.pop("name", None)
    if name not in RANGE_METHODS:
        raise SpecError(
            f"Expected one of {sorted(RANGE_METHODS)} as range method. Received: {name!r}."
        )
    return RANGE_METHODS[name](**options)


__all__ = [
    "RANGE_METHODS",
    "Fixed",
    "LastValue",
    "MinMax",
    "MovingAverage",
    "RangeMethod",
    "range_method_from_dict",
    "range_method_to_dict",
]
