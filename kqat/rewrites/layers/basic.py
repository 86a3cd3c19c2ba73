"""Rewrites common layers as simpler layers, so that a quantizer can stand between the parts.

Each function takes a built layer and a name from which its parts are named. It returns a callable
of the same inputs, or `None` if the layer is simple already. In inference the callable computes
the same values, bit for bit where the arithmetic allows. The parts own copies of the weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, activation_name, clone, config_of, duplicate
from kqat.parts import Clip, Elementwise, Reduce, ReduceKind

Decomposed = Callable[..., Any]


def split_activation(layer: Any, name: str) -> Decomposed | None:
    """`Conv(activation=f)` as `Conv` and `f`, so that the sum before `f` can have a range."""
    if layer.activation is keras.activations.linear:
        return None
    changes = {"activation": "linear", "activity_regularizer": None}
    return activated(layer, name, Part(clone(layer, name, **changes), own_weights(layer)))


def dense(layer: Any, name: str) -> Decomposed | None:
    """As `split_activation`; an input of more than four axes is reshaped to two and back.

    On such an input the TensorFlow converter would not fuse the bias: it adds it after a RESHAPE.
    """
    split = split_activation(layer, name)
    if len(layer.input.shape) <= 4:
        return split
    inner = split or duplicate(layer, name)

    def call(x: Any) -> Any:
        rows = layers.Reshape((int(np.prod(x.shape[1:-1])), x.shape[-1]), name=f"{name}_rows")(x)
        y = inner(rows)
        return layers.Reshape((*x.shape[1:-1], y.shape[-1]), name=f"{name}_shape")(y)

    return call


def activated(layer: Any, name: str, linear: Decomposed) -> Decomposed:
    """`linear`, followed by the activation of `layer` if it has one."""
    if layer.activation is keras.activations.linear:
        return linear
    activation = _activation(layer, name)
    return lambda *args, **kwargs: activation(linear(*args, **kwargs))


def own_weights(layer: Any) -> list[np.ndarray]:
    """The weights of a layer without those of its activation, which may be a layer with some."""
    others = {id(v) for v in getattr(layer.activation, "weights", ())}
    return [np.asarray(v) for v in layer.weights if id(v) not in others]


def _activation(layer: Any, name: str) -> Decomposed:
    return activation_layer(layer.activation, name, layer.activity_regularizer)


def activation_layer(function: Any, name: str, regularizer: Any = None) -> Decomposed:
    """The activation `function` of layer `name`, a function or a layer, as a layer of its own."""
    if isinstance(function, keras.layers.Layer):
        return duplicate(function, name=f"{name}_{function.name}")
    kind = activation_name(function)
    options = {"activity_regularizer": regularizer}
    if kind is None:
        return layers.Activation(function, name=f"{name}_activation", **options)
    return layers.Activation(kind, name=f"{name}_{kind}", **options)


def separable(layer: Any, name: str) -> Decomposed:
    """`SeparableConv` as `DepthwiseConv` and a pointwise `Conv`."""
    one_d = isinstance(layer, layers.SeparableConv1D)
    config = config_of(layer)
    shared = {k: config[k] for k in ("data_format", "trainable", "dtype")}
    depthwise = (layers.DepthwiseConv1D if one_d else layers.DepthwiseConv2D)(
        kernel_size=config["kernel_size"],
        strides=config["strides"],
        padding=config["padding"],
        dilation_rate=config["dilation_rate"],
        depth_multiplier=config["depth_multiplier"],
        use_bias=False,
        depthwise_regularizer=config["depthwise_regularizer"],
        depthwise_constraint=config["depthwise_constraint"],
        name=f"{name}_depthwise",
        **shared,
    )
    pointwise = (layers.Conv1D if one_d else layers.Conv2D)(
        filters=config["filters"],
        kernel_size=1,
        use_bias=config["use_bias"],
        kernel_regularizer=config["pointwise_regularizer"],
        kernel_constraint=config["pointwise_constraint"],
        bias_regularizer=config["bias_regularizer"],
        bias_constraint=config["bias_constraint"],
        name=name,
        **shared,
    )
    weights = own_weights(layer)
    first, second = Part(depthwise, weights[:1]), Part(pointwise, weights[1:])
    return activated(layer, name, lambda x: second(first(x)))


def relu(layer: Any, name: str) -> Decomposed | None:
    """`ReLU` as a fused activation (RELU, RELU6 …), as `LeakyReLU`, or as a lookup table."""
    slope, top, threshold = layer.negative_slope, layer.max_value, layer.threshold
    if not slope and not threshold and top in (None, 6):
        return layers.Activation("relu6" if top == 6 else "relu", name=name)
    if slope and not threshold and top is None:
        return layers.LeakyReLU(negative_slope=slope, name=name)
    if not slope and not threshold and top > 0:
        return Clip(0.0, float(top), name=name)
    return Elementwise.of(layer.call, name=name)


def elu(layer: Any, name: str) -> Decomposed | None:
    """`ELU`: its kernel has alpha = 1 only; any other alpha becomes a lookup table."""
    return None if layer.alpha == 1.0 else Elementwise.of(layer.call, name=name)


def silu(layer: Any, name: str) -> Decomposed:
    """`silu(x) = x * sigmoid(x)`."""
    gate = layers.Activation("sigmoid", name=f"{name}_sigmoid")
    product = layers.Multiply(name=name)
    return lambda x: product([x, gate(x)])


def global_mean(layer: Any, name: str) -> Decomposed | None:
    """`GlobalAveragePooling` with the channels first: the mean over the axes behind them."""
    return _global_pool(layer, ReduceKind.MEAN, name)


def global_max(layer: Any, name: str) -> Decomposed | None:
    """`GlobalMaxPooling` with the channels first: the maximum over the axes behind them."""
    return _global_pool(layer, ReduceKind.MAX, name)


def _global_pool(layer: Any, kind: ReduceKind, name: str) -> Decomposed | None:
    # MEAN and REDUCE_MAX take any axes, so nothing need be transposed.
    if layer.data_format == "channels_last":
        return None
    axes = list(range(2, len(layer.input.shape)))
    return Reduce(kind, axes, layer.keepdims, name=name)


def pairwise(layer: Any, name: str) -> Decomposed | None:
    """`Add` or `Multiply` of many inputs as a chain of two-input layers: kernels take two."""
    inputs = layer.input
    count = len(inputs) if isinstance(inputs, list | tuple) else 1
    if count == 2:
        return None
    if count == 1:
        return layers.Identity(name=name)
    names = [f"{name}_{i}" for i in range(1, count - 1)] + [name]
    parts = [type(layer)(name=part_name) for part_name in names]

    def chain(tensors: Sequence[Any]) -> Any:
        total = tensors[0]
        for part, tensor in zip(parts, tensors[1:], strict=True):
            total = part([total, tensor])
        return total

    return chain


def average(layer: Any, name: str) -> Decomposed:
    """`Average` as a sum and a multiplication by one constant."""

    def chain(tensors: Sequence[Any]) -> Any:
        # Add the inputs two by two here: the rewrite of Add is not applied to parts of a rewrite.
        count, result = len(tensors), tensors[0]
        for i, tensor in enumerate(tensors[1:], 1):
            part = f"{name}_sum" if i == count - 1 else f"{name}_sum_{i}"
            result = layers.Add(name=part)([result, tensor])
        return layers.Rescaling(1.0 / count, name=name)(result)

    return chain


def upsample_2d(layer: Any, name: str) -> Decomposed:
    """`UpSampling2D` as a resize, which has an integer kernel; Keras would make TILE operators."""

    def resize(x: Any) -> Any:
        height, width = x.shape[1] * layer.size[0], x.shape[2] * layer.size[1]
        options = {"interpolation": layer.interpolation, "data_format": "channels_last"}
        return layers.Resizing(height, width, name=name, **options)(x)

    return resize


def _nearest(x: Any, rows: int, columns: int, name: str) -> Any:
    options = {"interpolation": "nearest", "data_format": "channels_last"}
    return layers.Resizing(rows, columns, name=name, **options)(x)


def repeat_vector(layer: Any, name: str) -> Decomposed:
    """`RepeatVector` as a resize: TFLite Micro has no TILE."""

    def repeat(x: Any) -> Any:
        image = layers.Reshape((1, 1, x.shape[-1]), name=f"{name}_image")(x)
        image = _nearest(image, layer.n, 1, f"{name}_resize")
        return layers.Reshape((layer.n, x.shape[-1]), name=name)(image)

    return repeat


def upsample_1d(layer: Any, name: str) -> Decomposed:
    """`UpSampling1D` as a resize: TFLite Micro has no TILE."""

    def resize(x: Any) -> Any:
        steps, channels = x.shape[1:]
        image = layers.Reshape((steps, 1, channels), name=f"{name}_image")(x)
        image = _nearest(image, steps * layer.size, 1, f"{name}_resize")
        return layers.Reshape((steps * layer.size, channels), name=name)(image)

    return resize


def upsample_3d(layer: Any, name: str) -> Decomposed:
    """`UpSampling3D` as two resizes: first depth × height, then width."""

    def resize(x: Any) -> Any:
        depth, height, width, channels = x.shape[1:]
        depth_by, height_by, width_by = layer.size
        x = layers.Reshape((depth, height, width * channels), name=f"{name}_front")(x)
        x = _nearest(x, depth * depth_by, height * height_by, f"{name}_front_resize")
        rows = depth * depth_by * height * height_by
        x = layers.Reshape((rows, width, channels), name=f"{name}_side")(x)
        x = _nearest(x, rows, width * width_by, f"{name}_side_resize")
        shape = (depth * depth_by, height * height_by, width * width_by, channels)
        return layers.Reshape(shape, name=name)(x)

    return resize


def crop_3d(layer: Any, name: str) -> Decomposed:
    """`Cropping3D` as two 2-D croppings: TFLite Micro slices at most four axes."""

    def crop(x: Any) -> Any:
        depth, height, width, channels = x.shape[1:]
        front, top, left = layer.cropping
        x = layers.Reshape((depth, height, width * channels), name=f"{name}_front")(x)
        x = layers.Cropping2D((front, top), "channels_last", name=f"{name}_front_crop")(x)
        depth, height = x.shape[1:3]
        x = layers.Reshape((depth * height, width, channels), name=f"{name}_side")(x)
        x = layers.Cropping2D(((0, 0), left), "channels_last", name=f"{name}_side_crop")(x)
        return layers.Reshape((depth, height, x.shape[2], channels), name=name)(x)

    return crop


def pool_3d(layer: Any, name: str) -> Decomposed:
    """`MaxPooling3D`/`AveragePooling3D` as two 2-D poolings: TFLite has no 3-D pooling.

    Pooling is separable. The first pools height and width, with the depth joined to the channels.
    The second pools the depth, with height and width flattened to one axis.
    """
    depth, height, width = layer.pool_size
    stride_d, stride_h, stride_w = layer.strides
    average_pool = isinstance(layer, layers.AveragePooling3D)
    pool = layers.AveragePooling2D if average_pool else layers.MaxPooling2D
    options = {"padding": layer.padding, "data_format": "channels_last"}
    plane = pool((height, width), (stride_h, stride_w), name=f"{name}_plane", **options)
    line = pool((depth, 1), (stride_d, 1), name=f"{name}_depth", **options)

    def pooled(x: Any) -> Any:
        frames, channels = x.shape[1], x.shape[-1]
        # Pooling works on each channel alone, so the depth can be part of the channels.
        x = layers.Permute((2, 3, 1, 4), name=f"{name}_depth_in")(x)
        x = layers.Reshape((*x.shape[1:3], frames * channels), name=f"{name}_merge")(x)
        x = plane(x)
        rows, columns = x.shape[1:3]
        x = layers.Reshape((rows, columns, frames, channels), name=f"{name}_split")(x)
        x = layers.Permute((3, 1, 2, 4), name=f"{name}_depth_out")(x)
        x = layers.Reshape((frames, rows * columns, channels), name=f"{name}_flat")(x)
        x = line(x)
        return layers.Reshape((x.shape[1], rows, columns, channels), name=name)(x)

    return pooled


def adaptive_pool(layer: Any, name: str) -> Decomposed:
    """Adaptive pooling as pooling with one window size; its output size must divide the input's."""

    def call(x: Any) -> Any:
        size = tuple(x.shape[1:-1])
        wanted = tuple(np.broadcast_to(layer.output_size, len(size)).tolist())
        if any(given % asked for given, asked in zip(size, wanted, strict=True)):
            raise UnsupportedLayerError(
                f"Expected a size that divides {size} in layer '{name}'. Received: output_size="
                f"{wanted}. TFLite pools with windows of one size. Resize the input before the "
                "layer."
            )
        window = tuple(given // asked for given, asked in zip(size, wanted, strict=True))
        kind = type(layer).__name__.removeprefix("Adaptive")
        return getattr(layers, kind)(window, data_format="channels_last", name=name)(x)

    return call


def random_crop(layer: Any, name: str) -> Decomposed:
    """`RandomCrop` of images that have its size already: nothing, in training too."""

    def call(x: Any) -> Any:
        rows = -2 if layer.data_format == "channels_first" else -3
        size, wanted = (x.shape[rows], x.shape[rows + 1]), (layer.height, layer.width)
        if size != wanted:
            raise UnsupportedLayerError(
                f"Expected images of {wanted} in layer '{name}' of type RandomCrop, which crops in "
                f"training and resizes in inference. Received: {size}. Crop before the model."
            )
        return layers.Identity(name=name, dtype=x.dtype)(x)

    return call


def center_crop(layer: Any, name: str) -> Decomposed:
    """`CenterCrop` as a slice of the middle of the image."""

    def call(x: Any) -> Any:
        size, wanted = tuple(x.shape[1:3]), (layer.height, layer.width)
        spare = [given - asked for given, asked in zip(size, wanted, strict=True)]
        if min(spare) < 0:
            raise UnsupportedLayerError(
                f"Expected images of at least {wanted} in layer '{name}'. Received: {size}. "
                "Resize them before this layer."
            )
        edges = [(extra // 2, extra - extra // 2) for extra in spare]
        return layers.Cropping2D(tuple(edges), "channels_last", name=name)(x)

    return call
