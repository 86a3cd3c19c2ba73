"""What each operator computes: steps of a file with the arithmetic of `kqat.kernels`.

Every value has one axis more than in the file, the first, which counts samples: whatever an
operator does to the file's own batch, samples stay apart.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.base import ExportError
from kqat.kernels import (
    GATES,
    Arrays,
    Numbers,
    normalizers,
    pointwise,
    reductions,
    resizing,
    run_lstm,
    sums,
    tables,
)
from tflite_export.integer_model.program import Step, Tensor

Values = list[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """The arithmetic of one step.

    Attributes:
        compute: takes array functions, the step's inputs in order (`None` for those that are left
            out, and for constants that `constants` does not hold under `input_<position>`) and the
            constants; returns the step's outputs.
        constants: arrays that it computes with.
    """

    compute: Callable[[Arrays, Values, Mapping[str, Any]], Values]
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


Maker = Callable[[Step, str], Kernel]
_MAKERS: dict[str, Maker] = {}
# They read or write floats, or hand them on as they are.
_TAKE_FLOATS = ("QUANTIZE", "DEQUANTIZE", "CAST", "RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS")


def makes(*names: str) -> Callable[[Maker], Maker]:
    """Registers a maker of kernels for operators."""

    def register(maker: Maker) -> Maker:
        _MAKERS.update(dict.fromkeys(names, maker))
        return maker

    return register


def supported() -> tuple[str, ...]:
    """The operators that can be computed, sorted."""
    return tuple(sorted(_MAKERS))


def kernel_of(step: Step, runtime: str) -> Kernel:
    """The arithmetic of a step on a runtime.

    Raises:
        ExportError: if it is not known.
    """
    if step.name not in _MAKERS:
        raise ExportError(
            f"Expected operators whose integer arithmetic is known: {', '.join(supported())}. "
            f"Received: {step.name}, which computes {step.result.name!r}."
        )
    floats = [t for t in (*step.inputs, step.result) if t is not None and t.dtype == "float32"]
    if floats and step.name not in _TAKE_FLOATS:
        raise ExportError(
            f"Expected integer operators. Received: {step.name} of floats, which computes "
            f"{step.result.name!r}: floats are added up in an order that each runtime chooses. "
            "Quantize that layer."
        )
    return _MAKERS[step.name](step, runtime)


def constants_as_values(step: Step, *positions: int) -> dict[str, np.ndarray]:
    """The constants among those inputs, with one axis more, as `Kernel.constants` has them."""
    found = {}
    for position in positions:
        tensor = step.inputs[position] if position < len(step.inputs) else None
        if tensor is not None and tensor.data is not None:
            data = tensor.data
            wide = data.astype(np.int32) if data.dtype.kind in "iu" else data
            found[f"input_{position}"] = wide[np.newaxis]
    return found


def aligned(xp: Arrays, values: Sequence[Any]) -> Values:
    """Values of different ranks with axes of one behind the samples, so that they broadcast."""
    rank = max(len(x.shape) for x in values)
    return [
        x
        if len(x.shape) == rank
        else xp.reshape(x, (-1, *[1] * (rank - len(x.shape)), *x.shape[1:]))
        for x in values
    ]


def broadcast_together(xp: Arrays, values: Sequence[Any]) -> Values:
    """Values of one number of samples: a constant is repeated for each."""
    most = next((x for x in values if x.shape[0] != 1 or x.shape[0] is None), values[0])
    zeros = xp.cast(
        xp.zeros_like(most[(slice(None), *[slice(0, 1)] * (len(most.shape) - 1))]), "int32"
    )
    return [
        x + xp.cast(xp.reshape(zeros, (-1, *[1] * (len(x.shape) - 1))), "int32") for x in values
    ]


# Who computes.


def kind_of(step: Step, runtime: str) -> str:
    """`"xnnpack"`, `"optimized"`, `"reference"` or `"micro"`: whose kernel runs the step."""
    if runtime == "tflite_micro":
        return "micro"
    if runtime == "litert_reference":
        return "reference"
    return "xnnpack" if runtime == "litert" and _is_delegated(step) else "optimized"


def _is_delegated(step: Step) -> bool:
    """Whether XNNPACK takes the step; LiteRT's optimized kernels do, otherwise.

    Conditions of LiteRT's `xnnpack_delegate.cc`.
    """
    if any(t.dtype == "int16" for t in (*(i for i in step.inputs if i), *step.outputs)):
        return False
    if any(len(t.shape) > 6 for t in (*(i for i in step.inputs if i), *step.outputs)):
        return False
    name = step.name
    if name in ("ADD", "SUB"):
        return _int8(step) and all(
            1 / 1024 <= _ratio(step.given(i), step.result) < 256 for i in (0, 1)
        )
    if name == "MUL":
        if not _int8(step):
            return False
        ratio = step.given(0).on_grid.scale * step.given(1).on_grid.scale
        return bool(2.0**-16 <= ratio / step.result.on_grid.scale < 256)
    if name == "LEAKY_RELU":
        ratio = _ratio(step.given(0), step.result)
        tilt = ratio * np.float32(step.options.alpha)
        return bool(
            2.0**-8 <= ratio <= 128 and -127.99609375 <= tilt <= 128 and abs(tilt) >= 2.0**-8
        )
    if name == "QUANTIZE":
        given, result = step.given(0), step.result
        if given.dtype.startswith("float"):
            return True
        return given.dtype == result.dtype and bool(2.0**-8 <= _ratio(given, result) <= 128)
    if name in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"):
        weights = step.given(1)
        return weights.dtype == "int8" and weights.data is not None
    if name == "BATCH_MATMUL":
        return _int8(step) and step.given(1).on_grid.zero_point == 0
    if name == "FULLY_CONNECTED":
        weights = step.given(1)
        per_axis = len(weights.on_grid.scales) > 1
        return weights.data is not None and (weights.dtype != "int2" or per_axis)
    return name in ("MEAN", "LOGISTIC", "TANH", "ELU", "DEQUANTIZE", "RESIZE_BILINEAR")


def _int8(step: Step) -> bool:
    return all(t is None or t.dtype == "int8" for t in (*step.inputs, *step.outputs))


def _ratio(given: Tensor, result: Tensor) -> np.float32:
    return given.on_grid.scale / result.on_grid.scale


# Sums of products.


def _images(xp: Arrays, x: Any, shape: Sequence[int]) -> Any:
    """Samples and the file's batch as one axis."""
    return xp.reshape(x, (-1, *shape[1:]))


