"""Comparisons that an int8 kernel gets wrong, or refuses, as comparisons of int32 integers.

The int8 kernels compare values in steps of 1/256: on a finer grid unlike integers are equal to
them. At a scale of 1 or more they end the process, and they take no number from 127 on; there are
no int16 kernels. But a grid is in order, so its integers compare as their values do, with another
integer in the place of a number.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from kqat.grids import Site
from kqat.kernels import NUMPY, Grid, pointwise
from tflite_export import flatbuffer
from tflite_export.flatbuffer import OperatorT
from tflite_export.integer_pass.draft import Draft
from tflite_export.integer_pass.tables import Int32Writer
from tflite_export.kernels import ACTIVATION_DTYPES, OP_TABLE, TENSOR_TYPES, constant_on_grid


class _Comparison(NamedTuple):
    """What is known of a comparison `x ? number`.

    exchanged: the same with its sides exchanged.
    end: which end of the integers that it holds for is next to the number: 0 the first, 1 the one
        behind the last.
    offset: that end plus this is the integer which they compare with.
    between: by so many steps the number may lie beside that integer, halfway to the next.
    """

    exchanged: str
    end: int
    offset: int
    between: float


_COMPARISONS = {
    "EQUAL": _Comparison("EQUAL", 0, 0, 0.0),
    "NOT_EQUAL": _Comparison("NOT_EQUAL", 0, 0, 0.0),
    "GREATER": _Comparison("LESS", 0, -1, 0.5),
    "GREATER_EQUAL": _Comparison("LESS_EQUAL", 0, 0, -0.5),
    "LESS": _Comparison("GREATER", 1, 0, -0.5),
    "LESS_EQUAL": _Comparison("GREATER_EQUAL", 1, -1, 0.5),
}
_MOST = 2**31 - 1
# Tensor of a quantity, factor, offset -> the int32 tensor of `factor * x - offset`.
_Made = dict[tuple[int, int, int], int]


def compare_integers(draft: Draft) -> None:
    """Puts CASTs to int32 before the comparisons that int8 kernels cannot make.

    A number becomes the integer that the grid's integers compare with as their values do with it.
    Of two quantities each integer is multiplied by a whole number first, which are to one another
    as the scales are. Where the int8 kernel is right for all integers, or is with a number halfway
    between the same two, it stays.
    """
    integer = {id(operator) for operator in draft.integer_operators}
    made: _Made = {}
    operators: list[OperatorT] = []
    for operator in draft.graph.operators:
        if id(operator) in integer and draft.op_name(operator) in _COMPARISONS:
            operators += _before(draft, operator, made)
        operators.append(operator)
    draft.graph.operators = operators


def _before(draft: Draft, operator: OperatorT, made: _Made) -> list[OperatorT]:
    """Changes the operator's inputs where need be; returns the operators that make them."""
    inputs = [int(tensor) for tensor in operator.inputs]
    sites = [draft.sites.get(tensor) for tensor in inputs]
    numbers = [
        flatbuffer.tensor_data(draft.model, draft.graph.tensors[tensor]) for tensor in inputs
    ]
    name = draft.op_name(operator)
    a, b = sites
    if a is not None and b is not None:
        return [] if _is_right_of_two(name, a, b) else _of_two(draft, operator, (a, b), made)
    place = 0 if a is not None else 1
    site, number = sites[place], numbers[1 - place]
    if site is None or number is None:
        return []  # `check_operators` tells of the tensor that was not marked.
    name = name if place == 0 else _COMPARISONS[name].exchanged
    if _is_right(name, site, number, number):
        return []
    found = thresholds(name, site, number)
    halfway = site.reals(found + _COMPARISONS[name].between)
    writer = _writer(draft, inputs[place], site)
    operator.inputs = list(inputs)
    if _is_right(name, site, halfway, number):
        kind = draft.graph.tensors[inputs[1 - place]].type
        operator.inputs[1 - place] = flatbuffer.add_tensor(
            draft.model, number.shape, kind, name=f"{site.name}/number", data=halfway
        )
        return []
    operator.inputs[place] = _as_int32(writer, inputs[place], made)
    operator.inputs[1 - place] = writer.constant(found, "number")
    return writer.operators


def _writer(draft: Draft, like: int, site: Site) -> Int32Writer:
    return Int32Writer(draft.model, site.name, like, TENSOR_TYPES[ACTIVATION_DTYPES[site.bits]])


def _as_int32(
    writer: Int32Writer, tensor: int, made: _Made, factor: int = 1, offset: int = 0
) -> int:
    """`factor * x - offset` of a quantity's integers."""
    key = tensor, factor, offset
    if key not in made:
        if offset:
            before = _as_int32(writer, tensor, made, factor)
            made[key] = writer.by("SUB", before, offset, name="shifted")
        elif factor != 1:
            before = _as_int32(writer, tensor, made)
            made[key] = writer.by("MUL", before, factor, name="steps")
        else:
            made[key] = writer.cast(tensor, name="int32")
    return made[key]


