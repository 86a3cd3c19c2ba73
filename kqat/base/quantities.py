"""Numbers in words: `counted`, `decimal`, `significant`."""


def counted(number: float) -> str:
    """A count in at most 6 characters: 950, 12.5 k, 12.5 M."""
    rounded = float(f"{number:.3g}")  # 999,950 is 1 M, not 1e+03 k
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rounded >= size:
            return f"{rounded / size:.3g} {unit}"
    return f"{rounded:.3g}"


def decimal(number: float, digits: int = 1, *, signed: bool = False) -> str:
    """A number with so many digits behind its point; what rounds to zero has no minus."""
    rounded = round(float(number), digits) + 0.0  # A sum of zeros has no sign.
    return f"{rounded:{'+' if signed else ''}.{digits}f}"


def significant(number: float, digits: int) -> str:
    """A number with so many significant digits; zero has no minus."""
    return f"{float(number) + 0.0:.{digits}g}"
