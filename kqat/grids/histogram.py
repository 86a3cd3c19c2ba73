"""`Histogram`: counts the values of one tensor, independent of the order in which they come.

Bins are `2**exponent` wide and aligned to zero, and counts are integers. A coarser bin is exactly
two finer ones. So the histogram of all values is the same, bit for bit, for any order and any
batch size.
"""

import dataclasses

import numpy as np

from kqat.grids.arithmetic import SMALLEST_RANGE

BINS = 4096
# The smallest exponent: such a bin is narrower than any step of a grid.
_FINEST = -112


@dataclasses.dataclass(frozen=True)
class Tail:
    """Running sums over the bins of one side, from zero outwards.

    `edges` (n + 1) begin at zero; `count`, `first` and `second` (n + 1) are the number of values,
    the sum of their magnitudes and of their squares beyond each edge, all float64.
    """

    edges: np.ndarray
    count: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def squares_beyond(self, bound: np.ndarray) -> np.ndarray:
        """Sum over the values beyond `bound` of the squared distance to it."""
        count, first, second = (
            np.interp(bound, self.edges, sums) for sums in (self.count, self.first, self.second)
        )
        return np.maximum(second - 2.0 * bound * first + bound**2 * count, 0.0)

    def count_beyond(self, bound: np.ndarray) -> np.ndarray:
        """The number of values beyond `bound`."""
        return np.interp(bound, self.edges, self.count)

    def bound_of(self, count: float) -> float:
        """The smallest bound with at most `count` values beyond it."""
        return float(np.interp(-count, -self.count, self.edges))


class Histogram:
    """The histogram of all values of one tensor.

    Attributes:
        low, high: exact minimum and maximum of all values and zero.
        counts: int64, the number of values in each bin from bin `first` on.
        first: the index of the first bin; bin `i` is `[i, i + 1) * 2**exponent`.
        zeros: the number of values that are exactly zero; they are in no bin.
    """

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.zeros = 0
        self.exponent = _FINEST
        self.first = 0
        self.counts = np.zeros(1, np.int64)

    @property
    def total(self) -> int:
        """The number of all values."""
        return self.zeros + int(self.counts.sum())

    def add(self, values: np.ndarray, low: float, high: float) -> None:
        """Adds finite float32 `values` of any shape, all inside `[low, high]`.

        `values` may be a part of a tensor; `low` and `high` are the extremes of the whole tensor.
        """
        self._grow(low, high)
        zeros = values.size - np.count_nonzero(values)
        flat = values.reshape(-1)
        scaled = flat * np.float32(2.0**-self.exponent)
        if self.low < 0.0:
            scaled = np.floor(scaled, out=scaled)
            # The product with a small number may be zero; the value is none.
            np.minimum(scaled, -1.0, out=scaled, where=flat < 0.0)
        index = scaled.astype(np.int32)
        index -= self.first
        self.counts += np.bincount(index, minlength=len(self.counts))
        self.counts[-self.first] -= zeros
        self.zeros += int(zeros)

    def merge(self, other: "Histogram") -> None:
        """Adds all values of `other`."""
        self._grow(other.low, other.high)
        shift = self.exponent - other.exponent
        index = (np.arange(len(other.counts)) + other.first) >> shift
        np.add.at(self.counts, index - self.first, other.counts)
        self.zeros += other.zeros

    def tail(self, upper: bool) -> Tail:
        """The running sums of the values above zero, or of the mirrored values below zero."""
        counts = self.counts[-self.first :] if upper else self.counts[: -self.first][::-1]
        width = 2.0**self.exponent
        edges = np.arange(len(counts) + 1) * width
        middle = (np.arange(len(counts)) + 0.5) * width
        # The outermost edge is the extreme itself, which is known exactly.
        edges[-1] = min(
            edges[-1], max(self.high if upper else -self.low, edges[:-1].max(initial=0.0))
        )
        weights = counts.astype(np.float64)

        def beyond(each: np.ndarray) -> np.ndarray:
            return np.append(np.cumsum(each[::-1])[::-1], 0.0)

        return Tail(edges, beyond(weights), beyond(weights * middle), beyond(weights * middle**2))

    def _grow(self, low: float, high: float) -> None:
        """Makes bins for `[low, high]`; if they are too many, merges pairs into wider ones."""
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        exponent = self.exponent
        while self._last(exponent) - self._first(exponent) >= BINS:
            exponent += 1
        shift = exponent - self.exponent
        first, last = self._first(exponent), self._last(exponent)
        counts = np.zeros(last - first + 1, np.int64)
        index = (np.arange(len(self.counts)) + self.first) >> shift
        np.add.at(counts, index - first, self.counts)
        self.exponent, self.first, self.counts = exponent, first, counts

    def _first(self, exponent: int) -> int:
        return int(np.floor(self.low * 2.0**-exponent))

    def _last(self, exponent: int) -> int:
        return int(np.floor(self.high * 2.0**-exponent))

    def is_zero(self) -> bool:
        """Whether all values are zero."""
        return self.high - self.low < SMALLEST_RANGE
