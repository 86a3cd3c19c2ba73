"""Rewrites TimeDistributed, Conv3D and Conv1DTranspose with one layer called for each step."""

from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, activation_name, clone, config_of, is_of_users, is_tensor
from kqat.parts import sliced, stacked
from kqat.rewrites.layers import matrix_products
from kqat.rewrites.layers.basic import Decomposed, activated, own_weights

# Layers that work along the last axis only: one call computes all steps.
POINTWISE = (
    layers.Dense,
    layers.Activation,
    layers.ReLU,
    layers.LeakyReLU,
    layers.Dropout,
    layers.LayerNormalization,
    layers.Rescaling,
    layers.Identity,
)


def _rows(x: Any, name: str) -> Any:
    """Flattens each step to one row: TFLite Micro slices at most four axes."""
    return layers.Reshape((x.shape[1], int(np.prod(x.shape[2:]))), name=f"{name}_rows")(x)


def _steps(rows: Any, begin: int, size: int, name: str) -> Any:
    """`size` of the rows, from row `begin` on."""
    return sliced(rows, (slice(None), slice(begin, begin + size)), name)


def time_distributed(layer: Any, name: str) -> Decomposed:
    """The inner layer on each step, or on all steps at once if it works along the last axis."""
    inner = layer.layer

    def call(x: Any, mask: Any = None, **_: Any) -> Any:
        if isinstance(inner, keras.Sequential) and mask is not None:
            raise UnsupportedLayerError(
                f"Expected TimeDistributed layer '{name}' of a Sequential without a mask. "
                "Received: one. Put each layer of the Sequential in a TimeDistributed of its own."
            )
        if isinstance(inner, keras.Sequential):
            for one in inner.layers:
                part_name = name if one is inner.layers[-1] else f"{name}_{one.name}_steps"
                copy = clone(one, f"{name}_{one.name}")
                spread = layers.TimeDistributed(copy, name=part_name)
                x = Part(spread, one.get_weights())(x)
            return x
        if isinstance(inner, keras.Model):
            raise UnsupportedLayerError(
                f"Expected a layer or a Sequential in TimeDistributed layer '{name}'. Received: "
                f"model '{inner.name}' of type {type(inner).__name__}. Put each of its layers in a "
                "TimeDistributed of its own."
            )
        # Keras adds no penalty of what the inner layer makes.
        plain = {} if inner.activity_regularizer is None else {"activity_regularizer": None}
        if type(inner) in POINTWISE and getattr(inner, "axis", -1) in (-1, [-1]):
            return Part(clone(inner, name, **plain), inner.get_weights())(x)
        part: Any = inner  # No layer of a user's own is made anew; it is opened for each step.
        if not is_of_users(inner):
            part = Part(clone(inner, f"{name}_{inner.name}", **plain), inner.get_weights())
        shown = [{}] * x.shape[1] if mask is None else _masks_of_steps(mask, name)
        steps, rows = [], _rows(x, name)
        for i in range(x.shape[1]):
            step = _steps(rows, i, 1, f"{name}_step_{i}")
            step = layers.Reshape(x.shape[2:], name=f"{name}_input_{i}")(step)
            steps.append(part(step, **shown[i]))
        return stacked(steps, 1, name)

    return call


def _masks_of_steps(mask: Any, name: str) -> list[dict[str, Any]]:
    """The argument `mask` of the inner layer for each step.

    Raises:
        UnsupportedLayerError: if the mask says nothing about what is inside a step.
    """
    if not is_tensor(mask) or len(mask.shape) != 3:
        raise UnsupportedLayerError(
            f"Expected a mask of shape (batch, steps, inner steps) in TimeDistributed layer "
            f"'{name}', whose inner layer reads it. Received: one of shape {tuple(mask.shape)}. "
            "Stop it before the layer: keras.layers.Reshape hands none on."
        )
    found = []
    for i in range(mask.shape[1]):
        row = _steps(mask, i, 1, f"{name}_mask_{i}")
        found.append({"mask": layers.Reshape(mask.shape[2:], name=f"{name}_mask_of_{i}")(row)})
    return found


