"""**Table**: functions of TensorFlow that a traced `call` may use, in functions of `keras.ops`.

Keras refuses its symbolic tensors to TensorFlow. While a call is traced, the functions listed here
take them, and others by what TensorFlow makes them of (`tensorflow_graphs`).
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.graph.tensorflow_graphs import UnknownOperationError, computed, flipped
from kqat.graph.values import broadcast_sum

_tracing = 0
# Whether functions of TensorFlow are asked about that others call.
_one_by_one = 0


@contextlib.contextmanager
def tensorflow_traced() -> Iterator[None]:
    """Lets the functions of the table take symbolic tensors meanwhile, on TensorFlow's backend."""
    global _tracing
    if keras.backend.backend() == "tensorflow":
        _register()
    _tracing += 1
    try:
        yield
    finally:
        _tracing -= 1


@functools.cache
def _register() -> None:
    """Has TensorFlow ask the table about calls that it cannot do; it never unlearns that."""
    import tensorflow as tf

    known = {id(_named(tf, name)): row for name, row in _TABLE.items()}
    # Wrapped functions, and what some call in turn, ask by their own names.
    by_name = {_named(tf, name).__name__: row for name, row in _TABLE.items()}
    by_name |= {name: row for name, row in _TABLE.items() if "." not in name}
    del by_name["gather"]  # It has fewer arguments than the function that calls it.
    base: Any = tf.__internal__.dispatch.GlobalOpDispatcher

    class Dispatcher(base):
        def handle(self, op: Any, args: Any, kwargs: Any) -> Any:
            flat = keras.tree.flatten((args, kwargs))
            if not _tracing or not any(isinstance(x, keras.KerasTensor) for x in flat):
                return self.NOT_SUPPORTED
            if not _one_by_one and _is_inside_another():
                return self.NOT_SUPPORTED  # The function around it is asked next.
            row = known.get(id(op)) or by_name.get(getattr(op, "__name__", ""))
            given = inspect.signature(op).bind(*args, **kwargs).arguments
            given.pop("name", None)
            if row is not None and _fits(row, given):
                return row(**given)
            return self.NOT_SUPPORTED if _one_by_one else _without_row(op, args, kwargs)

    Dispatcher().register()


def _without_row(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """By what TensorFlow makes a function of; else by rows of the functions that it calls.

    Raises:
        UnknownOperationError: if neither computes it.
    """
    global _one_by_one
    try:
        return computed(function, args, kwargs)
    except Exception as error:  # Functions inside may be the user's own, as those of tf.map_fn.
        _one_by_one += 1
        try:
            return function(*args, **kwargs)
        except Exception:
            if not isinstance(error, UnknownOperationError):
                raise
            raise UnknownOperationError(
                f"tf's {getattr(function, '__name__', function)} takes {error}."
            ) from error
        finally:
            _one_by_one -= 1


def _is_inside_another() -> bool:
    """Whether a function of TensorFlow that asks the table is called by another that will ask."""
    asking, frame = 0, inspect.currentframe()
    while frame is not None:
        asking += frame.f_code.co_name == "op_dispatch_handler"
        frame = frame.f_back
    return asking > 1


def _fits(row: Callable[..., Any], given: dict[str, Any]) -> bool:
    try:
        inspect.signature(row).bind(**given)
    except TypeError:
        return False
    return True


def _named(module: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), module)


def _gather(
    params: Any, indices: Any, validate_indices: Any = None, axis: Any = None, batch_dims: int = 0
) -> Any:
    axis = batch_dims if axis is None else int(axis)
    if not batch_dims:
        return ops.take(params, indices, axis=axis)
    if axis != batch_dims or len(indices.shape) != batch_dims + 1:
        raise NotImplementedError(
            "tf.gather with batch_dims is known for one index of the axis behind them only."
        )
    more = len(params.shape) - axis - 1
    return ops.take_along_axis(params, ops.reshape(indices, (*indices.shape, *(1,) * more)), axis)


def _matmul(
    a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False, **options: Any
) -> Any:
    if any(options.values()):
        raise NotImplementedError(f"tf.matmul is known without {sorted(options)}.")
    a = ops.swapaxes(a, -1, -2) if transpose_a else a
    return ops.matmul(a, ops.swapaxes(b, -1, -2) if transpose_b else b)


def _shape(x: Any) -> Any:
    """The sizes of a tensor, with which a call may compute as with TensorFlow's."""
    sizes = ops.shape(x)
    return sizes if None in sizes else np.asarray(sizes, np.int32)


def _sizes(shape: Any) -> Any:
    """A shape, or axes, of plain numbers, however TensorFlow's functions made it."""
    if isinstance(shape, list | tuple):
        return tuple(size if size is None else int(size) for size in shape)
    return tuple(np.reshape(np.asarray(shape), -1).tolist())


def _split(value: Any, num_or_size_splits: Any, axis: int = 0, num: Any = None) -> Any:
    sizes = np.asarray(num_or_size_splits)
    parts = int(sizes) if sizes.ndim == 0 else np.cumsum(sizes)[:-1].tolist()
    return ops.split(value, parts, axis=axis)


