"""The grids: their integers, what is refused, and the way through JSON."""

import dataclasses
import json
from typing import Any

import pytest

from kqat.base.errors import KqatError, SpecError
from kqat.grids.spec import INT8_ACTIVATION, INT8_WEIGHTS, MAX_BITS, MIN_BITS, QuantSpec

VALID = (
    QuantSpec(),
    QuantSpec(bits=2),
    QuantSpec(bits=16, narrow_range=True),
    QuantSpec(symmetric=True),
    QuantSpec(bits=4, symmetric=True, narrow_range=True, axis="channel"),
    QuantSpec(symmetric=True, axis=-1),
    QuantSpec(symmetric=True, axis=(-2, -1)),
)


@pytest.mark.parametrize(
    ("bits", "narrow_range", "expected"),
    [
        (2, False, (-2, 1)),
        (2, True, (-1, 1)),
        (4, False, (-8, 7)),
        (8, False, (-128, 127)),
        (8, True, (-127, 127)),
        (16, False, (-32768, 32767)),
        (16, True, (-32767, 32767)),
    ],
)
def test_integers_of_a_grid(bits: int, narrow_range: bool, expected: tuple[int, int]) -> None:
    spec = QuantSpec(bits=bits, narrow_range=narrow_range)
    assert (spec.qmin, spec.qmax) == expected


def test_one_bit_is_minus_one_and_one() -> None:
    spec = QuantSpec(bits=1, symmetric=True, axis="channel")
    assert (spec.qmin, spec.qmax) == (-1, 1)


@pytest.mark.parametrize("bits", range(MIN_BITS, MAX_BITS + 1))
def test_narrow_range_leaves_one_integer_out(bits: int) -> None:
    full, narrow = QuantSpec(bits=bits), QuantSpec(bits=bits, narrow_range=True)
    assert full.qmax - full.qmin == 2**bits - 1
    assert narrow.qmax - narrow.qmin == 2**bits - 2
    assert narrow.qmin == -narrow.qmax


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8.0}, r"Expected an integer number of bits. Received: bits=8\.0"),
        ({"bits": "8"}, "Expected an integer number of bits. Received: bits='8'"),
        ({"bits": True}, "Expected an integer number of bits. Received: bits=True"),
        ({"bits": 1}, "Expected 2 to 16 bits. Received: bits=1. Use 8"),
        (
            {"bits": 1, "symmetric": True, "narrow_range": True},
            "a grid of one bit: it has −1 and 1 only. Received: narrow_range=True. Use",
        ),
        ({"bits": 17}, "Expected 2 to 16 bits. Received: bits=17"),
        ({"symmetric": 1}, "Expected True or False. Received: symmetric=1"),
        ({"narrow_range": "no"}, "Expected True or False. Received: narrow_range='no'"),
        ({"symmetric": True, "axis": "rows"}, "Expected axis to be .* Received: axis='rows'"),
        ({"symmetric": True, "axis": 1.0}, r"Expected axis to be .* Received: axis=1\.0"),
        ({"symmetric": True, "axis": True}, "Expected axis to be .* Received: axis=True"),
        ({"symmetric": True, "axis": ()}, r"tuple of distinct ints.* Received: axis=\(\)"),
        ({"symmetric": True, "axis": (0, 0)}, r"tuple of distinct ints.* axis=\(0, 0\)"),
        ({"symmetric": True, "axis": [0, None]}, r"Expected axis to be .* axis=\(0, None\)"),
        ({"axis": -1}, "symmetric grid for scales per axis.* axis=-1. Use symmetric=True"),
        ({"axis": "channel"}, "symmetric grid for scales per axis.* axis='channel'"),
    ],
)
def test_what_is_no_grid_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        QuantSpec(**fields)


def test_the_refusal_is_an_error_of_this_project_and_a_value_error() -> None:
    assert issubclass(SpecError, KqatError)
    assert issubclass(SpecError, ValueError)


@pytest.mark.parametrize("spec", VALID, ids=str)
def test_dict_comes_back_through_json(spec: QuantSpec) -> None:
    assert QuantSpec(**json.loads(json.dumps(spec.to_dict()))) == spec


def test_specs_are_values() -> None:
    spec = QuantSpec(symmetric=True, axis=(0,))
    assert spec == QuantSpec(symmetric=True, axis=(0,))
    assert len({spec, QuantSpec(symmetric=True, axis=(0,)), QuantSpec()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError, match="bits"):
        spec.bits = 4  # type: ignore[misc]


def test_stock_grids_are_those_of_the_tflite_specification() -> None:
    # https://ai.google.dev/edge/litert/models/quantization_spec: weights -127..127 per axis with
    # zero point 0, activations -128..127 with any zero point.
    assert (INT8_WEIGHTS.qmin, INT8_WEIGHTS.qmax) == (-127, 127)
    assert INT8_WEIGHTS.symmetric
    assert INT8_WEIGHTS.axis == "channel"
    assert (INT8_ACTIVATION.qmin, INT8_ACTIVATION.qmax) == (-128, 127)
    assert not INT8_ACTIVATION.symmetric
    assert INT8_ACTIVATION.axis is None