def _window(step: Step, kernel: tuple[int, int], options: Any) -> sums.Window:
    strides = options.strideH, options.strideW
    dilations = (
        getattr(options, "dilationHFactor", 1) or 1,
        getattr(options, "dilationWFactor", 1) or 1,
    )
    rows, columns = step.given(0).shape[1:3]
    padding = ((0, 0), (0, 0))
    if options.padding == schema.Padding.SAME:
        padding = sums.same_padding((rows, columns), kernel, strides, dilations)
    for size, side, apart, added in zip(kernel, (rows, columns), dilations, padding, strict=True):
        # Each place of a window is an operation: a damaged size would take hours.
        if (size - 1) * apart >= side + sum(added):
            raise ValueError(f"a window of {size} places over {side}")
    return sums.Window(strides=strides, dilations=dilations, padding=padding)


def _requantize(step: Step, runtime: str, weights: Tensor, given: Tensor) -> sums.Requantize:
    return sums.Requantize(
        given=given.on_grid,
        weights=weights.on_grid,
        result=step.result.on_grid,
        rounding=_rounding(step, runtime, weights, given),
        activation=step.activation,
    )


def _rounding(step: Step, runtime: str, weights: Tensor, given: Tensor) -> sums.Rounding:
    """How the kernel of a sum of products rounds."""
    rounding, kind = sums.Rounding, kind_of(step, runtime)
    if kind == "xnnpack":
        return rounding.ONCE
    dense = step.name == "FULLY_CONNECTED"
    if dense and kind == "reference":
        return rounding.DOUBLE
    if given.dtype == "int16":
        if dense and kind == "optimized":
            # Without a bias, LiteRT's optimized kernel adds up in int32; else it is the reference.
            return rounding.TWICE_UP if step.inputs[2:3] in ((), (None,)) else rounding.DOUBLE
        return rounding.WIDE
    if kind == "optimized" and step.name == "DEPTHWISE_CONV_2D":
        return rounding.TWICE_BY_EIGHT
    # Of convolutions in groups LiteRT's optimized kernel lets the reference compute.
    whole = step.name == "CONV_2D" and weights.shape[-1] == given.shape[-1]
    if kind == "optimized" and (dense or whole):
        return rounding.TWICE_UP
    return rounding.TWICE


@makes("CONV_2D", "DEPTHWISE_CONV_2D")
def convolution(step: Step, runtime: str) -> Kernel:
    """CONV_2D, grouped too, and DEPTHWISE_CONV_2D."""
    given, weights, result = step.given(0), step.given(1), step.result
    data = _constant(weights)
    depthwise = step.name == "DEPTHWISE_CONV_2D"
    channels = given.shape[-1]
    if depthwise:
        kernel = data[0].reshape(*data.shape[1:3], channels, -1)
        groups = 1
    else:
        kernel = data.transpose(1, 2, 3, 0)
        groups = channels // data.shape[-1]
    grid = given.on_grid
    axes = (0, 1) if depthwise else (0, 1, 2)
    dtype = sums.exact_dtype(kernel, axes, sums.largest_magnitude(grid))
    window = _window(step, kernel.shape[:2], step.options)
    finish = _requantize(step, runtime, weights, given)
    constants = {"kernel": kernel.astype(dtype), **_bias(step, 2)}

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        images = _images(xp, xp.cast(x[0], "int32") - grid.zero_point, given.shape)
        if groups == 1:
            total = sums.convolve(xp, images, c["kernel"], window, dtype=dtype, depthwise=depthwise)
        else:
            size = channels // groups
            outputs = kernel.shape[-1] // groups
            total = xp.concatenate(
                [
                    sums.convolve(
                        xp,
                        images[..., g * size : (g + 1) * size],
                        c["kernel"][..., g * outputs : (g + 1) * outputs],
                        window,
                        dtype=dtype,
                        depthwise=False,
                    )
                    for g in range(groups)
                ],
                axis=-1,
            )
        return [xp.reshape(finish(xp, total, c.get("bias")), (-1, *result.shape))]

    return Kernel(compute, constants)