def _integers(site: Site) -> np.ndarray:
    return np.arange(-(2 ** (site.bits - 1)), 2 ** (site.bits - 1))


def _holds_for(name: str, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Of values in order, the first that compares so with each number, and the one behind the last.

    The result is `(2, *numbers.shape)`, places in `values`; both are -1 for an EQUAL that holds for
    none. For NOT_EQUAL they are those that EQUAL holds for.
    """
    first, behind = (np.searchsorted(values, numbers, side) for side in ("left", "right"))
    zero, last = np.zeros_like(first), np.full_like(first, len(values))
    ends = {
        "GREATER": (behind, last),
        "GREATER_EQUAL": (first, last),
        "LESS": (zero, first),
        "LESS_EQUAL": (zero, behind),
    }
    if name in ends:
        return np.stack(ends[name])
    return np.where(first < behind, np.stack([first, behind]), -1)


def thresholds(name: str, site: Site, numbers: np.ndarray) -> np.ndarray:
    """The integers that a grid's integers compare with as its values do with numbers.

    Args:
        name: the comparison, the grid's values at its left.
        site: the grid.
        numbers: float32 of any shape.

    Returns:
        int32 of that shape. An integer that no value of the grid is equal to is one below the
        least.
    """
    known, integers = _COMPARISONS[name], _integers(site)
    ends = _holds_for(name, site.reals(integers), numbers)
    return np.asarray(integers[0] + ends[known.end] + known.offset, np.int32)


def _lifted(integers: np.ndarray, scale: np.float32, zero_point: int) -> np.ndarray:
    """What the int8 kernel compares in the place of integers."""
    grid = Grid((np.float32(scale),), zero_point, "int8")
    return np.asarray(pointwise.lifted_for_comparison(NUMPY, integers.astype(np.int32), grid))


def _is_right(name: str, site: Site, given: np.ndarray, numbers: np.ndarray) -> bool:
    """Whether the int8 kernel, given certain numbers, compares each integer as with `numbers`."""
    limit = OP_TABLE[name].input_scale_below
    size = float(np.abs(given).max(initial=0.0))
    if site.bits != 8 or site.scale >= limit or not size < 127.0 * limit:
        return False
    integers, scale, zero = constant_on_grid(given, None)
    lifted = _lifted(_integers(site), site.scale, site.zero_point)
    found = _holds_for(name, lifted, _lifted(integers, np.float32(scale), zero))
    return np.array_equal(found, _holds_for(name, site.reals(_integers(site)), numbers))


def _is_right_of_two(name: str, a: Site, b: Site) -> bool:
    """Whether the int8 kernel compares all values of two grids aright; hardly of unlike scales."""
    if (a.bits, b.bits) != (8, 8) or max(a.scale, b.scale) >= OP_TABLE[name].input_scale_below:
        return False
    exact, found = (
        np.sign(np.subtract.outer(*sides))
        for sides in (
            [site.reals(_integers(site)) for site in (a, b)],
            [_lifted(_integers(site), site.scale, site.zero_point) for site in (a, b)],
        )
    )
    return np.array_equal(exact, found)


def factors(a: Site, b: Site) -> tuple[int, int]:
    """Whole numbers by which the integers of two grids, less their zero points, compare as values.

    They are to one another as the scales, to some 1e-7 for grids of 8 bits, and fit into int32
    with any integers.
    """
    scales = Fraction(float(a.scale)), Fraction(float(b.scale))
    most = _MOST // (2 ** (max(a.bits, b.bits) - 1) + abs(a.zero_point) + abs(b.zero_point))
    ratio = (min(scales) / max(scales)).limit_denominator(most)
    # A step that is nothing beside the other grid's decides where that has zero.
    small, large = (ratio.numerator, ratio.denominator) if ratio else (1, most)
    return (small, large) if scales[0] <= scales[1] else (large, small)


def _of_two(
    draft: Draft, operator: OperatorT, sites: tuple[Site, Site], made: _Made
) -> list[OperatorT]:
    """A factor at either side; the zero points as one constant at the second."""
    p, q = factors(*sites)
    offsets = 0, q * sites[1].zero_point - p * sites[0].zero_point
    inputs, operators = [], list[OperatorT]()
    for tensor, site, factor, offset in zip(
        map(int, operator.inputs), sites, (p, q), offsets, strict=True
    ):
        writer = _writer(draft, tensor, site)
        inputs.append(_as_int32(writer, tensor, made, factor, offset))
        operators += writer.operators
    operator.inputs = inputs
    return operators
