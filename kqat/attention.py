"""Normalization over features and attention as layers with one integer operator each.

Quantizers stand between the parts, so every intermediate value has a range of its own. Matrix
products become FULLY_CONNECTED and BATCH_MATMUL, the reciprocal square root a table.
"""

from typing import Any

import numpy as np
from keras import layers

from kqat import products
from kqat.decompositions import Decomposed, Part
from kqat.errors import UnsupportedLayerError
from kqat.primitives import ChannelAffine, Matmul, ReciprocalSquareRoot, Reduce


def layer_normalization(layer: Any, name: str) -> Decomposed:
    """`(x - mean) / sqrt(variance + epsilon) * gamma + beta` over the last axis.

    Reference: Ba et al. 2016, section 3 (https://arxiv.org/abs/1607.06450).
    """
    _check_last_axis(layer, name)
    if layer.get_config().get("rms_scaling"):
        raise UnsupportedLayerError(
            f"Expected rms_scaling=False in layer '{name}'. Received: True. Use RMSNormalization."
        )
    affine = _channel_affine(layer, name, layer.scale, layer.center)

    def call(x: Any) -> Any:
        mean = Reduce("mean", [len(x.shape) - 1], name=f"{name}_mean")(x)
        centered = layers.Subtract(name=f"{name}_centered")([x, mean])
        return _scaled_to_unit(centered, layer.epsilon, affine, name)

    return call


def rms_normalization(layer: Any, name: str) -> Decomposed:
    """`x / sqrt(mean(x**2) + epsilon) * gamma` over the last axis.

    Reference: Zhang & Sennrich 2019, section 4 (https://arxiv.org/abs/1910.07467).
    """
    _check_last_axis(layer, name)
    affine = _channel_affine(layer, name, True, False)
    return lambda x: _scaled_to_unit(x, layer.epsilon, affine, name)


def _scaled_to_unit(x: Any, epsilon: float, affine: Part | None, name: str) -> Any:
    square = layers.Multiply(name=f"{name}_square")([x, x])
    variance = Reduce("mean", [len(x.shape) - 1], name=f"{name}_variance")(square)
    scale = ReciprocalSquareRoot(epsilon, name=f"{name}_rsqrt")(variance)
    unit_name = f"{name}_unit" if affine else name
    unit = layers.Multiply(name=unit_name)([x, scale])
    return affine(unit) if affine else unit


def _channel_affine(layer: Any, name: str, scale: bool, center: bool) -> Part | None:
    """The layer's own gamma and beta, as far as it has them."""
    if not scale and not center:
        return None
    config = layer.get_config()
    options = {
        key: config.get(key)
        for key in (
            "gamma_regularizer",
            "beta_regularizer",
            "gamma_constraint",
            "beta_constraint",
        )
    }
    affine = ChannelAffine(scale, center, name=name, trainable=layer.trainable, **options)
    return Part(affine, layer.get_weights())


def _check_last_axis(layer: Any, name: str) -> None:
    axis = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    rank = len(layer.input.shape)
    if [a % rank for a in axis] != [rank - 1]:
        raise UnsupportedLayerError(
            f"Expected normalization over the last axis in layer '{name}'. Received: "
            f"axis={layer.axis}. Permute the input."
        )


def multi_head_attention(layer: Any, name: str) -> Decomposed:
    """`softmax(q k^T / sqrt(d)) v` for each head, projected in and out.

    `1 / sqrt(d)` is multiplied into the query projection. Reference: Vaswani et al. 2017,
    section 3.2 (https://arxiv.org/abs/1706.03762).
    """
    config = layer.get_config()
    if config["attention_axes"] not in (None, [1], (1,), 1):
        raise UnsupportedLayerError(
            f"Expected attention over one axis in layer '{name}'. Received: "
            f"attention_axes={config['attention_axes']}. Reshape to (steps, features)."
        )
    arrays = {"/".join(v.path.split("/")[-2:]): np.asarray(v) for v in layer.weights}
    options = products.options(layer, name)
    scale = 1.0 / np.sqrt(config["key_dim"])
    made = {
        part: _projection(arrays, part, 1.0 if part != "query" else scale, name, options)
        for part in ("query", "key", "value")
    }
    out_kernel, out_bias = arrays["attention_output/kernel"], arrays.get("attention_output/bias")
    output = products.dense(out_kernel, out_bias, 2, name, options)
    dropout = layers.Dropout(config["dropout"], name=f"{name}_dropout")

    def call(query: Any, value: Any, key: Any = None, **options: Any) -> Any:
        _check_options(options, name)
        given = {"query": query, "key": value if key is None else key, "value": value}
        # Keys are transposed once: to (heads, features, steps).
        orders = {"query": (2, 1, 3), "key": (2, 3, 1), "value": (2, 1, 3)}
        heads = {
            part: layers.Permute(orders[part], name=f"{name}_{part}_heads")(made[part](x))
            for part, x in given.items()
        }
        scores = Matmul(name=f"{name}_scores")([heads["query"], heads["key"]])
        weights = layers.Softmax(name=f"{name}_weights")(scores)
        if config["dropout"]:
            weights = dropout(weights)
        mixed = Matmul(name=f"{name}_mixed")([weights, heads["value"]])
        return output(layers.Permute((2, 1, 3), name=f"{name}_steps")(mixed))

    return call


def _projection(
    arrays: dict[str, np.ndarray], part: str, scale: float, name: str, options: dict[str, Any]
) -> Decomposed:
    kernel, bias = arrays[f"{part}/kernel"] * scale, arrays.get(f"{part}/bias")
    bias = None if bias is None else (bias * scale).astype(np.float32)
    if scale != 1.0 and options["kernel_regularizer"]:
        raise UnsupportedLayerError(
            f"Expected no kernel_regularizer in attention layer '{name}': 1/sqrt(key_dim) is "
            "multiplied into its query kernel. Train without."
        )
    return products.dense(kernel.astype(np.float32), bias, 1, f"{name}_{part}", options)


def _check_options(options: dict[str, Any], name: str) -> None:
    asked = {k: v for k, v in options.items() if v is not None and v is not False}
    asked.pop("training", None)
    if asked:
        raise UnsupportedLayerError(
            f"Expected plain attention in layer '{name}'. Received: {sorted(asked)}. Integer "
            "kernels know no masks; pad to a fixed length and leave them out."
        )
