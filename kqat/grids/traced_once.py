"""`traced_once`: arithmetic that TensorFlow traces once, for whichever layers compute it."""

import functools
from collections.abc import Callable
from typing import Any

import keras


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors; in TensorFlow's graphs a call of it is one operator.

    Tracing an operator takes a tenth of a millisecond and more, and `fit` would trace those that
    move a range anew for every quantizer: they were half of what it traces. Before the graph runs,
    TensorFlow puts the operators themselves in the place of the call.

    What it is given should have no gradient: TensorFlow would trace one for each call.
    """

    @functools.wraps(function)
    def call(*tensors: Any) -> Any:
        if keras.backend.backend() != "tensorflow":
            return function(*tensors)
        import tensorflow as tf

        if tf.executing_eagerly():
            return function(*tensors)
        # A variable itself would be read inside, by a function of its own.
        tensors = tuple(tf.convert_to_tensor(tensor) for tensor in tensors)
        signature = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        return _traced(function, signature, keras.config.floatx())(*tensors)

    return call


@functools.cache
def _traced(function: Callable[..., Any], signature: Any, floatx: str) -> Callable[..., Any]:
    """The function of TensorFlow for tensors of these shapes and dtypes.

    `floatx` is the type of what `keras.ops` makes of numbers alone.
    """
    import tensorflow as tf

    traced: Callable[..., Any] = tf.function(function, autograph=False)
    return traced
