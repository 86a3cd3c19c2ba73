"""**Table**: operations of TensorFlow's graphs, in functions of `keras.ops`.

A function of TensorFlow that has no row of its own is traced to a graph by TensorFlow. Its
operations are far fewer than TensorFlow's functions: `tf.nn.moments` is four of them,
`tf.image.extract_patches` one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops


def through_graph(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What `function` of TensorFlow computes from symbolic tensors, by the table.

    Raises:
        NotImplementedError: if its graph holds an operation that the table lacks.
    """
    import tensorflow as tf

    flat = keras.tree.flatten((args, kwargs))
    tensors = list({id(x): x for x in flat if isinstance(x, keras.KerasTensor)}.values())
    places = {id(x): i for i, x in enumerate(tensors)}

    def call(*given: Any) -> Any:
        filled = [given[places[id(x)]] if id(x) in places else x for x in flat]
        a, k = keras.tree.pack_sequence_as((args, kwargs), filled)
        return function(*a, **k)

    specs = [tf.TensorSpec(tuple(x.shape), x.dtype) for x in tensors]
    traced = tf.function(call, autograph=False).get_concrete_function(*specs)
    graph = traced.graph
    values: dict[str, Any] = {
        p.name: x for p, x in zip(graph.inputs[: len(tensors)], tensors, strict=True)
    }
    constants = _constants(graph, values)
    for operation in graph.get_operations():
        if not operation.inputs or all(t.name in constants for t in operation.outputs):
            continue
        inputs = [constants.get(t.name, values.get(t.name)) for t in operation.inputs]
        row = _TABLE.get(operation.type)
        if row is None:
            raise NotImplementedError(
                f"{getattr(function, '__name__', function)} of TensorFlow computes the operation "
                f"{operation.type}, for which kqat knows no counterpart in keras.ops."
            )
        made = row(_Call(operation.type, inputs, operation.get_attr))
        made = made if isinstance(made, list | tuple) else [made]
        values.update((t.name, m) for t, m in zip(operation.outputs, made, strict=True))
    return keras.tree.map_structure(
        lambda t: constants[t.name] if t.name in constants else values[t.name],
        traced.structured_outputs,
    )


