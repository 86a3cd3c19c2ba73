"""Functions of 16-bit integers as straight pieces and exceptions, in whole numbers alone.

A table of all 65,536 values takes 128 kB, too much for a microcontroller. So the integers are cut
into equal pieces, each a straight line; a piece that is not straight enough (at a kink, a jump or a
pole) keeps a value for each of its integers. No value is more than one step off.
"""

import dataclasses

import numpy as np

from kqat.base import LoweringError

INTEGERS = 2**16
# Numbers of pieces that are tried. TFLite's own int16 tables (TANH, LOGISTIC) have 512.
COUNTS = (512, 1024, 2048, 4096, 8192)
# The largest error allowed, of the lines and the rounding to a whole step together.
MOST_STEPS = 1.0
MOST_SLOPE = 2**15 - 1  # two bytes
# Rows of exceptions are numbered by one byte; row 0 is that of pieces without.
MOST_ROWS = 255
MOST_SHIFT = 8  # so that a base, of 16 + 8 bits, takes three bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """A function `y` of `x`, both from -32768 to 32767.

    Invariant, with `u = x + 32768`, `i = u // points` and `k = u % points`:
    `y = (base[i] + slope[i] * k) // 2**shift - 32768 + exceptions[rows[i], k]`, and `base[i] +
    slope[i] * k` is nowhere negative.

    Attributes:
        base: (pieces,) int64 of 24 bits, not negative.
        slope: (pieces,) int64, at most `MOST_SLOPE` in size.
        rows: (pieces,) int64, the row of `exceptions` that is added, 0 for none.
        exceptions: (rows, points) int64 of 16 bits; the first row is zero.
        shift: binary places of `base` and `slope`.
        error_steps: the largest distance from the function, in steps of its result.
    """

    base: np.ndarray
    slope: np.ndarray
    rows: np.ndarray
    exceptions: np.ndarray
    shift: int
    error_steps: float

    @property
    def points(self) -> int:
        """The integers of one piece."""
        return INTEGERS // len(self.base)

    @property
    def size_bytes(self) -> int:
        """What the tables take in the file."""
        rows = self.rows.size + 2 * self.exceptions.size if len(self.exceptions) > 1 else 0
        return 5 * len(self.base) + rows

    def evaluate(self, integers: np.ndarray) -> np.ndarray:
        """`y` of integers `x`, of their shape: what the operators of the file compute."""
        piece, point = np.divmod(integers.astype(np.int64) + INTEGERS // 2, self.points)
        line = (self.base[piece] + self.slope[piece] * point) // 2**self.shift
        return line - INTEGERS // 2 + self.exceptions[self.rows[piece], point]


def fit(values: np.ndarray, name: str) -> Pieces:
    """The pieces of fewest bytes with which no value is more than one step off.

    Args:
        values: (65536,) the function's value of each integer, in steps of its result.
        name: of the layer, for the error message.

    Raises:
        LoweringError: if too many pieces would need exceptions.
    """
    inside = np.clip(np.nan_to_num(values.astype(np.float64)), -(2**15), 2**15 - 1)
    candidates = [_fit(inside, count) for count in COUNTS]
    fitting = [pieces for pieces in candidates if len(pieces.exceptions) - 1 <= MOST_ROWS]
    if not fitting:
        raise LoweringError(
            f"Expected a function that is smooth but for at most {MOST_ROWS} of "
            f"{COUNTS[-1]} places, where activations have 16 bits. Received: '{name}', whose "
            f"values jump at {len(candidates[-1].exceptions) - 1}. Give its layer 'int8' in the "
            "policy, where its table is exact, or convert for target 'litert'."
        )
    return min(fitting, key=lambda pieces: pieces.size_bytes)


def _fit(values: np.ndarray, count: int) -> Pieces:
    exact = values.reshape(count, -1)
    points = exact.shape[1]
    steepness = (exact[:, -1] - exact[:, 0]) / (points - 1)
    steepest = max(float(np.abs(steepness).max()), 2.0**-20)
    shift = min(MOST_SHIFT, int(np.floor(np.log2(MOST_SLOPE / steepest))))
    slope = np.rint(steepness * 2**shift).astype(np.int64)
    along = slope[:, np.newaxis] * np.arange(points)
    # The base puts the line half way between the largest and the smallest residual; the half step
    # makes // round to nearest.
    left = (exact + 2**15 + 0.5) * 2**shift - along
    middle = np.floor((left.max(axis=1) + left.min(axis=1)) / 2).astype(np.int64)
    low, high = along.min(axis=1), along.max(axis=1)
    base = np.clip(middle, -low, INTEGERS * 2**shift - 1 - high)
    line = (base[:, np.newaxis] + along) // 2**shift - 2**15
    bent = np.abs(line - exact).max(axis=1) > MOST_STEPS
    # A piece with exceptions is a level line half way between its extremes, so that the distance
    # to each value fits two bytes.
    whole = np.floor(exact[bent] + 0.5).astype(np.int64)
    level = (whole.max(axis=1) + whole.min(axis=1) + 1) // 2
    base[bent], slope[bent] = (level + 2**15) * 2**shift, 0
    missing = whole - level[:, np.newaxis]
    pieces = Pieces(
        base=base,
        slope=slope,
        rows=np.where(bent, np.cumsum(bent), 0),
        exceptions=np.concatenate([np.zeros((1, points), np.int64), missing]),
        shift=shift,
        error_steps=0.0,
    )
    found = pieces.evaluate(np.arange(-(2**15), 2**15))
    error = float(np.abs(found - values).max())
    return dataclasses.replace(pieces, error_steps=error)