def _constant(tensor: Tensor) -> np.ndarray:
    if tensor.data is None:
        raise ExportError(
            f"Expected {tensor.name!r} to be a constant. Received: a value that is computed."
        )
    return tensor.data


def _bias(step: Step, position: int) -> dict[str, np.ndarray]:
    tensor = step.inputs[position] if position < len(step.inputs) else None
    return {} if tensor is None else {"bias": _constant(tensor)}


@makes("FULLY_CONNECTED")
def fully_connected(step: Step, runtime: str) -> Kernel:
    """FULLY_CONNECTED with constant weights."""
    given, weights, result = step.given(0), step.given(1), step.result
    data = _constant(weights)
    grid = given.on_grid
    dtype = sums.exact_dtype(data, (1,), sums.largest_magnitude(grid))
    finish = _requantize(step, runtime, weights, given)

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        rows = xp.reshape(xp.cast(x[0], "int32") - grid.zero_point, (-1, data.shape[1]))
        total = xp.matmul(xp.cast(rows, dtype), c["kernel"])
        return [xp.reshape(finish(xp, total, c.get("bias")), (-1, *result.shape))]

    return Kernel(compute, {"kernel": data.T.astype(dtype), **_bias(step, 2)})


@makes("TRANSPOSE_CONV")
def transpose_conv(step: Step, runtime: str) -> Kernel:
    """TRANSPOSE_CONV: a convolution over an image with zeros between."""
    given, weights, result = step.given(2), step.given(1), step.result
    data = _constant(weights)
    kernel = data.transpose(1, 2, 3, 0)[::-1, ::-1]
    grid, options = given.on_grid, step.options
    strides = options.strideH, options.strideW
    dtype = sums.exact_dtype(kernel, (0, 1, 2), sums.largest_magnitude(grid))
    padding = []
    for axis in (0, 1):
        taps, length, size = kernel.shape[axis], result.shape[axis + 1], given.shape[axis + 1]
        full = (size - 1) * strides[axis] + 1
        before = taps - 1
        if options.padding == schema.Padding.SAME:
            before -= max((size - 1) * strides[axis] + taps - length, 0) // 2
        padding.append((before, length + taps - 1 - before - full))
    window = sums.Window(
        strides=(1, 1),
        dilations=(1, 1),
        padding=tuple((b, max(a, 0)) for b, a in padding),  # type: ignore[arg-type]
    )
    finish = _requantize(step, runtime, weights, given)

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        images = _images(xp, xp.cast(x[2], "int32") - grid.zero_point, given.shape)
        images = sums.spread(xp, images, strides)
        total = sums.convolve(xp, images, c["kernel"], window, dtype=dtype, depthwise=False)
        total = total[:, : result.shape[1], : result.shape[2], :]
        return [xp.reshape(finish(xp, total, c.get("bias")), (-1, *result.shape))]

    return Kernel(compute, {"kernel": np.ascontiguousarray(kernel).astype(dtype), **_bias(step, 3)})


@makes("BATCH_MATMUL")
def batch_matmul(step: Step, runtime: str) -> Kernel:
    """BATCH_MATMUL of two values."""
    a, b, result = step.given(0), step.given(1), step.result
    grids = a.on_grid, b.on_grid
    length = a.shape[-2 if step.options.adjX else -1]
    largest = math.prod(map(sums.largest_magnitude, grids)) * length
    dtype = "float32" if largest < 2**24 else "float64"
    finish = sums.Requantize(
        given=grids[0],
        weights=grids[1],
        result=result.on_grid,
        rounding=_rounding(step, runtime, b, a),
        in_double=kind_of(step, runtime) == "micro",
    )

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        parts = []
        for value, grid, turned in zip(
            aligned(xp, x[:2]), grids, (step.options.adjX, step.options.adjY), strict=True
        ):
            part = xp.cast(xp.cast(value, "int32") - grid.zero_point, dtype)
            parts.append(xp.swapaxes(part, -1, -2) if turned else part)
        return [finish(xp, xp.matmul(*parts), None)]

    return Kernel(compute, constants_as_values(step, 0, 1))


# Element by element.


