"""One set of array functions over NumPy and over Keras, so that a kernel is written once.

A kernel takes the set as its first argument, `xp`. `NUMPY` computes at once, in exact float64 sums
where sums are large; `KERAS` is `keras.ops`, and becomes part of a graph.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kqat.base import ExportError


class Arrays:
    """Functions of one module: those that NumPy and `keras.ops` name alike, and these."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def cast(self, x: Any, dtype: str) -> Any:
        """`x` as `dtype`."""
        raise NotImplementedError

    def order(self, x: Any) -> Any:
        """The indexes that sort `x` along its last axis; of equal numbers the first comes first."""
        return self._module.argsort(x, axis=-1)

    def conv(
        self, x: Any, kernel: Any, strides: Sequence[int], dilations: Sequence[int], depthwise: bool
    ) -> Any | None:
        """The sum of products without padding, of floats; `None`: there is no fast way to it.

        Shapes: `x` `(samples, rows, columns, channels)`, `kernel` as of a Keras Conv2D, or of a
        DepthwiseConv2D.
        """
        return None


class _Numpy(Arrays):
    def cast(self, x: Any, dtype: str) -> Any:
        return np.asarray(x).astype(dtype)

    def order(self, x: Any) -> Any:
        return np.argsort(x, axis=-1, kind="stable")


class _Keras(Arrays):
    def cast(self, x: Any, dtype: str) -> Any:
        if dtype in ("int64", "float64"):
            _check_wide()
        return keras.ops.cast(x, dtype)

    def conv(
        self, x: Any, kernel: Any, strides: Sequence[int], dilations: Sequence[int], depthwise: bool
    ) -> Any | None:
        strided, dilated = max(strides) > 1, max(dilations) > 1
        # TensorFlow has no kernel for both at once, nor for unequal strides of a depthwise one.
        if (strided and dilated) or (depthwise and strides[0] != strides[1]):
            return None
        call = keras.ops.depthwise_conv if depthwise else keras.ops.conv
        return call(
            x,
            kernel,
            strides=tuple(strides) if strided else 1,
            padding="valid",
            data_format="channels_last",
            dilation_rate=tuple(dilations) if dilated else 1,
        )


NUMPY: Arrays = _Numpy(np)
KERAS: Arrays = _Keras(keras.ops)


def _check_wide() -> None:
    """Raises where the backend would narrow 64 bits without a word."""
    if keras.backend.backend() != "jax":
        return
    import jax

    if not jax.config.jax_enable_x64:
        raise ExportError(
            "Expected 64-bit integers, which this kernel's products need. Received: JAX, which "
            "narrows them to 32 bits. Call jax.config.update('jax_enable_x64', True) first."
        )
