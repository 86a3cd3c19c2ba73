"""Functions of TensorFlow without a row of their own, by the graph that TensorFlow traces of them.

`tf.image.resize`, `tf.nn.moments` or `tf.tensordot` are made of simpler operations. There are few
kinds of those, and **the table** has each in functions of `keras.ops`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.graph.values import broadcast_sum


class UnknownOperationError(NotImplementedError):
    """TensorFlow computes a function with an operation that is not in the table."""


def computed(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What `function` of TensorFlow returns for symbolic tensors, computed with `keras.ops`.

    Raises:
        UnknownOperationError: if it takes an operation that the table lacks, or options of one.
    """
    import tensorflow as tf

    # Inside, as what runs users' calls imports the table of functions.
    from kqat.graph.keras_internals import with_constants

    flat = keras.tree.flatten((args, kwargs))
    given = list({id(t): t for t in flat if isinstance(t, keras.KerasTensor)}.values())
    structure: list[Any] = []

    def traced(*tensors: Any) -> Any:
        known = dict(zip(map(id, given), tensors, strict=True))
        own, named = keras.tree.map_structure(lambda x: known.get(id(x), x), (args, kwargs))
        result = function(*own, **named)
        structure.append(keras.tree.map_structure(lambda x: None, result))
        return keras.tree.flatten(result)

    specs = [tf.TensorSpec(t.shape, t.dtype) for t in given]
    fixed = with_constants(traced, *specs)
    values: dict[str, Any] = {t.name: x for t, x in zip(fixed.inputs, given, strict=True)}
    for operation in _needed(fixed.outputs):
        if operation.outputs[0].name not in values:
            results = _results(operation, [values[t.name] for t in operation.inputs])
            values.update((t.name, x) for t, x in zip(operation.outputs, results, strict=False))
    return keras.tree.pack_sequence_as(structure[0], [values[t.name] for t in fixed.outputs])


def _needed(outputs: Sequence[Any]) -> list[Any]:
    """The operations that lead to `outputs`, each behind those that it reads."""
    if not outputs:
        return []
    reached, waiting = set(), [t.op for t in outputs]
    while waiting:
        operation = waiting.pop()
        if operation.name not in reached:
            reached.add(operation.name)
            waiting += [t.op for t in operation.inputs]
    return [op for op in outputs[0].graph.get_operations() if op.name in reached]


def _results(operation: Any, values: list[Any]) -> list[Any]:
    """The outputs of an operation of TensorFlow: arrays where they are constant."""
    import tensorflow as tf

    constants = [tf.get_static_value(t) for t in operation.outputs]
    if operation.outputs and all(c is not None for c in constants):
        return constants
    if not any(isinstance(v, keras.KerasTensor) for v in values):
        if operation.op_def.is_stateful:
            raise UnknownOperationError(
                f"TensorFlow's operation {operation.type}, whose result changes with each call"
            )
        return _evaluated(operation)
    row = _TABLE.get(operation.type)
    if row is None:
        raise UnknownOperationError(
            f"TensorFlow's operation {operation.type}, which kqat knows in no other form"
        )
    result = row(operation.get_attr, *values)
    return list(result) if isinstance(result, list | tuple) else [result]


def _evaluated(operation: Any) -> list[Any]:
    """The outputs of an operation of constants, by TensorFlow."""
    import tensorflow as tf

    with tf.compat.v1.Session(graph=operation.graph) as session:
        return list(session.run(list(operation.outputs)))


Row = Callable[..., Any]


def _of_one(function: Callable[[Any], Any]) -> Row:
    return lambda option, x: function(x)


def _of_two(function: Callable[[Any, Any], Any]) -> Row:
    return lambda option, x, y: function(x, y)


def _sizes(value: Any) -> list[Any]:
    """A shape, axes or other integers, which must be constant."""
    if isinstance(value, keras.KerasTensor):
        raise UnknownOperationError("a shape or axis that is computed from values")
    return np.reshape(np.asarray(value), -1).tolist()


def flipped(x: Any, axes: Sequence[int]) -> Any:
    """`x` reversed along axes, one after the other: Keras before 3.13 takes no list of them."""
    for axis in axes:
        x = ops.flip(x, axis=int(axis))
    return x


def _axes(value: Any) -> Any:
    return tuple(_sizes(value))


def _axis(value: Any) -> int:
    return int(np.asarray(value).reshape(()))


def _reduced(function: Callable[..., Any]) -> Row:
    return lambda option, x, axes: function(x, _axes(axes), keepdims=option("keep_dims"))


def _is(option: Any, name: str, expected: Any) -> None:
    """Refuses an option that functions of `keras.ops` do not have."""
    if (found := option(name)) != expected:
        raise UnknownOperationError(f"{name}={found!r} of an operation of TensorFlow")


