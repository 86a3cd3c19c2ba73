"""RESIZE_NEAREST_NEIGHBOR and RESIZE_BILINEAR: places computed beforehand, then gathered."""

from typing import Any

import numpy as np

from kqat.kernels.arrays import Arrays
from kqat.kernels.rounding import divided


def nearest_places(given: int, result: int, *, corners: bool, centers: bool) -> np.ndarray:
    """Which row (or column) of `given` each of `result` shows."""
    scale = np.float32(given) / np.float32(result)
    if corners and result > 1:
        scale = np.float32(given - 1) / np.float32(result - 1)
    offset = np.float32(0.5 if centers else 0.0)
    place = (np.arange(result, dtype=np.float32) + offset) * scale
    # Half away from zero where corners meet.
    index = np.floor(place + np.float32(0.5)) if corners else np.floor(place)
    index = np.minimum(index.astype(np.int64), given - 1)
    return np.maximum(index, 0) if centers else index


def nearest(xp: Arrays, x: Any, rows: np.ndarray, columns: np.ndarray) -> Any:
    """The image of those rows and columns."""
    return xp.take(xp.take(x, rows, axis=1), columns, axis=2)


def bilinear_places(
    given: int, result: int, *, corners: bool, centers: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two rows between which each of `result` lies, and its distance from the first.

    Distances have 10 bits behind the point.
    """
    scale = ((1 << 10) * given + result // 2) // result
    if corners and result > 1:
        scale = ((1 << 10) * (given - 1) + (result - 1) // 2) // (result - 1)
    place = np.arange(result, dtype=np.int64) * scale
    if centers:
        place = place + scale // 2 - (1 << 9)
    # Divided towards zero, as C does.
    low = np.maximum(np.sign(place) * (np.abs(place) >> 10), 0)
    above = place + (1 << 10) - 1
    high = np.minimum(np.sign(above) * (np.abs(above) >> 10), given - 1)
    return low, high, place - (low << 10)


def misplaced(given: int, result: int, *, corners: bool, centers: bool, xnnpack: bool) -> float:
    """By how many rows of `given`, at most, a kernel misses the place of a row of `result`.

    It is the rounding of distances, and but for XNNPACK that of the scale, once for each row:
    15/1024 where 32 rows become 48, 63/1024 where they become 224.
    """
    find = bilinear_places_of_xnnpack if xnnpack else bilinear_places
    low, _, distance = find(given, result, corners=corners, centers=centers)
    places = low + distance / 2.0 ** (11 if xnnpack else 10)
    scale = (given - 1) / (result - 1) if corners and result > 1 else given / result
    shift = 0.5 if centers else 0.0
    exact = (np.arange(result) + shift) * scale - shift
    off = np.clip(places, 0, given - 1) - np.clip(exact, 0, given - 1)
    return float(np.abs(off).max())


def bilinear(
    xp: Arrays,
    x: Any,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    columns: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> Any:
    """RESIZE_BILINEAR in integers: products with 20 bits, halves away from zero."""
    x = xp.cast(x, "int64")
    (top, bottom, down), (left, right, across) = rows, columns
    down, across = down.reshape(1, -1, 1, 1), across.reshape(1, 1, -1, 1)
    total = 0
    for row, weight in ((top, (1 << 10) - down), (bottom, down)):
        part = xp.take(x, row, axis=1)
        for column, other in ((left, (1 << 10) - across), (right, across)):
            total = total + xp.take(part, column, axis=2) * weight * other
    return xp.cast(divided(xp, total, 20), "int32")


def bilinear_places_of_xnnpack(
    given: int, result: int, *, corners: bool, centers: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for XNNPACK, computed in float32; distances have 11 bits behind the point."""
    less = int(corners and result != 1)
    scale = np.float32(given - less) / np.float32(result - less)
    place = np.arange(result, dtype=np.float32) * scale
    if centers and not corners:
        offset = np.float32(0.5) * scale - np.float32(0.5)
        place = np.maximum(place + offset, np.float32(0))
    place = np.minimum(place, np.float32(given - 1))
    low = place.astype(np.int64)
    distance = np.rint((place - low.astype(np.float32)) * np.float32(2**11)).astype(np.int64)
    return low, np.minimum(low + 1, given - 1), distance


def bilinear_by_xnnpack(
    xp: Arrays,
    x: Any,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    columns: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> Any:
    """RESIZE_BILINEAR on XNNPACK: products with 22 bits, halves up."""
    x = xp.cast(x, "int32")
    (top, bottom, down), (left, right, across) = rows, columns
    down = down.astype(np.int32).reshape(1, -1, 1, 1)
    across = across.astype(np.int32).reshape(1, 1, -1, 1)

    def between(part: Any) -> Any:
        first, second = xp.take(part, left, axis=2), xp.take(part, right, axis=2)
        return first * 2**11 + (second - first) * across

    first, second = between(xp.take(x, top, axis=1)), between(xp.take(x, bottom, axis=1))
    return xp.right_shift(first * 2**11 + (second - first) * down + 2**21, 22)
