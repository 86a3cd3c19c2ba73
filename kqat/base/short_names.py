"""Names that fit the column of a table."""

import itertools
from collections.abc import Iterable


def shortened(name: str, width: int) -> str:
    """`name` in at most `width` characters: what does not fit goes out of its middle.

    Layers differ by what their names begin and end with, as `block_1_expand` and `block_2_expand`.
    """
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


def shortened_apart(names: Iterable[str], width: int) -> dict[str, str]:
    """Each name in at most `width` characters, so that no two of them look the same.

    Those that `shortened` would make alike show where they begin to differ. A name stays whole if
    that is not enough.
    """
    short = {name: shortened(name, width) for name in names}
    for alike in _alike(short):
        same = itertools.takewhile(lambda found: len(set(found)) == 1, zip(*alike, strict=False))
        begin = len(list(same))
        short |= {name: _from(name, begin, width) for name in alike}
    for alike in _alike(short):
        short |= {name: name for name in alike}
    return short


def _alike(short: dict[str, str]) -> list[list[str]]:
    """The names that look the same, together."""
    found: dict[str, list[str]] = {}
    for name, text in short.items():
        found.setdefault(text, []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _from(name: str, begin: int, width: int) -> str:
    """The beginning of a name, then what it has from the character `begin` on, and its end."""
    head = width // 4
    room = width - head - 1
    rest = name[begin:]
    return f"{name[:head]}…{shortened(rest, room) if len(rest) > room else name[-room:]}"