def _last(option: Any) -> None:
    if (found := option("data_format")) not in (b"NHWC", b"NDHWC"):
        raise UnknownOperationError(f"data_format={found!r} of an operation of TensorFlow")


def _spatial(option: Any, name: str) -> tuple[int, ...]:
    return tuple(option(name)[1:-1])


def _padding(option: Any) -> str:
    padding = option("padding").decode().lower()
    if padding == "explicit":
        raise UnknownOperationError("padding='EXPLICIT', a list of margins; use tf.pad")
    return str(padding)


def _conv(function: Callable[..., Any]) -> Row:
    def call(option: Any, x: Any, kernel: Any) -> Any:
        _last(option)
        if option("padding") == b"EXPLICIT":
            x = ops.pad(x, np.reshape(option("explicit_paddings"), (-1, 2)).tolist())
            padding = "valid"
        else:
            padding = _padding(option)
        options = {"data_format": "channels_last", "dilation_rate": _spatial(option, "dilations")}
        return function(x, kernel, _spatial(option, "strides"), padding, **options)

    return call


def _conv_transpose(option: Any, sizes: Any, kernel: Any, x: Any) -> Any:
    _last(option)
    strides, expected = _spatial(option, "strides"), tuple(_sizes(sizes))
    made = ops.conv_transpose(x, kernel, strides, _padding(option), data_format="channels_last")
    if tuple(made.shape) != expected:
        raise UnknownOperationError(
            f"a transposed convolution to {expected}; known is what its strides give, "
            f"{tuple(made.shape)}"
        )
    return made


def _pool(function: Callable[..., Any]) -> Row:
    def call(option: Any, x: Any) -> Any:
        _last(option)
        size, strides = _spatial(option, "ksize"), _spatial(option, "strides")
        return function(x, size, strides, _padding(option), data_format="channels_last")

    return call


def _patches(option: Any, x: Any) -> Any:
    sizes, strides = _spatial(option, "ksizes"), _spatial(option, "strides")
    return ops.image.extract_patches(
        x, sizes, None if strides == sizes else strides, padding=_padding(option),
        dilation_rate=_spatial(option, "rates"), data_format="channels_last",
    )  # fmt: skip


def _batch_normalization(
    option: Any, x: Any, scale: Any, offset: Any, mean: Any, variance: Any
) -> Any:
    _last(option)
    _is(option, "is_training", False)
    made = ops.batch_normalization(x, mean, variance, -1, offset, scale, option("epsilon"))
    return [made, *[None] * 5]  # The others are for training.


def _local_response(option: Any, x: Any) -> Any:
    """A channel over a power of the squares around it, whose sums are a matrix product."""
    places = np.arange(x.shape[-1])
    near = np.abs(np.subtract.outer(places, places)) <= option("depth_radius")
    sums = ops.matmul(ops.square(x), near.astype(np.float32))
    return x * ops.power(sums * option("alpha") + option("bias"), -option("beta"))


def _contrast(option: Any, x: Any, factor: Any) -> Any:
    mean = ops.mean(x, axis=(-3, -2), keepdims=True)
    return (x - mean) * factor + mean


def _resize(kind: str) -> Row:
    def call(option: Any, x: Any, size: Any) -> Any:
        _is(option, "half_pixel_centers", True)
        size = tuple(_sizes(size))
        return ops.image.resize(x, size, interpolation=kind, data_format="channels_last")

    return call


def _matmul(first: str, second: str) -> Row:
    def call(option: Any, a: Any, b: Any) -> Any:
        a = ops.swapaxes(a, -1, -2) if option(first) else a
        return ops.matmul(a, ops.swapaxes(b, -1, -2) if option(second) else b)

    return call


def _strided(option: Any, x: Any, begin: Any, end: Any, step: Any) -> Any:
    """`x[…]`, as masks of bits and three lists have it."""
    bounds = zip(_sizes(begin), _sizes(end), _sizes(step), strict=True)

    def is_set(mask: str, i: int) -> bool:
        return bool(option(mask) >> i & 1)

    keys: list[Any] = []
    for i, (first, last, by) in enumerate(bounds):
        if is_set("ellipsis_mask", i):
            keys.append(Ellipsis)
        elif is_set("new_axis_mask", i):
            keys.append(None)
        elif is_set("shrink_axis_mask", i):
            keys.append(first)
        else:
            low = None if is_set("begin_mask", i) else first
            keys.append(slice(low, None if is_set("end_mask", i) else last, by))
    return x[_whole_where_all(keys, x)]


