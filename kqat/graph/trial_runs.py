"""`run_here`: a user's function on this machine, whichever kernels TensorFlow has for it."""

from collections.abc import Callable
from typing import Any

import keras


def run_here(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function` of tensors; compiled by XLA where TensorFlow has no kernel for this processor.

    It has none for convolutions with the channels first where it computes without oneDNN, as on
    processors without AVX-512. So what is planned there would depend on the processor.

    Raises:
        Exception: what the function raised, where XLA does not help.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:
        if keras.backend.backend() != "tensorflow":
            raise
        import tensorflow as tf

        # The kernel of a transposed convolution calls it an invalid argument.
        if not isinstance(error, tf.errors.UnimplementedError | tf.errors.InvalidArgumentError):
            raise
        try:
            return tf.function(function, autograph=False, jit_compile=True)(*args, **kwargs)
        except Exception:
            raise error from None