@makes("ADD", "SUB")
def add(step: Step, runtime: str) -> Kernel:
    """ADD and SUB, of indexes too."""
    sign = 1 if step.name == "ADD" else -1
    constants = constants_as_values(step, 0, 1)
    if step.result.grid is None or step.result.dtype == "int32":

        def plain(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
            a, b = aligned(xp, x[:2])
            return [a + b if sign > 0 else a - b]

        return Kernel(plain, constants)
    grids = step.given(0).on_grid, step.given(1).on_grid
    kernel = pointwise.add_by_xnnpack if kind_of(step, runtime) == "xnnpack" else pointwise.add

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        a, b = aligned(xp, x[:2])
        return [kernel(xp, a, b, grids, step.result.on_grid, sign, step.activation)]

    return Kernel(compute, constants)


@makes("MUL")
def multiply(step: Step, runtime: str) -> Kernel:
    """MUL, of indexes too."""
    constants = constants_as_values(step, 0, 1)
    if step.result.grid is None or step.result.dtype == "int32":
        return Kernel(lambda xp, x, c: [math.prod(aligned(xp, x[:2]))], constants)
    grids = step.given(0).on_grid, step.given(1).on_grid
    kind, grid = kind_of(step, runtime), step.result.on_grid
    how = {"once": kind == "xnnpack", "in_double": kind == "micro"}

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        a, b = aligned(xp, x[:2])
        return [pointwise.multiply(xp, a, b, grids, grid, activation=step.activation, **how)]

    return Kernel(compute, constants)


@makes("DIV")
def divide(step: Step, runtime: str) -> Kernel:
    """DIV of indexes, towards zero."""
    if step.result.dtype != "int32":
        raise ExportError(f"Expected DIV of int32. Received: {step.result.dtype}.")

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        a, b = aligned(xp, x[:2])
        return [xp.sign(a) * xp.sign(b) * xp.floor_divide(xp.abs(a), xp.abs(b))]

    return Kernel(compute, constants_as_values(step, 0, 1))


@makes("PRELU")
def prelu(step: Step, runtime: str) -> Kernel:
    """PRELU with constant slopes."""
    grids = step.given(0).on_grid, step.given(1).on_grid
    in_double = kind_of(step, runtime) == "micro"

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        a, b = aligned(xp, x[:2])
        return [pointwise.prelu(xp, a, b, grids, step.result.on_grid, in_double)]

    return Kernel(compute, constants_as_values(step, 1))


@makes("SQUARED_DIFFERENCE")
def squared_difference(step: Step, runtime: str) -> Kernel:
    """SQUARED_DIFFERENCE."""
    grids = step.given(0).on_grid, step.given(1).on_grid

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        a, b = aligned(xp, x[:2])
        return [pointwise.squared_difference(xp, a, b, grids, step.result.on_grid)]

    return Kernel(compute, constants_as_values(step, 0, 1))


@makes("MAXIMUM", "MINIMUM")
def extreme(step: Step, runtime: str) -> Kernel:
    """MAXIMUM and MINIMUM, whose grids are one."""
    name = step.name.lower()
    return Kernel(
        lambda xp, x, c: [getattr(xp, name)(*aligned(xp, x[:2]))], constants_as_values(step, 0, 1)
    )


_COMPARISONS = {
    "EQUAL": "equal",
    "NOT_EQUAL": "not_equal",
    "GREATER": "greater",
    "GREATER_EQUAL": "greater_equal",
    "LESS": "less",
    "LESS_EQUAL": "less_equal",
}


@makes(*_COMPARISONS)
def compare(step: Step, runtime: str) -> Kernel:
    """Comparisons of values, each lifted onto a common fine grid, and of indexes."""
    grids = step.given(0).grid, step.given(1).grid

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        parts = [
            value if grid is None else pointwise.lifted_for_comparison(xp, value, grid)
            for value, grid in zip(aligned(xp, x[:2]), grids, strict=True)
        ]
        return [getattr(xp, _COMPARISONS[step.name])(*parts)]

    return Kernel(compute, constants_as_values(step, 0, 1))


@makes("LOGICAL_AND", "LOGICAL_OR", "LOGICAL_NOT")
def logical(step: Step, runtime: str) -> Kernel:
    """Of truth values."""
    name = step.name.lower()
    return Kernel(
        lambda xp, x, c: [getattr(xp, name)(*aligned(xp, x))], constants_as_values(step, 0, 1)
    )


@makes("SELECT", "SELECT_V2")
def select(step: Step, runtime: str) -> Kernel:
    """A choice between two values of one grid."""
    return Kernel(
        lambda xp, x, c: [xp.where(*aligned(xp, x[:3]))], constants_as_values(step, 0, 1, 2)
    )


# One value, element by element: tables.


def _table(step: Step, entries: np.ndarray) -> Kernel:
    grid = step.given(0).on_grid
    return Kernel(
        lambda xp, x, c: [tables.look_up(xp, c["table"], x[0], grid)],
        {"table": entries.astype(np.int32)},
    )


@makes("LEAKY_RELU")
def leaky_relu(step: Step, runtime: str) -> Kernel:
    """LEAKY_RELU."""
    make = (
        tables.leaky_relu_by_xnnpack if kind_of(step, runtime) == "xnnpack" else tables.leaky_relu
    )
    return _table(step, make(step.given(0).on_grid, step.result.on_grid, step.options.alpha))


@makes("RELU", "RELU6", "RELU_N1_TO_1")
def relu(step: Step, runtime: str) -> Kernel:
    """RELU and its kin as operators of their own."""
    return _table(step, tables.relu(step.given(0).on_grid, step.result.on_grid, step.name.lower()))


@makes("HARD_SWISH")
def hard_swish(step: Step, runtime: str) -> Kernel:
    """HARD_SWISH of int8."""
    return _table(step, tables.hard_swish(step.given(0).on_grid, step.result.on_grid))


_FLOAT_FUNCTIONS: dict[str, tables.Function] = {
    "LOGISTIC": tables.sigmoid,
    "TANH": np.tanh,
    "ELU": tables.elu,
    "EXP": np.exp,
    "GELU": tables.gelu,
    "RSQRT": lambda x: 1 / np.sqrt(x),
}
# Those that TFLite Micro computes otherwise (`tensorflow/lite/micro/kernels/elu.cc`).
_FLOAT_FUNCTIONS_OF_MICRO: dict[str, tables.Function] = {"ELU": tables.elu_by_micro}


@makes(*_FLOAT_FUNCTIONS)
def function(step: Step, runtime: str) -> Kernel:
    """LOGISTIC, TANH, ELU and others: what fills the kernel's table."""
    given, result = step.given(0).on_grid, step.result.on_grid
    kind = kind_of(step, runtime)
    if given.wide and step.name in ("LOGISTIC", "TANH"):
        return _table(step, normalizers.squashed_of_int16(given, step.name))
    if kind == "micro" and step.name in ("LOGISTIC", "TANH"):
        return _table(step, normalizers.squashed(given, result, step.name))
    fill = tables.sampled_by_xnnpack if kind == "xnnpack" else tables.sampled
    of_micro = _FLOAT_FUNCTIONS_OF_MICRO if kind == "micro" else {}
    return _table(step, fill(given, result, of_micro.get(step.name, _FLOAT_FUNCTIONS[step.name])))


@makes("QUANTIZE")
def quantize(step: Step, runtime: str) -> Kernel:
    """QUANTIZE from one grid to another, or of floats."""
    given, result = step.given(0), step.result.on_grid
    kind = kind_of(step, runtime)
    if not given.dtype.startswith("float"):
        make = tables.rescaled_by_xnnpack if kind == "xnnpack" else tables.rescaled
        return _table(step, make(given.on_grid, result))
    low, high = result.limits
    # A compiler that knows a divisor multiplies by its reciprocal: so it is a weight.
    constants = {"scale": np.asarray(result.scale)}

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        if kind == "xnnpack":
            steps = xp.round(x[0] * (np.float32(1) / result.scale))
        else:
            ratio = x[0] / c["scale"]
            size = xp.abs(ratio)
            whole = xp.floor(size)
            steps = xp.sign(ratio) * (whole + xp.cast(size - whole >= 0.5, "float32"))
        steps = xp.clip(steps, -1e6, 1e6) + result.zero_point
        return [xp.cast(xp.clip(steps, low, high), "int32")]

    return Kernel(compute, constants)


@makes("DEQUANTIZE")
def dequantize(step: Step, runtime: str) -> Kernel:
    """DEQUANTIZE to float32."""
    grid = step.given(0).on_grid

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        return [xp.cast(x[0] - grid.zero_point, "float32") * grid.scale]

    return Kernel(compute)


@makes("CAST")
def cast(step: Step, runtime: str) -> Kernel:
    """CAST between integers, floats and truth values."""
    dtype = step.result.dtype
    wraps = {"int8": 8, "int16": 16}.get(dtype)

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        if dtype == "bool":
            return [xp.not_equal(x[0], 0)]
        if dtype == "float32":
            return [xp.cast(x[0], dtype)]
        found = xp.cast(x[0], "int32")
        if wraps is not None:
            half = 1 << (wraps - 1)
            found = xp.bitwise_and(found + half, (1 << wraps) - 1) - half
        return [found]

    return Kernel(compute)


# Over axes.


def _axes(step: Step) -> tuple[int, ...]:
    """Reduced axes, counted with that of the samples."""
    rank = len(step.given(0).shape)
    found = np.atleast_1d(_constant(step.given(1))).tolist()
    return tuple(sorted({axis % rank + 1 for axis in found}))


@makes("MEAN")
def mean(step: Step, runtime: str) -> Kernel:
    """MEAN."""
    axes, grids = _axes(step), (step.given(0).on_grid, step.result.on_grid)
    once = kind_of(step, runtime) == "xnnpack"
    kernel = reductions.mean_by_xnnpack if once else reductions.mean

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        return [xp.reshape(kernel(xp, x[0], axes, *grids), (-1, *step.result.shape))]

    return Kernel(compute)


@makes("REDUCE_MAX", "REDUCE_MIN")
def reduce_extreme(step: Step, runtime: str) -> Kernel:
    """REDUCE_MAX and REDUCE_MIN, which keep the grid."""
    axes, name = _axes(step), "max" if step.name == "REDUCE_MAX" else "min"

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        return [xp.reshape(getattr(xp, name)(x[0], axis=axes), (-1, *step.result.shape))]

    return Kernel(compute)


@makes("REDUCE_PROD")
def reduce_product(step: Step, runtime: str) -> Kernel:
    """REDUCE_PROD."""
    axes, grids = _axes(step), (step.given(0).on_grid, step.result.on_grid)

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        return [xp.reshape(reductions.product(xp, x[0], axes, *grids), (-1, *step.result.shape))]

    return Kernel(compute)


@makes("ARG_MAX", "ARG_MIN")
def arg_extreme(step: Step, runtime: str) -> Kernel:
    """The first index of the greatest or least."""
    (axis,) = _axes(step)
    name = "argmax" if step.name == "ARG_MAX" else "argmin"
    return Kernel(lambda xp, x, c: [xp.cast(getattr(xp, name)(x[0], axis=axis), "int32")])


@makes("TOPK_V2")
def top_k(step: Step, runtime: str) -> Kernel:
    """The largest values of the last axis, and their indexes."""
    count = step.result.shape[-1]
    return Kernel(lambda xp, x, c: reductions.top_k(xp, x[0], count))


@makes("MAX_POOL_2D", "AVERAGE_POOL_2D")
def pool(step: Step, runtime: str) -> Kernel:
    """Pooling over windows."""
    given, result, options = step.given(0), step.result, step.options
    size = options.filterHeight, options.filterWidth
    window = _window(step, size, options)
    kernel = reductions.max_pool if step.name == "MAX_POOL_2D" else reductions.average_pool

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        images = _images(xp, x[0], given.shape)
        found = kernel(xp, images, size, window, result.on_grid, step.activation)
        return [xp.reshape(found, (-1, *result.shape))]

    return Kernel(compute)


@makes("SOFTMAX")
def softmax(step: Step, runtime: str) -> Kernel:
    """SOFTMAX over the last axis."""
    grids = step.given(0).on_grid, step.result.on_grid
    beta = float(step.options.beta)
    if grids[0].wide:
        kernel: Callable[..., Any] = normalizers.softmax_of_int16
    elif kind_of(step, runtime) == "optimized":
        kernel = normalizers.softmax_in_float32
    else:
        kernel = normalizers.softmax
    return Kernel(lambda xp, x, c: [kernel(xp, x[0], *grids, beta)])


@makes("LOG_SOFTMAX")
def log_softmax(step: Step, runtime: str) -> Kernel:
    """LOG_SOFTMAX over the last axis."""
    grids = step.given(0).on_grid, step.result.on_grid
    if kind_of(step, runtime) != "optimized":
        return Kernel(lambda xp, x, c: [normalizers.log_softmax(xp, x[0], *grids)])
    return Kernel(
        lambda xp, x, c: [normalizers.log_softmax_in_float32(xp, x[0], *grids, c["scale"])],
        # A compiler that knows a divisor multiplies by its reciprocal: so it is a weight.
        {"scale": np.asarray(grids[1].scale)},
    )


@makes("L2_NORMALIZATION")
def l2_normalization(step: Step, runtime: str) -> Kernel:
    """L2_NORMALIZATION over the last axis."""
    grids = step.given(0).on_grid, step.result.on_grid
    return Kernel(lambda xp, x, c: [normalizers.l2_normalize(xp, x[0], *grids)])


# Moves, which compute nothing.


@makes("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
def reshape(step: Step, runtime: str) -> Kernel:
    """The same integers in another shape."""
    return Kernel(
        lambda xp, x, c: [xp.reshape(x[0], (-1, *step.result.shape))], constants_as_values(step, 0)
    )


@makes("TRANSPOSE")
def transpose(step: Step, runtime: str) -> Kernel:
    """Axes in another order."""
    order = [0, *(int(axis) + 1 for axis in _constant(step.given(1)))]
    return Kernel(lambda xp, x, c: [xp.transpose(x[0], order)], constants_as_values(step, 0))


@makes("PAD", "PADV2")
def pad(step: Step, runtime: str) -> Kernel:
    """PAD with the integer of real zero."""
    pads = [(0, 0), *((int(a), int(b)) for a, b in _constant(step.given(1)))]
    grid = step.result.grid
    value = 0 if grid is None else grid.zero_point
    if step.name == "PADV2":
        value = int(np.ravel(_constant(step.given(2)))[0])
    return Kernel(lambda xp, x, c: [xp.pad(x[0], pads, constant_values=value)])


@makes("MIRROR_PAD")
def mirror_pad(step: Step, runtime: str) -> Kernel:
    """MIRROR_PAD."""
    pads = [(0, 0), *((int(a), int(b)) for a, b in _constant(step.given(1)))]
    mode = "reflect" if step.options.mode == schema.MirrorPadMode.REFLECT else "symmetric"
    return Kernel(lambda xp, x, c: [xp.pad(x[0], pads, mode=mode)])


@makes("CONCATENATION")
def concatenate(step: Step, runtime: str) -> Kernel:
    """CONCATENATION of values of one grid."""
    rank = len(step.result.shape)
    axis = step.options.axis % rank + 1
    count = len(step.inputs)
    return Kernel(
        lambda xp, x, c: [xp.concatenate(broadcast_together(xp, x), axis=axis)],
        constants_as_values(step, *range(count)),
    )


@makes("PACK")
def pack(step: Step, runtime: str) -> Kernel:
    """PACK along a new axis."""
    axis = step.options.axis % len(step.result.shape) + 1
    return Kernel(
        lambda xp, x, c: [xp.stack(broadcast_together(xp, x), axis=axis)],
        constants_as_values(step, *range(len(step.inputs))),
    )


@makes("UNPACK")
def unpack(step: Step, runtime: str) -> Kernel:
    """UNPACK along an axis."""
    axis = step.options.axis % len(step.given(0).shape) + 1
    count = len(step.outputs)
    return Kernel(
        lambda xp, x, c: [xp.take(x[0], index, axis=axis) for index in range(count)],
        constants_as_values(step, 0),
    )


@makes("SPLIT", "SPLIT_V")
def split(step: Step, runtime: str) -> Kernel:
    """SPLIT into parts."""
    value, axis_at = (1, 0) if step.name == "SPLIT" else (0, 2)
    axis = int(np.ravel(_constant(step.given(axis_at)))[0]) % len(step.given(value).shape)
    sizes = [tensor.shape[axis] for tensor in step.outputs]
    starts = np.cumsum([0, *sizes]).tolist()

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        return [
            x[value][(*[slice(None)] * (axis + 1), slice(start, start + size))]
            for start, size in zip(starts, sizes, strict=False)
        ]

    return Kernel(compute, constants_as_values(step, value))


@makes("SLICE")
def slice_(step: Step, runtime: str) -> Kernel:
    """SLICE at constant places."""
    starts = _constant(step.given(1)).tolist()
    parts = [slice(None)]
    parts += [slice(a, a + n) for a, n in zip(starts, step.result.shape, strict=True)]
    return Kernel(lambda xp, x, c: [x[0][tuple(parts)]], constants_as_values(step, 0))


@makes("STRIDED_SLICE")
def strided_slice(step: Step, runtime: str) -> Kernel:
    """STRIDED_SLICE at constant places, backwards too."""
    options, shape = step.options, step.given(0).shape
    if options.ellipsisMask or options.newAxisMask:
        raise ExportError(
            "Expected STRIDED_SLICE without ellipsis and new axes. Received: one with these, which "
            f"computes {step.result.name!r}. Name every axis in the slice."
        )
    begins, ends, strides = (_constant(step.given(i)).tolist() for i in (1, 2, 3))
    places = []
    for axis, (length, begin, end, stride) in enumerate(
        zip(shape, begins, ends, strides, strict=False)
    ):
        if options.shrinkAxisMask >> axis & 1:
            begin %= length
            places.append(np.arange(begin, begin + 1))
            continue
        part = slice(
            None if options.beginMask >> axis & 1 else begin,
            None if options.endMask >> axis & 1 else end,
            stride,
        )
        places.append(np.arange(length)[part])

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        found = x[0]
        for axis, indices in enumerate(places):
            if len(indices) != shape[axis] or np.any(indices != np.arange(shape[axis])):
                found = xp.take(found, indices, axis=axis + 1)
        return [xp.reshape(found, (-1, *step.result.shape))]

    return Kernel(compute, constants_as_values(step, 0))


@makes("GATHER")
def gather(step: Step, runtime: str) -> Kernel:
    """GATHER by constant places, or from a constant by computed ones."""
    entries, places = step.given(0), step.given(1)
    axis, batch = step.options.axis, getattr(step.options, "batchDims", 0) or 0
    if batch or (entries.data is None and places.data is None):
        raise ExportError(
            "Expected GATHER from or by a constant, without batch axes. Received: another, which "
            f"computes {step.result.name!r}. Use a product with one_hot."
        )
    axis %= len(entries.shape)
    if places.data is not None:
        indices = places.data.astype(np.int32)
        return Kernel(
            lambda xp, x, c: [
                xp.reshape(xp.take(x[0], indices, axis=axis + 1), (-1, *step.result.shape))
            ],
            constants_as_values(step, 0),
        )
    table = np.moveaxis(_constant(entries), axis, 0).astype(np.int32)
    rank = len(places.shape)

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        found = xp.take(c["table"], xp.cast(x[1], "int32"), axis=0)
        # The axes of the places come where the gathered axis was.
        order = [0, *range(rank + 1, rank + 1 + axis), *range(1, rank + 1)]
        order += range(rank + 1 + axis, len(found.shape))
        return [xp.transpose(found, order)]

    return Kernel(compute, {"table": table})


@makes("TILE")
def tile(step: Step, runtime: str) -> Kernel:
    """TILE by constant multiples."""
    repeats = [1, *_constant(step.given(1)).tolist()]
    return Kernel(lambda xp, x, c: [xp.tile(x[0], repeats)], constants_as_values(step, 0))


@makes("BROADCAST_TO")
def broadcast_to(step: Step, runtime: str) -> Kernel:
    """BROADCAST_TO a constant shape."""

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        zeros = np.zeros((1, *step.result.shape), np.int32)
        return [aligned(xp, [x[0], zeros])[0] + zeros]

    return Kernel(compute, constants_as_values(step, 0))


@makes("DEPTH_TO_SPACE", "SPACE_TO_DEPTH")
def depth_and_space(step: Step, runtime: str) -> Kernel:
    """Blocks of pixels to channels and back."""
    block = step.options.blockSize
    rows, columns, channels = step.given(0).shape[1:]

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        if step.name == "DEPTH_TO_SPACE":
            parts = xp.reshape(x[0], (-1, rows, columns, block, block, channels // block**2))
            parts = xp.transpose(parts, (0, 1, 3, 2, 4, 5))
        else:
            parts = xp.reshape(x[0], (-1, rows // block, block, columns // block, block, channels))
            parts = xp.transpose(parts, (0, 1, 3, 2, 4, 5))
        return [xp.reshape(parts, (-1, *step.result.shape))]

    return Kernel(compute)


@makes("SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND")
def batch_and_space(step: Step, runtime: str) -> Kernel:
    """Blocks of pixels to the file's batch and back, as dilated convolutions have them."""
    given, result = step.given(0), step.result
    blocks = _constant(step.given(1)).tolist()
    edges = _constant(step.given(2)).tolist()
    zero = given.on_grid.zero_point
    spatial, rest = len(blocks), given.shape[1 + len(blocks) :]

    def to_batch(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        pads = [(0, 0), (0, 0), *map(tuple, edges), *[(0, 0)] * len(rest)]
        value = xp.pad(x[0], pads, constant_values=zero)
        shape: list[int] = []
        for size, block in zip(value.shape[2 : 2 + spatial], blocks, strict=True):
            shape += [size // block, block]
        value = xp.reshape(value, (-1, given.shape[0], *shape, *rest))
        inner = [3 + 2 * i for i in range(spatial)]
        outer = [2 + 2 * i for i in range(spatial)]
        last = range(2 + 2 * spatial, 2 + 2 * spatial + len(rest))
        value = xp.transpose(value, (0, *inner, 1, *outer, *last))
        return [xp.reshape(value, (-1, *result.shape))]

    def to_space(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        sizes = given.shape[1 : 1 + spatial]
        value = xp.reshape(x[0], (-1, *blocks, result.shape[0], *sizes, *rest))
        order = [0, spatial + 1]
        for i in range(spatial):
            order += [spatial + 2 + i, 1 + i]
        order += range(2 * spatial + 2, 2 * spatial + 2 + len(rest))
        value = xp.transpose(value, order)
        whole = [size * block for size, block in zip(sizes, blocks, strict=True)]
        value = xp.reshape(value, (-1, result.shape[0], *whole, *rest))
        parts = [slice(a, n - b) for (a, b), n in zip(edges, whole, strict=True)]
        return [value[(slice(None), slice(None), *parts)]]

    return Kernel(to_batch if step.name == "SPACE_TO_BATCH_ND" else to_space)


@makes("RESIZE_NEAREST_NEIGHBOR")
def resize_nearest(step: Step, runtime: str) -> Kernel:
    """RESIZE_NEAREST_NEIGHBOR."""
    given, result, options = step.given(0), step.result, step.options
    places = [
        resizing.nearest_places(
            given.shape[axis],
            result.shape[axis],
            corners=bool(options.alignCorners),
            centers=bool(options.halfPixelCenters),
        )
        for axis in (1, 2)
    ]

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        images = _images(xp, x[0], given.shape)
        return [xp.reshape(resizing.nearest(xp, images, *places), (-1, *result.shape))]

    return Kernel(compute)


@makes("RESIZE_BILINEAR")
def resize_bilinear(step: Step, runtime: str) -> Kernel:
    """RESIZE_BILINEAR."""
    given, result, options = step.given(0), step.result, step.options
    kind = kind_of(step, runtime)
    flags = {"corners": bool(options.alignCorners), "centers": bool(options.halfPixelCenters)}
    sizes = [(given.shape[axis], result.shape[axis]) for axis in (1, 2)]
    by_xnnpack = kind == "xnnpack"
    find = resizing.bilinear_places_of_xnnpack if by_xnnpack else resizing.bilinear_places
    kernel = resizing.bilinear_by_xnnpack if by_xnnpack else resizing.bilinear
    places = [find(*size, **flags) for size in sizes]

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        images = _images(xp, x[0], given.shape)
        return [xp.reshape(kernel(xp, images, *places), (-1, *result.shape))]

    return Kernel(compute)


@makes("UNIDIRECTIONAL_SEQUENCE_LSTM")
def lstm(step: Step, runtime: str) -> Kernel:
    """A fused LSTM from zero states."""
    given, result, carry = step.given(0), step.result.on_grid, step.given(19).on_grid

    def by_gate(first: int) -> dict[str, Tensor]:
        return {gate: step.given(first + i) for i, gate in enumerate(GATES)}

    kernels, recurrent, biases = by_gate(1), by_gate(5), by_gate(12)
    numbers = Numbers(
        kernels={gate: _constant(t) for gate, t in kernels.items()},
        kernel_scales={gate: t.on_grid.scale for gate, t in kernels.items()},
        recurrent_kernels={gate: _constant(t) for gate, t in recurrent.items()},
        recurrent_scales={gate: t.on_grid.scale for gate, t in recurrent.items()},
        biases={gate: _constant(t) for gate, t in biases.items()},
        input_scale=given.on_grid.scale,
        input_zero_point=given.on_grid.zero_point,
        output_scale=result.scale,
        output_zero_point=result.zero_point,
        carry_power=int(np.log2(carry.scale)),
    )

    def compute(xp: Arrays, x: Values, c: Mapping[str, Any]) -> Values:
        rows = xp.reshape(x[0], (-1, *given.shape[1:]))
        found = xp.cast(run_lstm(numbers, rows, runtime, xp), "int32")
        return [xp.reshape(found, (-1, *step.result.shape))]

    return Kernel(compute)
