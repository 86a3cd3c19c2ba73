"""Rewrites `keras.ops.image.extract_patches`: TFLite has no kernel for it."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.parts import SpaceToDepth, sliced


def extract_patches(operation: Any, name: str) -> Callable[..., Any]:
    """Patches side by side in the last axis, in the order rows, columns, channels.

    Square patches that meet edge to edge are SPACE_TO_DEPTH. All others are one strided slice for
    each place in a patch, which copies each number and changes none.
    """
    size = list(operation.size)
    rank = len(size)

    def call(images: Any) -> Any:
        if len(images.shape) != rank + 2:
            raise UnsupportedLayerError(
                f"Expected images of {rank + 2} axes in operation '{name}'. Received: shape "
                f"{tuple(images.shape)}. Reshape."
            )
        strides = _each(operation.strides or size, size)
        rates = _each(operation.dilation_rate, size)
        reach = [(taps - 1) * rate + 1 for taps, rate in zip(size, rates, strict=True)]
        x = images
        if operation.padding == "same":
            x = _padded(x, reach, strides, f"{name}_padded")
        counts = [
            (length - span) // stride + 1
            for length, span, stride in zip(x.shape[1:-1], reach, strides, strict=True)
        ]
        if rank == 2 and size == strides and size[0] == size[1] and set(rates) == {1}:
            covered = [count * stride for count, stride in zip(counts, strides, strict=True)]
            if covered != list(x.shape[1:-1]):
                x = sliced(x, _slices([0, 0], covered, [1, 1]), f"{name}_covered")
            return SpaceToDepth(size[0], name=name)(x)
        parts = []
        for place in itertools.product(*map(range, size)):
            begin = [at * rate for at, rate in zip(place, rates, strict=True)]
            end = [
                b + (count - 1) * stride + 1
                for b, count, stride in zip(begin, counts, strides, strict=True)
            ]
            label = "_".join(map(str, place))
            parts.append(sliced(x, _slices(begin, end, strides), f"{name}_{label}"))
        if len(parts) == 1:
            return layers.Identity(name=name)(parts[0])
        return layers.Concatenate(name=name)(parts)

    return call


def _each(value: Any, size: Sequence[int]) -> list[int]:
    return [value] * len(size) if isinstance(value, int) else list(value)


def _slices(begin: Sequence[int], end: Sequence[int], steps: Sequence[int]) -> tuple[slice, ...]:
    inner = [slice(b, e, s) for b, e, s in zip(begin, end, steps, strict=True)]
    return (slice(None), *inner, slice(None))


def _padded(x: Any, reach: Sequence[int], strides: Sequence[int], name: str) -> Any:
    """Zeros around `x` as a convolution of padding "same" sees them."""
    pads = []
    for length, span, stride in zip(x.shape[1:-1], reach, strides, strict=True):
        total = max((-(-length // stride) - 1) * stride + span - length, 0)
        pads.append((total // 2, total - total // 2))
    if not any(map(sum, pads)):
        return x
    kind = layers.ZeroPadding3D if len(pads) == 3 else layers.ZeroPadding2D
    return kind(tuple(pads), "channels_last", name=name)(x)
