"""Rewrites `keras.ops` functions that Keras also has as layers: convolution, pooling, attention."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, is_tensor, option
from kqat.parts import Take
from kqat.rewrites.layers import matrix_products
from kqat.rewrites.layers.attention_masks import Keep, attended, causal, hidden_scores
from kqat.rewrites.layers.channels_first import operation_in_either_format as _either
from kqat.rewrites.operations.binary import Row
from kqat.rewrites.operations.patches import extract_patches
from kqat.rewrites.operations.reductions import along_last


def _softmax(kind: str) -> Row:
    return along_last(lambda x, name: layers.Activation(kind, name=name)(x))


def _resize(operation: Any, name: str) -> Callable[..., Any]:
    options = ("antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio", "data_format")
    return layers.Resizing(
        *operation.size,
        interpolation=operation.interpolation,
        name=name,
        **{option: getattr(operation, option) for option in options},
    )


def _pool(kind: str) -> Row:
    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            options = {"data_format": operation.data_format, "name": name}
            pool = getattr(layers, f"{kind}Pooling{len(x.shape) - 2}D")
            return pool(operation.pool_size, operation.strides, operation.padding, **options)(x)

        return call

    return row


def _glu(operation: Any, name: str) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        value, gate = ops.split(x, 2, axis=operation.axis)
        return layers.Multiply(name=name)([value, ops.sigmoid(gate)])

    return call


def _adaptive_pool(kind: str) -> Row:
    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any) -> Any:
            pool = getattr(layers, f"Adaptive{kind}Pooling{len(x.shape) - 2}D")
            return pool(operation.output_size, data_format=operation.data_format, name=name)(x)

        return call

    return row


def _conv(kind: str) -> Row:
    """`conv`, `depthwise_conv` and `conv_transpose` with a constant or trainable kernel."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(x: Any, kernel: Any) -> Any:
            if is_tensor(kernel):
                raise UnsupportedLayerError(
                    f"Expected a constant or a variable as kernel of operation '{name}'. Received: "
                    "a tensor. Integer kernels take constant weights only. Leave it float, or make "
                    "the kernel a variable."
                )
            trained = isinstance(kernel, keras.Variable) and kernel.trainable
            array = np.asarray(kernel, np.float32)
            axes = len(x.shape) - 2
            class_name = f"{kind}{axes}D"
            if kind == "ConvTranspose":
                class_name = f"Conv{axes}DTranspose"
                own = {"filters": array.shape[-2], "output_padding": operation.output_padding}
            elif kind == "DepthwiseConv":
                own = {"depth_multiplier": array.shape[-1]}
            else:
                own = {"filters": array.shape[-1], "groups": x.shape[-1] // array.shape[-2]}
            layer = getattr(layers, class_name)(
                kernel_size=array.shape[:-2],
                strides=operation.strides,
                padding=operation.padding,
                dilation_rate=operation.dilation_rate,
                data_format=operation.data_format,
                use_bias=False,
                trainable=trained,
                name=name,
                **own,
            )
            return Part(layer, [array])(x)

        return call

    return row


def _grayscale(operation: Any, name: str) -> Callable[..., Any]:
    """ITU-R BT.601 luma, as Keras has it."""

    def call(images: Any) -> Any:
        kernel = np.array([[0.2989], [0.5870], [0.1140]], np.float32)
        return matrix_products.einsum("...y,yz->...z", images, kernel, name)

    return call


def _filtered(images: Any, kernels: np.ndarray, padding: str, name: str) -> Any:
    """Each channel by itself, by fixed kernels of shape `(rows, columns, kernels)`."""
    array = np.repeat(kernels[:, :, None], images.shape[-1], axis=2).astype(np.float32)
    layer = layers.DepthwiseConv2D(
        kernel_size=array.shape[:2], depth_multiplier=array.shape[-1], padding=padding,
        data_format="channels_last", use_bias=False, trainable=False, name=name,
    )  # fmt: skip
    return Part(layer, [array])(images)


def _check_images(operation: Any, images: Any, name: str) -> None:
    if operation.data_format != "channels_last" or len(images.shape) != 4:
        raise UnsupportedLayerError(
            f"Expected batches of images with data_format='channels_last' in operation '{name}'. "
            f"Received: shape {tuple(images.shape)} and {operation.data_format}. Permute before it."
        )


def _blur(operation: Any, name: str) -> Callable[..., Any]:
    """A Gaussian of fixed width, cut off at the size of the kernel."""

    def call(images: Any) -> Any:
        _check_images(operation, images, name)
        places = [np.arange(size) - (size - 1) / 2 for size in operation.kernel_size]
        bells = [np.exp(-0.5 * (x / s) ** 2) for x, s in zip(places, operation.sigma, strict=True)]
        across, down = (bell / bell.sum() for bell in bells)
        kernel = np.outer(down, across).reshape(*operation.kernel_size, 1)
        return _filtered(images, kernel, "same", name)

    return call


def _sobel(operation: Any, name: str) -> Callable[..., Any]:
    """Differences down and across, of images that are mirrored at their borders."""

    def call(images: Any) -> Any:
        _check_images(operation, images, name)
        down = np.outer([-1, 0, 1], [1, 2, 1])
        borders = ((0, 0), (1, 1), (1, 1), (0, 0))
        wider = ops.pad(images, borders, mode="reflect")
        edges = _filtered(wider, np.stack([down, down.T], axis=-1), "valid", f"{name}_edges")
        return layers.Reshape((*images.shape[1:], 2), name=name)(edges)

    return call


def _margins(operation: Any, shape: Any, ending: str, sign: int) -> list[tuple[int, int]]:
    """What `crop_images` (sign -1) or `pad_images` (1) takes away or adds at each side."""
    height, width = shape[1:3]
    pairs = []
    for size, target, ends in (
        (height, operation.target_height, ("top", "bottom")),
        (width, operation.target_width, ("left", "right")),
    ):
        first, last = (getattr(operation, f"{end}_{ending}") for end in ends)
        rest = 0 if target is None else sign * (target - size)
        pairs.append(
            (rest - last if first is None else first, rest - first if last is None else last)
        )
    return pairs


def _framed(kind: type, ending: str, sign: int) -> Row:
    """`crop_images` and `pad_images` as the layer of that kind."""

    def row(operation: Any, name: str) -> Callable[..., Any]:
        def call(images: Any) -> Any:
            margins = tuple(_margins(operation, images.shape, ending, sign))
            return kind(margins, "channels_last", name=name)(images)

        return call

    return row


def _fft2(operation: Any, name: str) -> Callable[..., Any]:
    """The two-dimensional Fourier transform of real numbers, as products with its matrices."""

    def call(x: Any) -> Any:
        real, imaginary = x
        if is_tensor(imaginary) or np.any(np.asarray(imaginary)) or len(real.shape) != 3:
            raise UnsupportedLayerError(
                f"Expected real numbers of shape (batch, rows, columns) in operation '{name}' of "
                "type FFT2. Received: an imaginary part that is not zero, or another rank. "
                "Transform both parts apart and add them, or reshape."
            )
        rows, columns = (_fourier(int(size)) for size in real.shape[1:])
        parts = {
            f"{kind}_{other}": matrix_products.einsum(
                "xy,byz->bxz",
                a,
                matrix_products.einsum("...y,yz->...z", real, b, f"{name}_columns_{kind}_{other}"),
                f"{name}_{kind}_{other}",
            )
            for kind, a in zip(("cos", "sin"), rows, strict=True)
            for other, b in zip(("cos", "sin"), columns, strict=True)
        }
        even = layers.Subtract(name=name)([parts["cos_cos"], parts["sin_sin"]])
        odd = layers.Add(name=f"{name}_sum")([parts["sin_cos"], parts["cos_sin"]])
        return even, layers.Rescaling(-1.0, name=f"{name}_imaginary")(odd)

    return call


def _fourier(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the discrete Fourier transform."""
    angles = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _normalize(operation: Any, name: str) -> Callable[..., Any]:
    if operation.order != 2 or operation.epsilon not in (None, keras.config.epsilon()):
        raise UnsupportedLayerError(
            f"Expected order=2 and the usual epsilon in operation '{name}'. Received: "
            f"order={operation.order}, epsilon={operation.epsilon}. Compute the norm with other "
            "operations and divide by it."
        )
    return layers.UnitNormalization(axis=operation.axis, name=name)


def _dot_product_attention(operation: Any, name: str) -> Callable[..., Any]:
    def shared(x: Any, heads: int, part: str) -> Any:
        """Keys or values, those of one head for a group of the queries' heads."""
        if x.shape[2] == heads:
            return x
        indices = np.repeat(np.arange(x.shape[2]), heads // x.shape[2]).tolist()
        return Take(indices, 2, name=f"{name}_{part}_shared")(x)

    def call(
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        scale: Any = None,
        **options: Any,
    ) -> Any:
        options.pop("flash_attention", None)  # a faster way to compute the same
        cap = option(operation, "attn_logits_soft_cap", options.pop("attn_logits_soft_cap", None))
        if unknown := sorted(k for k, v in options.items() if v not in (None, False)):
            raise UnsupportedLayerError(
                f"Expected a bias, a mask and a scale as options of operation '{name}'. Received: "
                f"{unknown} too. Leave them out."
            )
        if cap is not None:
            raise UnsupportedLayerError(
                f"Expected no cap of the scores in operation '{name}'. Received: "
                f"attn_logits_soft_cap={cap}, which Keras computes on JAX alone. Compute the "
                "scores with einsum and tanh."
            )
        if scale is None:
            scale = 1.0 / float(np.sqrt(query.shape[-1]))
        key, value = (
            shared(x, query.shape[2], part) for x, part in ((key, "key"), (value, "value"))
        )
        scores = matrix_products.einsum("bqhd,bkhd->bhqk", query, key, f"{name}_scores")
        scores = ops.multiply(scores, scale)
        if bias is not None:
            scores = ops.add(scores, bias)
        if mask is not None:
            scores = hidden_scores(scores, mask, name)
        pairs = [causal(query.shape[1], key.shape[1])] if operation.is_causal else []
        weights = attended(scores, Keep.of(name, pairs=pairs), name, zeros=False)
        return matrix_products.einsum("bhqk,bkhd->bqhd", weights, value, name)

    return call


NETWORKS: dict[str, Row] = {
    "Softmax": _softmax("softmax"),
    "LogSoftmax": _softmax("log_softmax"),
    "Glu": _glu,
    "Resize": _either(_resize),
    "ExtractPatches": _either(extract_patches),
    "FFT2": _fft2,
    "RGBToGrayscale": _either(_grayscale),
    "GaussianBlur": _either(_blur),
    "SobelEdges": _sobel,
    "CropImages": _either(_framed(layers.Cropping2D, "cropping", -1)),
    "PadImages": _either(_framed(layers.ZeroPadding2D, "padding", 1)),
    "MaxPool": _either(_pool("Max")),
    "AveragePool": _either(_pool("Average")),
    "AdaptiveMaxPool": _either(_adaptive_pool("Max")),
    "AdaptiveAveragePool": _either(_adaptive_pool("Average")),
    "Conv": _either(_conv("Conv")),
    "DepthwiseConv": _either(_conv("DepthwiseConv")),
    "ConvTranspose": _either(_conv("ConvTranspose")),
    "Normalize": _normalize,
    "DotProductAttention": _dot_product_attention,
}
