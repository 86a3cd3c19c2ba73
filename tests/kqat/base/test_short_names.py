"""Names that are too long for their column lose their middle, visibly."""

import pytest

from kqat.base import shortened


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