def _whole_where_all(keys: list[Any], x: Any) -> tuple[Any, ...]:
    """`keys` with `:` for what takes a whole axis, as TensorFlow writes it with two numbers."""
    if any(not isinstance(key, int | slice) for key in keys):
        return tuple(keys)
    whole = [
        isinstance(key, slice) and size is not None and range(size)[key] == range(size)
        for key, size in zip(keys, x.shape, strict=False)
    ]
    return tuple(slice(None) if all_of_it else k for k, all_of_it in zip(keys, whole, strict=True))


def _slice(option: Any, x: Any, begin: Any, size: Any) -> Any:
    pairs = zip(_sizes(begin), _sizes(size), strict=True)
    return x[_whole_where_all([slice(b, None if n == -1 else b + n) for b, n in pairs], x)]


def _gather(option: Any, x: Any, indices: Any, axis: Any) -> Any:
    along, batch = _axis(axis), option("batch_dims")
    if not batch:
        return ops.take(x, indices, axis=along)
    _is(option, "batch_dims", along)
    rest = int(np.prod(indices.shape[batch:]))
    flat = (*indices.shape[:batch], rest, *(1,) * (len(x.shape) - along - 1))
    found = ops.take_along_axis(x, ops.reshape(indices, flat), along)
    return ops.reshape(found, (*indices.shape, *x.shape[along + 1 :]))


def _cumsum(option: Any, x: Any, axis: Any) -> Any:
    _is(option, "exclusive", False)
    _is(option, "reverse", False)
    return ops.cumsum(x, _axis(axis))


def _roll(option: Any, x: Any, shift: Any, axis: Any) -> Any:
    return ops.roll(x, tuple(_sizes(shift)), _axes(axis))


def _one_hot(option: Any, x: Any, depth: Any, on: Any, off: Any) -> Any:
    code = ops.one_hot(x, _axis(depth), axis=option("axis"))
    high, low = float(np.asarray(on)), float(np.asarray(off))
    return code if (high, low) == (1.0, 0.0) else code * (high - low) + low


def _pad(mode: str) -> Row:
    def call(option: Any, x: Any, widths: Any, value: Any = 0) -> Any:
        kind = option("mode").decode().lower() if mode == "mirror" else mode
        constant = np.asarray(value).item() if kind == "constant" else None
        return ops.pad(x, np.asarray(widths).tolist(), kind, constant)

    return call


def _split_at(option: Any, x: Any, sizes: Any, axis: Any) -> Any:
    return ops.split(x, np.cumsum(_sizes(sizes))[:-1].tolist(), axis=_axis(axis))


def _shape(option: Any, x: Any) -> Any:
    if any(size is None for size in x.shape):
        raise UnknownOperationError("the shape of a tensor of open sizes")
    return np.asarray(x.shape, np.int32)


def _blocks(name: str) -> Row:
    def call(option: Any, x: Any) -> Any:
        _last(option)
        function = getattr(ops, name, None)
        if function is None:  # Before Keras 3.14.
            raise UnknownOperationError(f"{name}, which this Keras does not have")
        return function(x, option("block_size"), data_format="channels_last")

    return call


def _bias_add(option: Any, x: Any, bias: Any) -> Any:
    _last(option)
    return ops.add(x, bias)


def _cast(option: Any, x: Any) -> Any:
    return ops.cast(x, option("DstT").name)


def _divide_no_nan(option: Any, x: Any, y: Any) -> Any:
    return ops.divide_no_nan(x, y)


