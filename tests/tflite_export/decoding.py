"""What TFLite Micro's DECODE computes, in NumPy, by the description of its formats.

`tensorflow/lite/micro/compression/decode.py` and `kernels/decode_state*.h` of TFLite Micro.
"""

import numpy as np

LOOKUP, HUFFMAN, PRUNE = range(3)
HEADER_BYTES = 16


def decode(
    data: bytes, ancillary: bytes, shape: tuple[int, ...], axis: int | None = None
) -> np.ndarray:
    """int8 weights of `shape`; `axis` is the one along which scales differ."""
    kind, version, own_version = ancillary[0], ancillary[1], ancillary[4]
    assert (version, own_version) == (1, 1)
    tables = np.frombuffer(ancillary[HEADER_BYTES:], np.uint8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    count = int(np.prod(shape))
    if kind == LOOKUP:
        width, stride = ancillary[5] & 7, ancillary[6]
        weights = 1 << np.arange(width - 1, -1, -1)
        indices = bits[: count * width].reshape(count, width) @ weights
        channel = np.zeros(shape, int) if axis is None else np.indices(shape)[axis]
        return tables.view(np.int8)[channel * stride + indices.reshape(shape)]
    if kind == PRUNE:
        kept = bits[:count].astype(bool)
        flat = np.zeros(count, np.int8)
        flat[kept] = tables.view(np.int8)
        return flat.reshape(shape)
    assert kind == HUFFMAN
    assert ancillary[5] & 1 == 0  # entries of 16 bits
    return _prefix_decoded(bits, tables.view("<u2"), (ancillary[5] >> 4) + 1, count).reshape(shape)


def _prefix_decoded(bits: np.ndarray, tables: np.ndarray, root: int, count: int) -> np.ndarray:
    def number(first: int, width: int) -> int:
        assert first + width <= len(bits), "reads past the stream"
        return int("".join(map(str, bits[first : first + width])), 2)

    decoded, position = [], 0
    for _ in range(count):
        place = number(position, root)
        position += root
        width = root
        while not (entry := int(tables[place])) & 0x8000:
            width = (entry >> 11 & 15) + 1
            place += (entry & 0x07FF) + number(position, width)
            position += width
        position -= width - (entry >> 11 & 15)
        decoded.append(entry & 0xFF)
    return np.asarray(decoded, np.uint8).view(np.int8)
