"""`tracked`: lets long loops say how far they are, to whoever listens; `listening` listens."""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
# what is being done, steps done, steps in all (`None`: not known)
Listener = Callable[[str, int, int | None], None]

_LISTENER: contextvars.ContextVar[Listener | None] = contextvars.ContextVar(
    "kqat_progress", default=None
)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Has `listener` called meanwhile, after each step of each tracked loop."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tracked(items: Iterable[T], doing: str, total: int | None = None) -> Iterator[T]:
    """The items, while a listener is told how many are done.

    Args:
        items: what a loop runs over.
        doing: the loop in words, in the form "calibrating".
        total: the number of items, by default their `len` where they have one.
    """
    listener = _LISTENER.get()
    if listener is None:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    listener(doing, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        listener(doing, done, total)
