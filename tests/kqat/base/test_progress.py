"""Loops that say how far they are: to nobody, or to a listener, whatever the items are."""

from collections.abc import Iterable

import pytest

from kqat.base import listening, tracked


@pytest.mark.parametrize(
    ("items", "given", "total"),
    [([1, 2, 3], None, 3), (iter([1, 2, 3]), None, None), (iter([1, 2, 3]), 3, 3), ([], None, 0)],
)
def test_a_listener_hears_each_step(
    items: Iterable[int], given: int | None, total: int | None
) -> None:
    heard: list[tuple[str, int, int | None]] = []
    with listening(lambda *said: heard.append(said)):
        found = list(tracked(items, "counting", given))
    assert heard == [("counting", n, total) for n in range(len(found) + 1)]


def test_without_a_listener_items_pass() -> None:
    assert list(tracked([1, 2], "counting")) == [1, 2]
