"""Numbers in words: `counted`."""


def counted(number: float) -> str:
    """A count in at most 6 characters: 950, 12.5 k, 12.5 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
