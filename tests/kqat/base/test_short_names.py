"""Names that are too long for their column lose their middle, visibly."""

import pytest

from kqat.base import shortened, shortened_apart


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (24, "global_average_pooling2d"),
        (23, "global_aver…e_pooling2d"),
        (22, "global_aver…_pooling2d"),
        (9, "glob…ng2d"),
    ],
)
def test_what_does_not_fit_goes_out_of_the_middle(width: int, text: str) -> None:
    assert shortened("global_average_pooling2d", width) == text
    assert len(text) == width


def test_names_are_told_apart() -> None:
    rows = ["unit_of_layers_one_projection", "unit_of_layers_two_projection", "head"]
    short = shortened_apart(rows, 18)
    assert short == {rows[0]: "unit…one_pr…ection", rows[1]: "unit…two_pr…ection", "head": "head"}
    assert all(len(text) <= 18 for text in short.values())
    # What differs in two places, none of which has room, stays whole.
    alike = [f"aaaa{x}{'b' * 20}{y}{'c' * 20}" for x in "01" for y in "01"]
    assert len(set(shortened_apart(alike, 9).values())) == len(alike)
    assert shortened_apart(["a", "a"], 9) == {"a": "a"}