def conv_3d(layer: Any, name: str) -> Decomposed:
    """`Conv3D` as one call of a `Conv2D` for each output frame, over the frames that it reads.

    TFLite has no int8 CONV_3D. The kernel's depth becomes part of its input channels, so the sum
    over depth stays in one accumulator. The integers are those of a 3-D convolution.
    """
    config = config_of(layer)
    depth, stride = config["kernel_size"][0], config["strides"][0]
    if config["dilation_rate"][0] != 1 or config["groups"] != 1:
        raise UnsupportedLayerError(
            f"Expected one group and no dilation of the depth in layer '{name}'. Received: groups="
            f"{config['groups']}, dilation_rate={config['dilation_rate']}. Use groups=1, and "
            "dilate rows and columns only."
        )
    matrix_products.options(layer, name)
    # (depth, height, width, in, out) -> (height, width, depth * in, out)
    kernel = np.asarray(layer.kernel).transpose(1, 2, 0, 3, 4)
    kernel = kernel.reshape(*kernel.shape[:2], -1, kernel.shape[-1])
    kept = ("use_bias", "kernel_regularizer", "bias_regularizer", "padding", "filters")
    conv = layers.Conv2D(
        kernel_size=config["kernel_size"][1:],
        strides=config["strides"][1:],
        dilation_rate=config["dilation_rate"][1:],
        data_format="channels_last",
        trainable=layer.trainable,
        name=f"{name}_frame",
        **{key: config[key] for key in kept},
    )
    part = Part(conv, [kernel, *own_weights(layer)[1:]])

    def call(x: Any) -> Any:
        if config["padding"] == "same":
            x = _padded(x, depth, stride, name)
        rows, starts = _rows(x, name), range(0, x.shape[1] - depth + 1, stride)
        frames = [_frames(rows, (i, depth), x.shape[2:], name) for i in starts]
        return stacked([part(frame) for frame in frames], 1, name)

    return activated(layer, name, call)


def _padded(x: Any, depth: int, stride: int, name: str) -> Any:
    total = max((-(-x.shape[1] // stride) - 1) * stride + depth - x.shape[1], 0)
    around = ((total // 2, total - total // 2), (0, 0), (0, 0))
    if not total:
        return x
    return layers.ZeroPadding3D(around, "channels_last", name=f"{name}_padded")(x)


def _frames(rows: Any, which: tuple[int, int], shape: tuple[int, ...], name: str) -> Any:
    """Frames of a volume, from `which[0]` on and `which[1]` in number, as channels of one image."""
    begin, size = which
    part = f"{name}_{begin}"
    frames = _steps(rows, begin, size, f"{part}_frames")
    height, width, channels = shape
    if size > 1:
        pixels = (size, height * width, channels)
        frames = layers.Reshape(pixels, name=f"{part}_pixels")(frames)
        frames = layers.Permute((2, 1, 3), name=f"{part}_turned")(frames)
    return layers.Reshape((height, width, size * channels), name=f"{part}_image")(frames)


def conv_1d_transpose(layer: Any, name: str) -> Decomposed:
    """`Conv1DTranspose` as `Conv2DTranspose` over images with one row."""
    config = config_of(layer)
    matrix_products.options(layer, name)
    kept = ("use_bias", "kernel_regularizer", "bias_regularizer", "padding", "filters")
    output_padding = config.get("output_padding")  # Keras 3.10 has none.
    conv = layers.Conv2DTranspose(
        kernel_size=(1, *config["kernel_size"]),
        strides=(1, *config["strides"]),
        dilation_rate=(1, *config["dilation_rate"]),
        output_padding=None if output_padding is None else (0, *np.ravel(output_padding).tolist()),
        data_format="channels_last",
        trainable=layer.trainable,
        name=f"{name}_row",
        **{key: config[key] for key in kept},
    )
    kernel, *bias = own_weights(layer)
    part = Part(conv, [kernel[np.newaxis], *bias])
    # Behind the product a ReLU is fused; a function of the user's own may know the axes.
    fuses = activation_name(layer.activation) is not None
    made = activated(layer, name, part) if fuses else part

    def call(x: Any) -> Any:
        image = layers.Reshape((1, *x.shape[1:]), name=f"{name}_image")(x)
        y = made(image)
        return layers.Reshape(y.shape[2:], name=name)(y)

    return call if fuses else activated(layer, name, call)