def _constants(graph: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The values of a graph that need its inputs' shapes at most, by the names of tensors."""
    import tensorflow as tf

    varied, fixed = set(inputs), list[Any]()
    for operation in graph.get_operations():
        reads = operation.type not in ("Shape", "ShapeN", "Size", "Rank")
        if reads and any(t.name in varied for t in operation.inputs):
            varied |= {t.name for t in operation.outputs}
        else:
            fixed += [t for t in operation.outputs if t.name not in varied]
    if any(t.dtype == tf.resource for t in fixed):
        raise NotImplementedError("It reads a variable that is no attribute of the layer.")
    # Names, as tensors of a graph have no hash while TensorFlow runs eagerly.
    feed = {
        t.name: np.zeros(t.shape, t.dtype.as_numpy_dtype) for t in graph.inputs if t.name in inputs
    }
    known = {inside.name: outside.numpy() for outside, inside in graph.captures}
    wanted = [t.name for t in fixed if t.name not in known]
    with tf.compat.v1.Session(graph=graph) as session:
        found = session.run(wanted, {**feed, **known})
    return known | {name: np.asarray(v) for name, v in zip(wanted, found, strict=True)}


@dataclasses.dataclass(frozen=True)
class _Call:
    """An operation of a graph: its type, the values that it reads, and its attributes."""

    kind: str
    inputs: Sequence[Any]
    attribute: Callable[[str], Any]

    def text(self, name: str) -> str:
        value = self.attribute(name)
        return value.decode() if isinstance(value, bytes) else str(value)

    def ints(self, index: int) -> list[int]:
        """An input that holds axes, sizes or indexes, which must not depend on data."""
        value = self.inputs[index]
        if isinstance(value, keras.KerasTensor):
            raise NotImplementedError(f"{self.kind} is known with sizes and axes that are fixed.")
        return [int(v) for v in np.asarray(value).ravel()]

    def channels_last(self) -> None:
        layout = self.text("data_format")
        if layout not in ("NHWC", "NDHWC"):
            raise NotImplementedError(f"{self.kind} is known with channels last, not {layout}.")

    def spatial(self, name: str) -> tuple[int, ...]:
        return tuple(self.attribute(name)[1:-1])


_Row = Callable[[_Call], Any]


def _of(function: Callable[..., Any]) -> _Row:
    return lambda call: function(*call.inputs)


def _reduced(function: Callable[..., Any]) -> _Row:
    return lambda call: function(
        call.inputs[0], axis=tuple(call.ints(1)), keepdims=bool(call.attribute("keep_dims"))
    )


def _turned(x: Any, turns: bool) -> Any:
    return ops.swapaxes(x, -1, -2) if turns else x


def _matmul(call: _Call) -> Any:
    names = ("transpose_a", "transpose_b") if call.kind == "MatMul" else ("adj_x", "adj_y")
    a, b = (_turned(x, call.attribute(n)) for x, n in zip(call.inputs, names, strict=True))
    return ops.matmul(a, b)


def _sliced(call: _Call) -> Any:
    begin, end, step = call.ints(1), call.ints(2), call.ints(3)
    masks = {
        name: int(call.attribute(f"{name}_mask"))
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    key: list[Any] = []
    for i, (b, e, s) in enumerate(zip(begin, end, step, strict=True)):
        bits = {name: bool(mask >> i & 1) for name, mask in masks.items()}
        if bits["ellipsis"]:
            key.append(Ellipsis)
        elif bits["new_axis"]:
            key.append(None)
        elif bits["shrink_axis"]:
            key.append(b)
        else:
            key.append(slice(None if bits["begin"] else b, None if bits["end"] else e, s))
    return _at(call.inputs[0], key)


def _part(call: _Call) -> Any:
    x, begin, sizes = call.inputs[0], call.ints(1), call.ints(2)
    return _at(x, [slice(b, None if s < 0 else b + s) for b, s in zip(begin, sizes, strict=True)])


def _at(x: Any, key: list[Any]) -> Any:
    """`x[key]`, where slices that take an axis whole, as the batch's do, say so."""
    axis, found = 0, []
    for i, k in enumerate(key):
        if k is Ellipsis:
            axis = len(x.shape) - sum(later is not None for later in key[i + 1 :])
        elif k is not None:
            size = x.shape[axis]
            whole = isinstance(k, slice) and range(size)[k] == range(size)
            k, axis = slice(None) if whole else k, axis + 1
        found.append(k)
    return x[tuple(found)]


def _padded(call: _Call) -> Any:
    widths = np.reshape(call.ints(1), (-1, 2)).tolist()
    if call.kind == "MirrorPad":
        return ops.pad(call.inputs[0], widths, call.text("mode").lower())
    value = float(np.asarray(call.inputs[2])) if call.kind == "PadV2" else 0
    return ops.pad(call.inputs[0], widths, "constant", value)


def _split(call: _Call) -> Any:
    if call.kind == "Split":
        return ops.split(call.inputs[1], int(call.attribute("num_split")), axis=call.ints(0)[0])
    ends = np.cumsum(call.ints(1))[:-1].tolist()
    return ops.split(call.inputs[0], ends, axis=call.ints(2)[0])


def _gathered(call: _Call) -> Any:
    x, indices, (axis,) = call.inputs[0], call.inputs[1], call.ints(2)
    batch = int(call.attribute("batch_dims"))
    if not batch:
        return ops.take(x, indices, axis=axis)
    if axis != batch:
        raise NotImplementedError("tf.gather with batch_dims is known for the axis behind them.")
    rest = tuple(indices.shape[batch:])
    flat = ops.reshape(
        indices, (*indices.shape[:batch], int(np.prod(rest)), *(1,) * (len(x.shape) - axis - 1))
    )
    found = ops.take_along_axis(x, flat, axis)
    return ops.reshape(found, (*indices.shape, *x.shape[axis + 1 :]))


def _one_hot(call: _Call) -> Any:
    indices, on, off = call.inputs[0], np.asarray(call.inputs[2]), np.asarray(call.inputs[3])
    made = ops.one_hot(indices, call.ints(1)[0], axis=int(call.attribute("axis")), dtype=on.dtype)
    return made if on == 1 and off == 0 else made * (on - off) + off


def _explicit(call: _Call, x: Any) -> tuple[Any, str]:
    """The input of a convolution, padded where its padding is a list, and the padding left."""
    padding = call.text("padding").lower()
    if padding != "explicit":
        return x, padding
    widths = np.reshape(call.attribute("explicit_paddings"), (-1, 2)).tolist()
    return ops.pad(x, widths), "valid"


def _convolved(function: Callable[..., Any]) -> _Row:
    def row(call: _Call) -> Any:
        call.channels_last()
        x, padding = _explicit(call, call.inputs[0])
        dilation = call.spatial("dilations")
        return function(
            x, call.inputs[1], strides=call.spatial("strides"), padding=padding,
            data_format="channels_last", dilation_rate=dilation,
        )  # fmt: skip

    return row


def _transposed(call: _Call) -> Any:
    call.channels_last()
    x, padding = call.inputs[2], call.text("padding").lower()
    made = ops.conv_transpose(
        x, call.inputs[1], strides=call.spatial("strides"), padding=padding,
        data_format="channels_last",
    )  # fmt: skip
    if tuple(made.shape) != tuple(call.ints(0)):
        raise NotImplementedError(
            f"tf.nn.conv2d_transpose is known with the shape that its strides give, "
            f"{tuple(made.shape)}, not {tuple(call.ints(0))}."
        )
    return made


def _pooled(function: Callable[..., Any]) -> _Row:
    def row(call: _Call) -> Any:
        call.channels_last()
        x, padding = _explicit(call, call.inputs[0]) if "Max" in call.kind else (
            call.inputs[0], call.text("padding").lower()
        )  # fmt: skip
        if "Max" in call.kind and padding != call.text("padding").lower():
            raise NotImplementedError("tf.nn.max_pool is known with padding SAME and VALID.")
        return function(x, call.spatial("ksize"), call.spatial("strides"), padding, "channels_last")

    return row


def _normalized(call: _Call) -> Any:
    call.channels_last()
    if call.attribute("is_training"):
        raise NotImplementedError("tf.nn.batch_normalization is known in inference.")
    x, scale, offset, mean, variance = call.inputs
    made = ops.batch_normalization(
        x, mean, variance, -1, offset, scale, float(call.attribute("epsilon"))
    )
    return [made, *[None] * 5]


def _resized(interpolation: str) -> _Row:
    def row(call: _Call) -> Any:
        if call.attribute("align_corners") or not call.attribute("half_pixel_centers"):
            raise NotImplementedError(
                f"{call.kind} is known as tf.image.resize has it: with the centers of pixels."
            )
        return ops.image.resize(
            call.inputs[0], tuple(call.ints(1)), interpolation, data_format="channels_last"
        )

    return row


def _patches(call: _Call) -> Any:
    sizes, strides = call.spatial("ksizes"), call.spatial("strides")
    return ops.image.extract_patches(
        call.inputs[0], sizes, None if strides == sizes else strides,
        dilation_rate=call.spatial("rates"), padding=call.text("padding").lower(),
        data_format="channels_last",
    )  # fmt: skip


def _local_response(call: _Call) -> Any:
    x, radius = call.inputs[0], int(call.attribute("depth_radius"))
    away = np.abs(np.subtract.outer(np.arange(x.shape[-1]), np.arange(x.shape[-1])))
    sums = ops.matmul(ops.square(x), (away <= radius).astype(np.float32))
    alpha, beta, bias = (float(call.attribute(n)) for n in ("alpha", "beta", "bias"))
    return x * ops.power(sums * alpha + bias, -beta)


def _cumulated(call: _Call) -> Any:
    if call.attribute("exclusive") or call.attribute("reverse"):
        raise NotImplementedError("tf.cumsum is known without exclusive and reverse.")
    return ops.cumsum(call.inputs[0], axis=call.ints(1)[0])


def _cast(call: _Call) -> Any:
    return ops.cast(call.inputs[0], call.attribute("DstT").name)


def _squeezed(call: _Call) -> Any:
    axes = tuple(call.attribute("squeeze_dims"))
    return ops.squeeze(call.inputs[0], axes or None)


def _blocks(name: str) -> dict[str, _Row]:
    """Rows of what `keras.ops` has had since Keras 3.14 only."""
    function = getattr(ops, name, None)
    if function is None:
        return {}

    def row(call: _Call) -> Any:
        call.channels_last()
        return function(call.inputs[0], int(call.attribute("block_size")))

    return {"".join(part.title() for part in name.split("_")): row}


def _no_nan(call: _Call) -> Any:
    x, y = call.inputs
    return ops.where(ops.equal(y, 0), 0.0, x / ops.where(ops.equal(y, 0), 1.0, y))


_TABLE: dict[str, _Row] = {
    **{
        name: _of(getattr(ops, name.lower()))
        for name in (
            "Abs", "Exp", "Log", "Log1p", "Expm1", "Sqrt", "Rsqrt", "Square", "Sin", "Cos",
            "Tan", "Tanh", "Sigmoid", "Softplus", "Softsign", "Relu", "Relu6", "Elu", "Selu",
            "Erf", "Floor", "Ceil", "Round", "Sign", "Reciprocal", "Sinh", "Cosh", "Add",
            "Maximum", "Minimum", "Greater", "Less", "Equal", "Softmax",
        )
    },
    **{
        name: _of(getattr(ops, function))
        for name, function in {
            "Neg": "negative", "Rint": "round", "Inv": "reciprocal", "Atan": "arctan",
            "Asin": "arcsin", "Acos": "arccos", "LogicalNot": "logical_not",
            "StopGradient": "stop_gradient", "AddV2": "add", "Sub": "subtract", "Mul": "multiply",
            "RealDiv": "divide", "Div": "divide", "FloorDiv": "floor_divide", "FloorMod": "mod",
            "Pow": "power", "GreaterEqual": "greater_equal", "LessEqual": "less_equal",
            "NotEqual": "not_equal", "LogicalAnd": "logical_and", "LogicalOr": "logical_or",
            "Atan2": "arctan2", "BiasAdd": "add", "SelectV2": "where", "Select": "where",
            "ClipByValue": "clip", "LogSoftmax": "log_softmax", "ZerosLike": "zeros_like",
            "OnesLike": "ones_like",
        }.items()
    },
    **{
        name: _reduced(getattr(ops, name.lower()))
        for name in ("Sum", "Mean", "Max", "Min", "Prod", "Any", "All")
    },
    **{name: lambda call: call.inputs[0] for name in ("Identity", "Snapshot", "PreventGradient")},
    **_blocks("depth_to_space"),
    **_blocks("space_to_depth"),
    "AddN": lambda call: sum(call.inputs[1:], call.inputs[0]),
    "ArgMax": lambda call: ops.argmax(call.inputs[0], axis=call.ints(1)[0]),
    "ArgMin": lambda call: ops.argmin(call.inputs[0], axis=call.ints(1)[0]),
    "AvgPool": _pooled(ops.average_pool),
    "AvgPool3D": _pooled(ops.average_pool),
    "BatchMatMulV2": _matmul,
    "BatchMatMulV3": _matmul,
    "BroadcastTo": lambda call: ops.broadcast_to(call.inputs[0], call.ints(1)),
    "Cast": _cast,
    "ConcatV2": lambda call: ops.concatenate(
        list(call.inputs[:-1]), axis=call.ints(len(call.inputs) - 1)[0]
    ),
    "Conv2D": _convolved(ops.conv),
    "Conv2DBackpropInput": _transposed,
    "Conv3D": _convolved(ops.conv),
    "Cumsum": _cumulated,
    "DepthwiseConv2dNative": _convolved(ops.depthwise_conv),
    "DivNoNan": _no_nan,
    "Einsum": lambda call: ops.einsum(call.text("equation"), *call.inputs),
    "ExpandDims": lambda call: ops.expand_dims(call.inputs[0], call.ints(1)[0]),
    "ExtractImagePatches": _patches,
    "FusedBatchNormV3": _normalized,
    "GatherV2": _gathered,
    "LRN": _local_response,
    "LeakyRelu": lambda call: ops.leaky_relu(call.inputs[0], float(call.attribute("alpha"))),
    "MatMul": _matmul,
    "MaxPool": _pooled(ops.max_pool),
    "MaxPool3D": _pooled(ops.max_pool),
    "MirrorPad": _padded,
    "OneHot": _one_hot,
    "Pack": lambda call: ops.stack(list(call.inputs), axis=int(call.attribute("axis"))),
    "Pad": _padded,
    "PadV2": _padded,
    "Reshape": lambda call: ops.reshape(call.inputs[0], call.ints(1)),
    "ResizeBilinear": _resized("bilinear"),
    "ResizeNearestNeighbor": _resized("nearest"),
    "ReverseV2": lambda call: ops.flip(call.inputs[0], tuple(call.ints(1))),
    "Roll": lambda call: ops.roll(call.inputs[0], call.ints(1), call.ints(2)),
    "Slice": _part,
    "Split": _split,
    "SplitV": _split,
    "SquaredDifference": lambda call: ops.square(call.inputs[0] - call.inputs[1]),
    "Squeeze": _squeezed,
    "StridedSlice": _sliced,
    "Tile": lambda call: ops.tile(call.inputs[0], call.ints(1)),
    "TopKV2": lambda call: list(ops.top_k(call.inputs[0], call.ints(1)[0])),
    "Transpose": lambda call: ops.transpose(call.inputs[0], call.ints(1)),
    "Unpack": lambda call: ops.unstack(
        call.inputs[0], int(call.attribute("num")), int(call.attribute("axis"))
    ),
}  # fmt: skip
