"""Numbers in words: what rounds to zero has no minus."""

import pytest

from kqat.base import decimal, json_text, significant


@pytest.mark.parametrize("number", [-0.0, -1e-9, -0.0499])
def test_a_zero_has_no_minus(number: float) -> None:
    assert decimal(number) == "0.0"
    assert decimal(number, signed=True) == "+0.0"


@pytest.mark.parametrize("number", [-0.0501, 0.25, 0.35, 12.449, -3.0, float("inf"), float("nan")])
def test_other_numbers_are_as_python_formats_them(number: float) -> None:
    assert decimal(number) == f"{number:.1f}"
    assert decimal(number, 2, signed=True) == f"{number:+.2f}"


def test_significant_digits_of_a_zero_have_no_minus() -> None:
    found = [significant(number, 3) for number in (-0.0, 0.0, -0.00012345, 12345.0)]
    assert found == ["0", "0", "-0.000123", "1.23e+04"]


def test_json_has_no_minus_before_a_zero() -> None:
    assert json_text({"gain": -0.0, "loss": [-0.5, 0]}) == '{"gain": 0.0, "loss": [-0.5, 0]}'
