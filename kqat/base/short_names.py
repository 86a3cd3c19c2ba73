"""Names that fit the column of a table."""


def shortened(name: str, width: int) -> str:
    """`name` in at most `width` characters: what does not fit goes out of its middle.

    Layers differ by what their names begin and end with, as `block_1_expand` and `block_2_expand`.
    """
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"
