"""Layers that Keras lacks, each one TFLite operator; composite layers are rewritten with them."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.base import TextEnum, UnsupportedLayerError
from kqat.graph import activation_name, added, depth_to_space, space_to_depth
from kqat.grids import HIDDEN, LOWEST, Bounds, Clamp
from kqat.parts.elementwise import Elementwise


@keras.saving.register_keras_serializable("kqat")
class Slice(layers.Layer):
    """`x[:, begin:end:step, …]` with one triple per axis behind the batch.

    Input shape `(batch, d1, d2, …)`; `steps` are positive.
    """

    def __init__(self, begin: list[int], end: list[int], steps: list[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.begin, self.end, self.steps = list(begin), list(end), list(steps)

    def call(self, x: Any) -> Any:
        """The slice."""
        triples = zip(self.begin, self.end, self.steps, strict=True)
        return x[(slice(None), *(slice(b, e, s) for b, e, s in triples))]

    def compute_output_shape(self, input_shape: Any) -> Any:
        """`(batch, …)` with each axis's number of picked positions."""
        triples = zip(self.begin, self.end, self.steps, strict=True)
        return (input_shape[0], *(len(range(b, e, s)) for b, e, s in triples))

    def compute_output_spec(self, x: Any) -> Any:
        """The input's type: indexes and truth values are sliced too."""
        return keras.KerasTensor(self.compute_output_shape(x.shape), dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `begin`, `end` and `steps`."""
        return {**super().get_config(), "begin": self.begin, "end": self.end, "steps": self.steps}


def sliced(x: Any, key: Any, name: str) -> Any:
    """`x[key]` as a `Slice`, backwards as a `Take`, and a Reshape where `key` drops or adds axes.

    Raises:
        UnsupportedLayerError: if `key` slices the batch, or is an array.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        given = sum(k is not None for k in keys) - 1
        keys[at : at + 1] = [slice(None)] * (len(x.shape) - given)
    axes = iter(x.shape)
    triples: list[tuple[Any, Any, int]] = []
    shape: list[Any] = []
    backwards: dict[int, list[int]] = {}  # axis -> the positions picked along it
    for k in keys:
        if k is None:
            shape.append(1)
            continue
        size = next(axes)
        triple = _triple(k, size, name, first=not triples)
        if triple[2] < 0:
            backwards[len(triples)] = list(range(*triple))
            triple = (0, size, 1)
        triples.append(triple)
        if isinstance(k, slice):
            picked = backwards.get(len(triples) - 1)
            forwards = None if size is None else len(range(*triple))
            shape.append(forwards if picked is None else len(picked))
    rest = list(axes)
    triples += [(0, size, 1) for size in rest]
    shape += rest
    if len(triples) == 1:  # Samples of one number each: there are only axes to add.
        return layers.Reshape(shape[1:], name=name)(x)
    begin, end, steps = (list(v) for v in zip(*triples[1:], strict=True))
    plain = len(shape) == len(x.shape) and all(isinstance(k, slice) for k in keys)
    whole = [(0, size, 1) for size in x.shape[1:]]
    sliced_axes = list(zip(begin, end, steps, strict=True)) != whole
    parts: list[tuple[Any, tuple[Any, ...]]] = [(Take, item[::-1]) for item in backwards.items()]
    if sliced_axes:
        parts.insert(0, (Slice, (begin, end, steps)))
    elif plain and not parts:
        return layers.Identity(name=name, dtype=x.dtype)(x)
    for i, (kind, options) in enumerate(parts):
        last = plain and i == len(parts) - 1
        x = kind(*options, name=name if last else f"{name}_slice{f'_{i}' if i else ''}")(x)
    return x if plain else layers.Reshape(shape[1:], name=name)(x)


def _triple(key: Any, size: Any, name: str, first: bool) -> tuple[Any, Any, int]:
    """`(begin, end, step)` of one axis."""
    if first and key == slice(None):
        return (0, None, 1)
    if first:
        raise UnsupportedLayerError(
            f"Expected the first axis, the batch, to be taken whole in '{name}', as by x[:, …]. "
            f"Received: {key!r} for it. Pick along the axes behind it. What drops axes by their "
            "size, as keras.ops.squeeze without axis=, drops a batch of 1 too: name the axes."
        )
    if not isinstance(key, int | slice):
        raise UnsupportedLayerError(
            f"Expected slices and numbers behind the batch axis in '{name}'. Received: {key!r}. "
            "Pick several places by keras.ops.take(x, places, axis=…)."
        )
    if isinstance(key, int):
        start = key % size
        return (start, start + 1, 1)
    return key.indices(size)


class PaddingKind(TextEnum):
    """With what a `Padding` surrounds values."""

    LOWEST = "lowest"
    REFLECT = "reflect"
    SYMMETRIC = "symmetric"


class _OfWidths(layers.Layer):
    """What layers have in common that surround values: two numbers for each axis but the batch."""

    def __init__(self, widths: Sequence[Sequence[int]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.widths = [[int(n) for n in pair] for pair in widths]

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with the arguments of the class."""
        return {**super().get_config(), "widths": self.widths}


@keras.saving.register_keras_serializable("kqat")
class Padding(_OfWidths):
    """Values around others: mirrored ones, or such as lie below all others.

    The latter are `arithmetic.LOWEST`: a maximum passes them over, and the file has the lowest
    integer of the grid there.

    Args:
        kind: what they are.
        widths: two numbers for each axis behind the batch: of those before and behind.
    """

    def __init__(
        self, kind: PaddingKind | str, widths: Sequence[Sequence[int]], **kwargs: Any
    ) -> None:
        super().__init__(widths, **kwargs)
        self.kind = PaddingKind(kind)

    def call(self, x: Any) -> Any:
        """The padded tensor."""
        widths = [[0, 0], *self.widths]
        if self.kind is PaddingKind.LOWEST:
            return ops.pad(x, widths, "constant", constant_values=LOWEST)
        return ops.pad(x, widths, self.kind.value)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `kind` and `widths`."""
        return {**super().get_config(), "kind": self.kind.value}


@keras.saving.register_keras_serializable("kqat")
class ZeroPadding(_OfWidths):
    """Zeros around values along any axis behind the batch, the channels among them.

    Keras's layers of that name pad the axes between batch and channels alone.

    Args:
        widths: two numbers for each axis behind the batch: of zeros before and behind.
    """

    def call(self, x: Any) -> Any:
        """The padded tensor."""
        return ops.pad(x, [[0, 0], *self.widths])


class ReduceKind(TextEnum):
    """The function of `keras.ops` that a `Reduce` computes."""

    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    PROD = "prod"


@keras.saving.register_keras_serializable("kqat")
class Reduce(layers.Layer):
    """The mean, maximum, minimum or product over axes.

    Input shape `(batch, d1, …)`; the batch is axis 0 and none of `axes`.
    """

    def __init__(
        self, kind: ReduceKind | str, axes: list[int], keepdims: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.kind, self.axes, self.keepdims = ReduceKind(kind), list(axes), keepdims

    def call(self, x: Any) -> Any:
        """The reduced tensor."""
        return getattr(ops, self.kind)(x, axis=tuple(self.axes), keepdims=self.keepdims)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape, with the axes of size 1 or left out."""
        axes = {axis % len(input_shape) for axis in self.axes}
        sizes = enumerate(input_shape)
        if self.keepdims:
            return tuple(1 if axis in axes else size for axis, size in sizes)
        return tuple(size for axis, size in sizes if axis not in axes)

    def compute_output_spec(self, x: Any) -> Any:
        """A float stays of its type; of other types Keras's function knows what becomes."""
        if keras.backend.is_float_dtype(x.dtype):
            return keras.KerasTensor(self.compute_output_shape(x.shape), dtype=x.dtype)
        made = self.call(x)
        return keras.KerasTensor(made.shape, dtype=made.dtype)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with the arguments above."""
        own = {"kind": self.kind.value, "axes": self.axes, "keepdims": self.keepdims}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("kqat")
class Remainder(Reduce):
    """The mean of values whose mean was subtracted before: that of their errors of rounding.

    Calibration sees next to nothing of it, as nothing is rounded there. So the range is no less
    than 16 steps of the values to each side: a row of small deviation multiplies the error of its
    first mean, which is half a step of that mean at most.
    """


def total(x: Any, axes: list[int], keepdims: bool, name: str) -> Any:
    """The sum over axes, as a multiple of the mean: LiteRT's reference SUM does not rescale."""
    count = float(np.prod([x.shape[axis] for axis in axes]))
    if count == 1.0:
        return Reduce(ReduceKind.MEAN, axes, keepdims, name=name)(x)
    mean = Reduce(ReduceKind.MEAN, axes, keepdims, name=f"{name}_mean")(x)
    return layers.Rescaling(count, name=name)(mean)


def stacked(values: Sequence[Any], axis: int, name: str) -> Any:
    """Values of equal shape side by side along a new axis; the batch is axis 0."""
    shape = list(values[0].shape[1:])
    shape.insert(axis - 1, 1)
    if len(values) == 1:
        return layers.Reshape(shape, name=name)(values[0])
    rows = [layers.Reshape(shape, name=f"{name}_row_{i}")(x) for i, x in enumerate(values)]
    return joined(rows, axis, name)


def joined(values: Sequence[Any], axis: int, name: str) -> Any:
    """Values side by side along an axis; those without a scale keep their type.

    Truth values are joined as integers, for TFLite Micro's kernel takes no others.
    """
    if any(keras.backend.is_float_dtype(value.dtype) for value in values):
        return layers.Concatenate(axis=axis, name=name)(values)
    together = {"axis": axis}
    if any(value.dtype != "bool" for value in values):
        return IndexOperation(IndexKind.CONCATENATE, together, name=name)(values)
    one = {"x2": 1}
    numbers = {id(value): value for value in values}
    for i, (key, value) in enumerate(numbers.items()):
        numbers[key] = IndexOperation(IndexKind.MULTIPLY, one, name=f"{name}_number_{i}")(value)
    values = [numbers[id(value)] for value in values]
    whole = IndexOperation(IndexKind.CONCATENATE, together, name=f"{name}_numbers")(values)
    return IndexOperation(IndexKind.NOT_EQUAL, {"x2": 0}, name=name)(whole)


@keras.saving.register_keras_serializable("kqat")
class Take(layers.Layer):
    """The entries `indices` along one axis, in that order; an entry may come more than once.

    Input shape `(batch, d1, …)`; `axis` is at least 1.
    """

    def __init__(self, indices: list[int], axis: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.indices, self.axis = [int(i) for i in indices], axis

    def call(self, x: Any) -> Any:
        """The entries."""
        return ops.take(x, ops.convert_to_tensor(self.indices, "int32"), axis=self.axis)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `indices` and `axis`."""
        return {**super().get_config(), "indices": self.indices, "axis": self.axis}


@keras.saving.register_keras_serializable("kqat")
class TopK(layers.Layer):
    """The `k` largest numbers along the last axis, the largest first, and where they stand.

    Input shape `(batch, …, n)`; returns two tensors of shape `(batch, …, k)`: the numbers, and
    their indexes in int32. Of equal numbers the first comes first.
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.k = int(k)

    def call(self, x: Any) -> list[Any]:
        """Numbers and indexes."""
        return list(ops.top_k(x, self.k))

    def compute_output_spec(self, x: Any) -> list[Any]:
        """Numbers of the input's type, and indexes."""
        shape = (*x.shape[:-1], self.k)
        return [keras.KerasTensor(shape, dtype=dtype) for dtype in (x.dtype, "int32")]

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `k`."""
        config = super().get_config()
        config.pop("autocast", None)
        return {**config, "k": self.k}


@keras.saving.register_keras_serializable("kqat")
class ConstantRows(layers.Embedding):
    """An `Embedding` whose table is a constant of the rewriting, not a weight of the user's.

    So no policy for weights decides its bits: its rows ship on the grid of its output.
    """


@keras.saving.register_keras_serializable("kqat")
class DepthToSpace(layers.Layer):
    """Blocks of `block_size` by `block_size` pixels out of channels, as `keras.ops` has it."""

    def __init__(self, block_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_size = block_size

    def call(self, x: Any) -> Any:
        """The image."""
        return depth_to_space(x, self.block_size)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `block_size`."""
        return {**super().get_config(), "block_size": self.block_size}


@keras.saving.register_keras_serializable("kqat")
class SpaceToDepth(layers.Layer):
    """Channels out of blocks of `block_size` by `block_size` pixels, as `keras.ops` has it."""

    def __init__(self, block_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_size = block_size

    def call(self, x: Any) -> Any:
        """The image."""
        return space_to_depth(x, self.block_size)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `block_size`."""
        return {**super().get_config(), "block_size": self.block_size}


class IndexKind(TextEnum):
    """The function of `keras.ops` that an `IndexOperation` computes.

    `DIVIDE` is the quotient towards zero, of which Keras has none: what integer kernels compute.
    """

    ARGMAX = "argmax"
    ARGMIN = "argmin"
    ADD = "add"
    SUBTRACT = "subtract"
    MULTIPLY = "multiply"
    DIVIDE = "divide"
    MAXIMUM = "maximum"
    MINIMUM = "minimum"
    PAD = "pad"
    EQUAL = "equal"
    NOT_EQUAL = "not_equal"
    GREATER = "greater"
    GREATER_EQUAL = "greater_equal"
    LESS = "less"
    LESS_EQUAL = "less_equal"
    CONCATENATE = "concatenate"
    LOGICAL_AND = "logical_and"
    LOGICAL_OR = "logical_or"
    LOGICAL_NOT = "logical_not"


# Saved files know it by this name.
@keras.saving.register_keras_serializable("kqat", "Count")
class IndexOperation(layers.Layer):
    """A function of `keras.ops` that makes indexes or truth values, which have no scale.

    Args:
        kind: the function.
        options: its other arguments by name, plain JSON types.
    """

    def __init__(
        self, kind: IndexKind | str, options: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.kind, self.options = IndexKind(kind), dict(options or {})

    def call(self, x: Any) -> Any:
        """The function's value of a tensor, or of a list of them."""
        tensors = x if isinstance(x, list | tuple) else [x]
        if self.kind is IndexKind.CONCATENATE:
            return ops.concatenate(tensors, **self.options)
        if self.kind is IndexKind.DIVIDE:
            return _towards_zero(tensors[0], self.options["x2"])
        options = dict(self.options)
        if self.kind is IndexKind.ADD:
            return added(*tensors, *options.values())
        first = [options.pop("x1")] if "x1" in options else []
        result = getattr(ops, self.kind)(*first, *tensors, **options)
        return (
            ops.cast(result, "int32")
            if self.kind in (IndexKind.ARGMAX, IndexKind.ARGMIN)
            else result
        )

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `kind` and `options`."""
        config = super().get_config()
        config.pop("autocast", None)
        return {**config, "kind": self.kind.value, "options": self.options}


def _towards_zero(x: Any, divisor: Any) -> Any:
    """The quotient of an integer by constants, without its fraction."""
    divisor = ops.convert_to_tensor(divisor, x.dtype)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # The one that the converter makes a DIV of.
        return tf.raw_ops.Div(x=x, y=divisor)
    signs = ops.sign(x) * ops.sign(divisor)
    return ops.cast(signs * (ops.abs(x) // ops.abs(divisor)), x.dtype)


@keras.saving.register_keras_serializable("kqat")
class Select(layers.Layer):
    """`where(condition, a, b)` of `[condition, a, b]`; shapes broadcast."""

    def call(self, inputs: Any) -> Any:
        """The selection."""
        return ops.where(*inputs)


@keras.saving.register_keras_serializable("kqat")
class Hold(Select):
    """A state after a step, of `[counts, new, before]`: where the step does not count, as before.

    The new state is rounded before the choice, so that both lie on one grid and a held state keeps
    its integers.
    """


@keras.saving.register_keras_serializable("kqat")
class Hide(layers.Add):
    """`bias + scores` of `[bias, scores]`; the bias of a hidden key is `arithmetic.HIDDEN`.

    A hidden score becomes `arithmetic.LOWEST`, so softmax gives it no weight. In the file it is an
    ADD: there the sum is cut off at the lowest integer of the grid, with the same result.
    """

    def call(self, inputs: Any) -> Any:
        """The scores, `LOWEST` where the bias hides them."""
        bias, scores = inputs
        return _shown(bias, scores)


def _shown(bias: Any, scores: Any) -> Any:
    return ops.where(bias < HIDDEN / 2, LOWEST, scores)


class ClipKind(TextEnum):
    """What a `Clip` ships as: a lookup table, or the ends of its output's grid."""

    TABLE = "table"
    GRID = "grid"


@keras.saving.register_keras_serializable("kqat")
class Clip(layers.Layer):
    """`x`, but none below `low` and none above `high`; any shape. Either may be infinite."""

    def __init__(
        self,
        low: float | None = None,
        high: float | None = None,
        kind: ClipKind | str = ClipKind.TABLE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bounds = Bounds.from_list((low, high))
        self.kind = ClipKind(kind)

    @classmethod
    def of(cls, bounds: Bounds, kind: ClipKind = ClipKind.TABLE, **options: Any) -> "Clip":
        """The layer that clips to `bounds`."""
        low, high = bounds.to_list()
        return cls(low, high, kind, **options)

    def call(self, x: Any) -> Any:
        """`x` inside the bounds."""
        return ops.clip(x, self.bounds.low, self.bounds.high)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `low`, `high` and `kind`; `None` is infinite."""
        low, high = self.bounds.to_list()
        return {**super().get_config(), "low": low, "high": high, "kind": self.kind.value}


def clamp_layer(clamp: Clamp | Bounds, **options: Any) -> layers.Layer:
    """The layer that computes a clamp; one of Keras's where there is one."""
    if not isinstance(clamp, Bounds):
        return layers.Activation(clamp, **options)
    if clamp.low == 0.0:
        return layers.ReLU(max_value=clamp.high, **options)
    if clamp == Bounds(-1.0, 1.0):
        return layers.Activation("hard_tanh", **options)
    return Clip.of(clamp, **options)


# Activations of Keras that compute each number of a row from all of it.
_OF_ROWS = ("softmax", "log_softmax")


def computes_each_number(layer: Any) -> bool:
    """Whether a layer, which has no weights, computes each number of its input by itself."""
    if isinstance(layer, layers.Activation):
        return activation_name(layer.activation) not in _OF_ROWS
    if isinstance(layer, layers.Rescaling):
        return np.size(layer.scale) == 1 == np.size(layer.offset)
    return isinstance(layer, Elementwise | Clip | layers.ReLU)


def is_factor(layer: Any) -> bool:
    """Whether a layer does no more than multiply by one number, or by one for each channel."""
    if type(layer) is ChannelAffine:
        return layer.gamma is not None and layer.beta is None
    if type(layer) is not layers.Rescaling or np.any(np.asarray(layer.offset)):
        return False
    return np.size(layer.scale) == 1


class ConstantKind(TextEnum):
    """What a `WithConstant` computes; `HIDE` adds the bias of a mask, as the layer `Hide` does."""

    ADD = "add"
    SUBTRACT = "subtract"
    MULTIPLY = "multiply"
    SQUARED_DIFFERENCE = "squared_difference"
    HIDE = "hide"


@keras.saving.register_keras_serializable("kqat")
class WithConstant(layers.Layer):
    """`x + value`, `value - x`, `x * value` or `(x - value) ** 2`; `value` may be trained.

    `value` has the given shape, which broadcasts with that of `x`.
    """

    def __init__(
        self,
        kind: ConstantKind | str,
        shape: list[int],
        value_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kind, self.shape = ConstantKind(kind), list(shape)
        self.value_regularizer = keras.regularizers.get(value_regularizer)

    def build(self, input_shape: Any) -> None:
        """Creates the value, zero."""
        self.value = self.add_weight(
            name="value",
            shape=self.shape,
            initializer="zeros",
            regularizer=self.value_regularizer,
        )

    def call(self, x: Any) -> Any:
        """The sum, difference or product, or the square of the difference."""
        if self.kind is ConstantKind.HIDE:
            return _shown(self.value, x)
        if self.kind is ConstantKind.ADD:
            return added(x, self.value)
        if self.kind is ConstantKind.SQUARED_DIFFERENCE:
            return ops.square(ops.subtract(self.value, x))
        return getattr(ops, self.kind)(self.value, x)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape after broadcasting."""
        fixed = (1, *input_shape[1:])
        return (input_shape[0], *np.broadcast_shapes(fixed, tuple(self.shape))[1:])

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with the arguments above."""
        penalty = keras.regularizers.serialize(self.value_regularizer)
        own = {"kind": self.kind.value, "shape": self.shape, "value_regularizer": penalty}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("kqat")
class Matmul(layers.Layer):
    """The product of two batches of matrices, `[a, b] -> a @ b`.

    Shapes `(…, m, k)` and `(…, k, n)`; result `(…, m, n)`.
    """

    def call(self, inputs: Any) -> Any:
        """`a @ b`, batch by batch."""
        a, b = inputs
        return ops.matmul(a, b)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the products; those of the batches broadcast."""
        (*a_batch, rows, _), (*b_batch, _, columns) = input_shape
        length = max(len(a_batch), len(b_batch))
        padded = [[1] * (length - len(batch)) + batch for batch in (a_batch, b_batch)]
        batch = [b if a == 1 else a for a, b in zip(*padded, strict=True)]
        return (*batch, rows, columns)


@keras.saving.register_keras_serializable("kqat")
class SquaredDifference(layers.Layer):
    """`(a - b) ** 2` of `[a, b]`, elementwise; shapes broadcast."""

    def call(self, inputs: Any) -> Any:
        """The square of the difference."""
        a, b = inputs
        return ops.square(ops.subtract(a, b))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape after broadcasting."""
        batch = input_shape[0][0]
        return (batch, *np.broadcast_shapes(*(tuple(shape[1:]) for shape in input_shape)))


@keras.saving.register_keras_serializable("kqat")
class ReciprocalSquareRoot(layers.Layer):
    """`1 / sqrt(x + epsilon)`, elementwise, for `x >= 0`."""

    def __init__(self, epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def call(self, x: Any) -> Any:
        """`1 / sqrt(x + epsilon)`; an `x` that rounding put below zero is taken as zero."""
        return ops.rsqrt(ops.maximum(x, 0.0) + self.epsilon)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `epsilon`."""
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("kqat")
class ChannelAffine(layers.Layer):
    """`x * gamma + beta`, one trainable pair per index of the last axis.

    Without `scale` gamma is one, without `center` beta is zero, and no variable. The
    regularizers and constraints are those of Keras's normalization layers.
    """

    def __init__(
        self,
        scale: bool = True,
        center: bool = True,
        *,
        gamma_regularizer: Any = None,
        beta_regularizer: Any = None,
        gamma_constraint: Any = None,
        beta_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scale, self.center = scale, center
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.beta_regularizer = keras.regularizers.get(beta_regularizer)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.beta_constraint = keras.constraints.get(beta_constraint)

    def build(self, input_shape: Any) -> None:
        """Creates gamma (ones) and beta (zeros), of shape `(channels,)`."""
        channels = input_shape[-1]
        self.gamma = self._weight("gamma", "ones", channels) if self.scale else None
        self.beta = self._weight("beta", "zeros", channels) if self.center else None

    def _weight(self, name: str, initializer: str, channels: int) -> Any:
        return self.add_weight(
            name=name,
            shape=(channels,),
            initializer=initializer,
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
        )

    def call(self, x: Any) -> Any:
        """The scaled and shifted value."""
        x = x if self.gamma is None else x * self.gamma
        return x if self.beta is None else x + self.beta

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with the options serialized."""
        serialize = keras.saving.serialize_keras_object
        kinds = ("gamma_regularizer", "beta_regularizer", "gamma_constraint", "beta_constraint")
        given = {kind: getattr(self, kind) for kind in kinds}
        options = {k: None if v is None else serialize(v) for k, v in given.items()}
        own = {"scale": self.scale, "center": self.center}
        return {**super().get_config(), **own, **options}
