"""Prefix codes whose decoding tables TFLite Micro's DECODE reads.

Huffman 1952, "A method for the construction of minimum-redundancy codes"; lengths are limited by
the package-merge algorithm of Larmore and Hirschberg 1990, "A fast algorithm for optimal
length-limited Huffman codes". The tables' layout is that of TFLite Micro's
`decode_state_huffman.h` (2026-08).
"""

import dataclasses
import math

import numpy as np

# A table entry has 16 bits: whether a code ends here, a count in 4 bits, and in 11 bits a symbol,
# or the offset of the table in which the code goes on.
_FOUND = 0x8000
_COUNT_SHIFT = 11
_LARGEST_OFFSET = 0x07FF
_LONGEST = 15
# The decoder reads the stream in whole words, and may read past its end.
_PADDING = b"\0" * 4


@dataclasses.dataclass(frozen=True)
class PrefixCode:
    """A code for the integers of one tensor.

    Attributes:
        codes: integer -> its code, a string of "0" and "1".
        root_bits: bits that the first table is indexed by.
        tables: entries of all tables, uint16, the first one in front.
    """

    codes: dict[int, str]
    root_bits: int
    tables: np.ndarray

    def stream(self, integers: np.ndarray) -> bytes:
        """The codes of the integers, first bit in the highest place; padded to whole words."""
        bits = "".join(map(self.codes.__getitem__, integers.reshape(-1).tolist()))
        digits = np.frombuffer(bits.encode(), np.uint8) - ord("0")
        stream = np.packbits(digits).tobytes()
        return stream + b"\0" * (-len(stream) % 4) + _PADDING


def best_code(integers: np.ndarray) -> PrefixCode | None:
    """The code with the fewest bytes for stream and tables; `None` for fewer than two values."""
    symbols, counts = np.unique(integers, return_counts=True)
    if len(symbols) < 2:
        return None
    least: tuple[int, PrefixCode] | None = None
    for limit in range(math.ceil(math.log2(len(symbols))), _LONGEST + 1):
        lengths = code_lengths(counts.tolist(), limit)
        stream_bytes = int(np.dot(counts, lengths)) // 8
        codes = _canonical(symbols.tolist(), lengths)
        for root_bits in range(1, max(lengths) + 1):
            tables = _tables(codes, root_bits)
            if tables is None:
                continue
            size = stream_bytes + tables.nbytes
            if least is None or size < least[0]:
                least = size, PrefixCode(codes, root_bits, tables)
        if max(lengths) < limit:
            break
    return None if least is None else least[1]


def code_lengths(counts: list[int], limit: int) -> list[int]:
    """Lengths of at most `limit` bits that need the fewest bits for symbols that occur so often.

    Args:
        counts: of at least 2 symbols, and of at most 2**limit.
        limit: bits.
    """
    leaves: list[tuple[int, tuple[int, ...]]] = sorted(
        (count, (index,)) for index, count in enumerate(counts)
    )
    row = leaves
    for _ in range(limit - 1):
        pairs = zip(row[::2], row[1::2], strict=False)
        row = sorted([*leaves, *((a[0] + b[0], a[1] + b[1]) for a, b in pairs)])
    lengths = [0] * len(counts)
    for _, package in row[: 2 * len(counts) - 2]:
        for index in package:
            lengths[index] += 1
    return lengths


def _canonical(symbols: list[int], lengths: list[int]) -> dict[int, str]:
    """The canonical code: in the order of lengths, each code is the one before plus 1, shifted
    left to its own length.
    """
    codes, code, before = {}, 0, 0
    for length, symbol in sorted(zip(lengths, symbols, strict=True)):
        code <<= length - before
        codes[symbol] = f"{code:0{length}b}"
        code, before = code + 1, length
    return codes


def _tables(codes: dict[int, str], root_bits: int) -> np.ndarray | None:
    """A table for the first `root_bits` bits, and one for each prefix of a longer code.

    `None` if an offset would not fit its 11 bits.
    """
    groups: dict[str, dict[int, str]] = {}
    for symbol, code in codes.items():
        if len(code) > root_bits:
            groups.setdefault(code[:root_bits], {})[symbol] = code[root_bits:]
    short = {symbol: code for symbol, code in codes.items() if len(code) <= root_bits}
    entries = _filled(short, root_bits)
    for prefix, group in groups.items():
        bits = max(map(len, group.values()))
        place = int(prefix, 2)
        offset = len(entries) - place
        if offset > _LARGEST_OFFSET:
            return None
        entries[place] = (bits - 1) << _COUNT_SHIFT | offset
        entries += _filled(group, bits)
    return np.asarray(entries, np.uint16)


def _filled(codes: dict[int, str], bits: int) -> list[int]:
    """A table in which every index that begins with a code has that code's entry."""
    entries = [0] * 2**bits
    for symbol, code in codes.items():
        free = bits - len(code)
        first = int(code, 2) << free
        entry = _FOUND | len(code) << _COUNT_SHIFT | symbol & 0xFF
        entries[first : first + 2**free] = [entry] * 2**free
    return entries
