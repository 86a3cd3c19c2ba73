"""Rewrites layers whose channels are not the last axis: as they are with the channels last.

TFLite's kernels take the channels last. So a layer with `data_format="channels_first"`, or a
normalization over another axis, stands between two transpositions, with the weights that it has:
Keras's weights are the same in both formats. `kqat.planning.transpositions` then moves the
transpositions through what commutes with them, until they meet and go.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, clone
from kqat.parts import ChannelAffine, ConstantKind, WithConstant
from kqat.rewrites.layers.basic import Decomposed, split_activation


def channels_last(x: Any, name: str) -> Any:
    """`x` of shape `(batch, channels, …)` as `(batch, …, channels)`; of layer `name`."""
    order = (*range(2, len(x.shape)), 1)
    return layers.Permute(order, name=f"{name}_channels_last")(x)


def channels_first(x: Any, name: str) -> Any:
    """The opposite of `channels_last`."""
    rank = len(x.shape)
    return layers.Permute((rank - 1, *range(1, rank - 1)), name=f"{name}_channels_first")(x)


def between_transpositions(layer: Any, name: str) -> Decomposed:
    """A layer whose `data_format` is `channels_first`, as it is with the channels last."""
    if getattr(layer, "activation", keras.activations.linear) is not keras.activations.linear:
        split = split_activation(layer, name)  # A function may know the axes, as softmax does.
        assert split is not None
        return split
    changes: dict[str, Any] = {"data_format": "channels_last"}

    @functools.cache  # All calls share the weights.
    def with_bias() -> Decomposed:
        return Part(clone(layer, name, **changes), layer.get_weights())

    @functools.cache
    def with_columns() -> Decomposed:
        kept = [np.asarray(v) for v in layer.weights if v is not layer.bias]
        product = Part(clone(layer, name, **changes, use_bias=False), kept)
        bias = _bias_of_columns(layer, name)
        return lambda x: bias(product(x))

    def call(x: Any) -> Any:
        adds = not getattr(layer, "use_bias", False) or _adds_to_channels(layer, x)
        y = (with_bias if adds else with_columns)()(channels_last(x, name))
        # A Flatten in this format makes the channels the last axis too.
        return channels_first(y, name) if len(y.shape) == len(x.shape) else y

    return call


def _adds_to_channels(layer: Any, x: Any) -> bool:
    """Whether Keras adds the bias of a layer to the channels, as it says.

    Its TensorFlow backend adds it along the last axis where that is as long as there are channels
    (`keras.ops.add` takes it for a bias of channels that are last).
    """
    shape = [int(size or 1) for size in layer.compute_output_shape(x.shape)]
    shape = [1, shape[1], *(1 for _ in shape[3:]), shape[-1]]
    bias = np.arange(shape[1], dtype=np.float32).reshape(1, -1, *(1 for _ in shape[2:]))
    found = keras.ops.add(np.zeros(shape, np.float32), bias)
    return np.array_equal(found, np.broadcast_to(bias, shape))


def _bias_of_columns(layer: Any, name: str) -> Decomposed:
    """The bias of a layer as Keras adds it: to the columns, the last axis but the channels."""
    if layer.bias_constraint is not None:
        raise UnsupportedLayerError(
            f"Expected layer '{name}' of type {type(layer).__name__} without bias_constraint, as "
            "its output is as wide as it has channels. Received: one. Keras adds such a bias along "
            "the width on TensorFlow. Build the layer channels_last."
        )
    warnings.warn(
        f"Keras adds the bias of layer '{name}' of type {type(layer).__name__} along the width and "
        "not to the channels, as it is channels_first on TensorFlow and its output is as wide as "
        "it has channels. So do the QAT model and the file, as the float model was trained. Build "
        "the layer channels_last, or without bias, if that is not what you want.",
        stacklevel=2,
    )
    bias = np.asarray(layer.bias)[:, None]
    part = WithConstant(
        ConstantKind.ADD,
        list(bias.shape),
        layer.bias_regularizer,
        name=f"{name}_bias",
        trainable=layer.trainable,
    )
    return Part(part, [bias])


def along_last_axis(layer: Any, name: str) -> Decomposed:
    """A layer whose `axis` is not the last, with that axis moved there and back."""
    last = Part(clone(layer, name, axis=-1), layer.get_weights())

    def call(x: Any) -> Any:
        axis, rank = moved_axis(layer), len(x.shape)
        order = [other for other in range(1, rank) if other != axis] + [axis]
        y = last(layers.Permute(order, name=f"{name}_axis_last")(x))
        back = [order.index(other) + 1 for other in range(1, rank)]
        return layers.Permute(back, name=f"{name}_axis_back")(y)

    return call


def moved_axis(layer: Any) -> int | None:
    """The one axis behind the batch along which a built layer works, if it is not the last."""
    axes = list(layer.axis) if isinstance(layer.axis, list | tuple) else [layer.axis]
    rank = getattr(layer.input_spec, "ndim", None) or built_rank(layer)
    if len(axes) != 1 or axes[0] is None or not rank or axes[0] % rank in (0, rank - 1):
        return None
    return int(axes[0] % rank)


def built_rank(layer: Any) -> int:
    """Number of axes of the input that `layer` was built for; 0 if that is unknown."""
    return len((layer.get_build_config() or {}).get("input_shape") or ())


def rescaling(layer: Any, name: str) -> Decomposed | None:
    """`Rescaling` with numbers for each channel, where Keras's setting has the channels first.

    Keras reads the setting whenever it computes, so the numbers become those of another layer.
    """
    first = keras.config.image_data_format() == "channels_first"
    if not first or np.ndim(layer.scale) != 1:
        return None
    numbers = np.broadcast_arrays(np.float32(layer.scale), np.float32(layer.offset))
    affine = Part(ChannelAffine(name=name, trainable=False), [np.array(n) for n in numbers])
    return lambda x: channels_first(affine(channels_last(x, name)), name)


def operation_in_either_format(row: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """The row of an operation of `keras.ops` for both formats, by that for `channels_last`."""

    def either(operation: Any, name: str) -> Any:
        if operation.data_format != "channels_first":
            return row(operation, name)
        last = copy.copy(operation)
        last.data_format = "channels_last"
        made = row(last, name)

        def call(x: Any, *args: Any) -> Any:
            y = made(channels_last(x, name), *args)
            return channels_first(y, name)

        return call

    return either