_TABLE: dict[str, Row] = {
    **{
        kind: _of_one(function)
        for kind, function in {
            "Identity": lambda x: x, "EnsureShape": lambda x: x, "Snapshot": lambda x: x,
            "CheckNumerics": lambda x: x,
            "PreventGradient": ops.stop_gradient, "StopGradient": ops.stop_gradient,
            "Relu": ops.relu, "Relu6": ops.relu6, "Elu": ops.elu, "Selu": ops.selu,
            "Softplus": ops.softplus, "Softsign": ops.softsign, "Sigmoid": ops.sigmoid,
            "Tanh": ops.tanh, "Exp": ops.exp, "Expm1": ops.expm1, "Log": ops.log,
            "Log1p": ops.log1p, "Sqrt": ops.sqrt, "Rsqrt": ops.rsqrt, "Square": ops.square,
            "Abs": ops.abs, "Neg": ops.negative, "Sign": ops.sign, "Floor": ops.floor,
            "Ceil": ops.ceil, "Round": ops.round, "Rint": ops.round, "Sin": ops.sin,
            "Cos": ops.cos, "Tan": ops.tan, "Asin": ops.arcsin, "Acos": ops.arccos,
            "Atan": ops.arctan, "Sinh": ops.sinh, "Cosh": ops.cosh, "Erf": ops.erf,
            "Reciprocal": ops.reciprocal, "Inv": ops.reciprocal, "LogicalNot": ops.logical_not,
            "Softmax": ops.softmax, "LogSoftmax": ops.log_softmax, "ZerosLike": ops.zeros_like,
            "OnesLike": ops.ones_like,
        }.items()
    },
    **{
        kind: _of_two(function)
        for kind, function in {
            "Add": broadcast_sum, "AddV2": broadcast_sum, "Sub": ops.subtract, "Mul": ops.multiply,
            "RealDiv": ops.divide, "Div": ops.divide, "Maximum": ops.maximum,
            "Minimum": ops.minimum, "Pow": ops.power, "FloorMod": ops.mod,
            "FloorDiv": ops.floor_divide, "Atan2": ops.arctan2, "Greater": ops.greater,
            "GreaterEqual": ops.greater_equal, "Less": ops.less, "LessEqual": ops.less_equal,
            "Equal": ops.equal, "NotEqual": ops.not_equal, "LogicalAnd": ops.logical_and,
            "LogicalOr": ops.logical_or,
            "SquaredDifference": lambda x, y: ops.square(ops.subtract(x, y)),
            "BroadcastTo": lambda x, shape: ops.broadcast_to(x, tuple(_sizes(shape))),
            "Reshape": lambda x, shape: ops.reshape(x, tuple(_sizes(shape))),
            "Tile": lambda x, multiples: ops.tile(x, tuple(_sizes(multiples))),
            "Transpose": lambda x, axes: ops.transpose(x, _axes(axes)),
            "ReverseV2": lambda x, axes: flipped(x, _axes(axes)),
            "ExpandDims": lambda x, axis: ops.expand_dims(x, _axis(axis)),
            "ArgMax": lambda x, axis: ops.argmax(x, _axis(axis)),
            "ArgMin": lambda x, axis: ops.argmin(x, _axis(axis)),
        }.items()
    },
    **{
        kind: _reduced(function)
        for kind, function in {
            "Mean": ops.mean, "Sum": ops.sum, "Max": ops.max, "Min": ops.min, "Prod": ops.prod,
            "All": ops.all, "Any": ops.any,
        }.items()
    },
    "AddN": lambda option, *values: sum(values[1:], values[0]),
    "IdentityN": lambda option, *values: values,
    "LeakyRelu": lambda option, x: ops.leaky_relu(x, option("alpha")),
    "Cast": _cast,
    "BiasAdd": _bias_add,
    "DivNoNan": _divide_no_nan,
    "Select": lambda option, condition, x, y: ops.where(condition, x, y),
    "SelectV2": lambda option, condition, x, y: ops.where(condition, x, y),
    "ClipByValue": lambda option, x, low, high: ops.clip(x, low, high),
    "Shape": _shape,
    "ConcatV2": lambda option, *values: ops.concatenate(values[:-1], axis=_axis(values[-1])),
    "Pack": lambda option, *values: ops.stack(values, axis=option("axis")),
    "Unpack": lambda option, x: ops.unstack(x, option("num"), option("axis")),
    "Split": lambda option, axis, x: ops.split(x, option("num_split"), axis=_axis(axis)),
    "SplitV": _split_at,
    "Squeeze": lambda option, x: ops.squeeze(x, tuple(option("squeeze_dims")) or None),
    "Pad": _pad("constant"),
    "PadV2": _pad("constant"),
    "MirrorPad": _pad("mirror"),
    "Slice": _slice,
    "StridedSlice": _strided,
    "GatherV2": _gather,
    "Roll": _roll,
    "Cumsum": _cumsum,
    "OneHot": _one_hot,
    "TopKV2": lambda option, x, k: tuple(ops.top_k(x, _axis(k))),
    "Einsum": lambda option, *values: ops.einsum(option("equation").decode(), *values),
    "MatMul": _matmul("transpose_a", "transpose_b"),
    "BatchMatMul": _matmul("adj_x", "adj_y"),
    "BatchMatMulV2": _matmul("adj_x", "adj_y"),
    "BatchMatMulV3": _matmul("adj_x", "adj_y"),
    "Conv2D": _conv(ops.conv),
    "Conv3D": _conv(ops.conv),
    "Conv2DBackpropInput": _conv_transpose,
    "DepthwiseConv2dNative": _conv(ops.depthwise_conv),
    "MaxPool": _pool(ops.max_pool),
    "MaxPool3D": _pool(ops.max_pool),
    "AvgPool": _pool(ops.average_pool),
    "AvgPool3D": _pool(ops.average_pool),
    "ExtractImagePatches": _patches,
    "FusedBatchNormV3": _batch_normalization,
    "LRN": _local_response,
    "AdjustContrastv2": _contrast,
    "ResizeBilinear": _resize("bilinear"),
    "ResizeNearestNeighbor": _resize("nearest"),
    "SpaceToDepth": _blocks("space_to_depth"),
    "DepthToSpace": _blocks("depth_to_space"),
}  # fmt: skip
