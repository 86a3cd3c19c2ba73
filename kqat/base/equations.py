"""The terms of an `einsum` equation, with a letter for each axis."""

import string
from collections.abc import Sequence


def spelled_out(subscripts: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The terms of the operands and that of the output, as NumPy reads `subscripts`.

    Axes behind `...` get letters that the equation does not use, the same ones counted from the
    last of them. Where no output is written, it is the axes behind `...` and then the letters that
    occur once, in alphabetical order.

    Args:
        subscripts: the equation, as `"...ij,jk->...ik"`.
        ranks: the number of axes of each operand.
    """
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    counts = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    free = [c for c in string.ascii_letters if c not in subscripts]
    hidden = "".join(free[: max(counts)])
    if not arrow:
        once = sorted(c for c in set(inputs) - {",", "."} if inputs.count(c) == 1)
        output = "".join(["..." if "..." in inputs else "", *once])
    spelled = [
        term.replace("...", hidden[len(hidden) - count :])
        for term, count in zip(terms, counts, strict=True)
    ]
    return spelled, output.replace("...", hidden)
