"""Integer weights in the encodings that TFLite Micro's DECODE operator takes.

An encoding is two arrays of bytes: the data, and the ancillary data that tell how to decode them,
which begin with a header of 16 bytes. Source: `tensorflow/lite/micro/compression/decode.py` and
`tensorflow/lite/micro/kernels/decode_state*.h` of TFLite Micro (2026-08).
"""

import dataclasses
from collections.abc import Collection, Iterator

import numpy as np

from tflite_export.weight_storage.huffman import best_code

METHODS = ("lookup", "prune", "huffman")

_TYPE = {"lookup": 0, "huffman": 1, "prune": 2}
_VERSION = 1
_HEADER_BYTES = 16
_WIDEST_INDEX = 7
# The buffers of a file are aligned to 16 bytes.
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A tensor of weights as DECODE takes it: `method` is one of `METHODS`."""

    method: str
    data: bytes
    ancillary: bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of both buffers in the file, each rounded up to its alignment."""
        return sum(len(part) + -len(part) % _ALIGNMENT for part in (self.data, self.ancillary))


def smallest(integers: np.ndarray, axis: int | None, methods: Collection[str]) -> Encoding | None:
    """The encoding with the fewest bytes; `None` where no method has one.

    Args:
        integers: int8, in the file's axis order.
        axis: the one along which scales differ, the first or the last; `None` for one scale.
        methods: those to try, of `METHODS`.
    """
    found = [made for method in methods for made in _ENCODERS[method](integers, axis)]
    return min(found, key=lambda encoding: encoding.size_bytes, default=None)


def _ancillary(method: str, parameters: bytes, tables: bytes) -> bytes:
    header = bytes([_TYPE[method], _VERSION, 0, 0, _VERSION]) + parameters
    return header.ljust(_HEADER_BYTES, b"\0") + tables


def _lookup(integers: np.ndarray, axis: int | None) -> Iterator[Encoding]:
    """Weights as indices: into one table for all channels, or into a table for each channel."""
    values, indices = np.unique(integers, return_inverse=True)
    # A stride of 0 has each channel read the same table.
    yield from _indexed(indices.reshape(integers.shape), values, stride=0)
    if axis is None:
        return
    channels = np.moveaxis(integers, axis, 0)
    found = [np.unique(channel, return_inverse=True) for channel in channels]
    stride = max(len(values) for values, _ in found)
    tables = np.zeros((len(found), stride), np.int8)
    for table, (values, _) in zip(tables, found, strict=True):
        table[: len(values)] = values
    own = np.stack([i.reshape(c.shape) for (_, i), c in zip(found, channels, strict=True)])
    yield from _indexed(np.moveaxis(own, 0, axis), tables, stride)


def _indexed(indices: np.ndarray, tables: np.ndarray, stride: int) -> Iterator[Encoding]:
    bits = max(int(indices.max(initial=0)).bit_length(), 1)
    if bits <= _WIDEST_INDEX:
        digits = indices.reshape(-1, 1) >> np.arange(bits - 1, -1, -1) & 1
        data = np.packbits(digits.astype(np.uint8)).tobytes()
        table = tables.astype(np.int8).tobytes()
        yield Encoding("lookup", data, _ancillary("lookup", bytes([bits, stride]), table))


def _prune(integers: np.ndarray, axis: int | None) -> Iterator[Encoding]:
    """One bit a weight, set where it is not zero; then the values that are not zero."""
    del axis
    kept = integers.reshape(-1) != 0
    table = integers.reshape(-1)[kept].astype(np.int8).tobytes()
    yield Encoding("prune", np.packbits(kept).tobytes(), _ancillary("prune", b"", table))


def _huffman(integers: np.ndarray, axis: int | None) -> Iterator[Encoding]:
    """A prefix code: few bits for values that occur often."""
    del axis
    code = best_code(integers)
    if code is not None:
        parameters = bytes([code.root_bits - 1 << 4])
        table = code.tables.astype("<u2").tobytes()
        yield Encoding("huffman", code.stream(integers), _ancillary("huffman", parameters, table))


_ENCODERS = {"lookup": _lookup, "prune": _prune, "huffman": _huffman}