def _pad(tensor: Any, paddings: Any, mode: str = "CONSTANT", constant_values: Any = 0) -> Any:
    constant = mode.upper() == "CONSTANT"
    widths = np.asarray(paddings).tolist()
    return ops.pad(tensor, widths, mode.lower(), constant_values if constant else None)


def _blocks(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(input: Any, block_size: int, data_format: str = "NHWC") -> Any:
        if data_format != "NHWC":
            raise NotImplementedError(f"data_format='NHWC' is known, not {data_format!r}.")
        return function(input, block_size, data_format="channels_last")

    return call


def _reduced(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(input_tensor: Any, axis: Any = None, keepdims: Any = False) -> Any:
        axes = None if axis is None else np.asarray(axis).tolist()
        return function(
            input_tensor, tuple(axes) if isinstance(axes, list) else axes, keepdims=bool(keepdims)
        )

    return call


def _of_one(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """A row of a function of one tensor, whatever TensorFlow calls it."""

    def call(**given: Any) -> Any:
        (value,) = given.values()
        return function(value)

    return call


def _of_two(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda x, y: function(x, y)


_TABLE: dict[str, Callable[..., Any]] = {
    "gather": _gather,
    "reshape": lambda tensor, shape: ops.reshape(tensor, _sizes(shape)),
    "transpose": lambda a, perm=None, conjugate=False: ops.transpose(
        a, None if perm is None else _sizes(perm)
    ),
    "concat": lambda values, axis: ops.concatenate(values, axis=axis),
    "stack": lambda values, axis=0: ops.stack(values, axis=axis),
    "unstack": lambda value, num=None, axis=0: ops.unstack(value, num, axis),
    "split": _split,
    "expand_dims": lambda input, axis: ops.expand_dims(input, axis),
    "squeeze": lambda input, axis=None: ops.squeeze(input, axis),
    "tile": lambda input, multiples: ops.tile(input, _sizes(multiples)),
    "roll": lambda input, shift, axis: ops.roll(input, shift, axis),
    "reverse": lambda tensor, axis: flipped(tensor, _sizes(axis)),
    "convert_to_tensor": lambda value, dtype=None, dtype_hint=None: (
        value if dtype is None else ops.cast(value, keras.backend.standardize_dtype(dtype))
    ),
    "cast": lambda x, dtype: ops.cast(x, keras.backend.standardize_dtype(dtype)),
    "shape": lambda input, out_type=None: _shape(input),
    "rank": lambda input: len(input.shape),
    "size": lambda input, out_type=None: ops.size(input),
    "pad": _pad,
    "matmul": _matmul,
    "tensordot": lambda a, b, axes: ops.tensordot(
        a, b, axes if isinstance(axes, int) else np.asarray(axes).tolist()
    ),
    "einsum": lambda equation, inputs: ops.einsum(equation, *inputs),
    "where": lambda condition, x=None, y=None: ops.where(condition, x, y),
    "clip_by_value": lambda t, clip_value_min, clip_value_max: ops.clip(
        t, clip_value_min, clip_value_max
    ),
    "zeros_like": lambda input, dtype=None, layout=None: ops.zeros_like(input, dtype),
    "ones_like": lambda input, dtype=None, layout=None: ops.ones_like(input, dtype),
    "identity": lambda input: input,
    "nn.silu": lambda features, beta=1.0: features * ops.sigmoid(features * beta),
    "nn.softmax": lambda logits, axis=-1: ops.softmax(logits, -1 if axis is None else axis),
    "nn.gelu": lambda features, approximate=False: ops.gelu(features, approximate),
    "nn.leaky_relu": lambda features, alpha=0.2: ops.leaky_relu(features, alpha),
    # `keras.ops` has had them since Keras 3.14 only.
    **{
        f"nn.{name}": _blocks(getattr(ops, name))
        for name in ("depth_to_space", "space_to_depth")
        if hasattr(ops, name)
    },
    **{
        f"reduce_{name}": _reduced(getattr(ops, name))
        for name in ("mean", "sum", "max", "min", "prod")
    },
    "reduce_logsumexp": _reduced(ops.logsumexp),
    **{
        name: _of_two(getattr(ops, name))
        for name in ("subtract", "multiply", "divide", "maximum", "minimum")
    },
    "add": _of_two(broadcast_sum),
    **{
        name: _of_one(function)
        for name, function in {
            "nn.relu": ops.relu, "nn.relu6": ops.relu6, "nn.elu": ops.elu,
            "sigmoid": ops.sigmoid, "tanh": ops.tanh, "exp": ops.exp, "math.log": ops.log,
            "sqrt": ops.sqrt, "math.rsqrt": ops.rsqrt, "square": ops.square, "abs": ops.abs,
            "sin": ops.sin, "cos": ops.cos, "math.softplus": ops.softplus,
            "math.erf": ops.erf, "negative": ops.negative, "stop_gradient": ops.stop_gradient,
        }.items()
    },
}  # fmt: skip
