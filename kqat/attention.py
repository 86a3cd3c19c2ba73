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
from kqat.primitives import (
    ChannelAffine,
    Matmul,
    ReciprocalSquareRoot,
    Reduce,
    Take,
    WithConstant,
    total,
)


def layer_normalization(layer: Any, name: str) -> Decomposed:
    """`(x - mean) / sqrt(variance + epsilon) * gamma + beta` over the last axis.

    Reference: Ba et al. 2016, section 3 (https://arxiv.org/abs/1607.06450).
    """
    _check_last_axis(layer, name)
    if layer.get_config().get("rms_scaling"):
        raise UnsupportedLayerError(
            f"Expected rms_scaling=False in layer '{name}'. Received: True. Use RMSNormalization."
        )
    affine = channel_affine(layer, name, layer.scale, layer.center)

    def call(x: Any) -> Any:
        mean = Reduce("mean", [len(x.shape) - 1], name=f"{name}_mean")(x)
        centered = layers.Subtract(name=f"{name}_centered")([x, mean])
        return _unit(centered, layer.epsilon, affine, name)

    return call


def _unit(x: Any, epsilon: float, affine: Part | None, name: str) -> Any:
    axes = [len(x.shape) - 1]
    if affine is None:
        return scaled_to_unit(x, epsilon, name, axes)
    return affine(scaled_to_unit(x, epsilon, f"{name}_unit", axes))


def rms_normalization(layer: Any, name: str) -> Decomposed:
    """`x / sqrt(mean(x**2) + epsilon) * gamma` over the last axis.

    Reference: Zhang & Sennrich 2019, section 4 (https://arxiv.org/abs/1910.07467).
    """
    _check_last_axis(layer, name)
    affine = channel_affine(layer, name, True, False)
    return lambda x: _unit(x, layer.epsilon, affine, name)


def scaled_to_unit(x: Any, epsilon: float, name: str, axes: list[int]) -> Any:
    """`x / sqrt(mean(x**2) + epsilon)`, the mean over `axes`."""
    square = layers.Multiply(name=f"{name}_square")([x, x])
    variance = Reduce("mean", axes, name=f"{name}_variance")(square)
    scale = ReciprocalSquareRoot(epsilon, name=f"{name}_rsqrt")(variance)
    return layers.Multiply(name=name)([x, scale])


def channel_affine(layer: Any, name: str, scale: bool, center: bool) -> Part | None:
    """A layer's own gamma and beta, as far as it has them."""
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
    return _multi_head(layer, name, config["key_dim"], 1)


def group_query_attention(layer: Any, name: str) -> Decomposed:
    """As `multi_head_attention`, with several query heads to each head of keys and values.

    Reference: Ainslie et al. 2023, section 2.2 (https://arxiv.org/abs/2305.13245).
    """
    config = layer.get_config()
    sharing = config["num_query_heads"] // config["num_key_value_heads"]
    return _multi_head(layer, name, config["head_dim"], sharing)


def _multi_head(layer: Any, name: str, size: int, sharing: int) -> Decomposed:
    """Attention with heads of `size` features, `sharing` query heads to each key head."""
    arrays = {"/".join(v.path.split("/")[-2:]): np.asarray(v) for v in layer.weights}
    options = products.options(layer, name)
    scale = 1.0 / np.sqrt(size)
    made = {
        part: _projection(arrays, part, 1.0 if part != "query" else scale, name, options)
        for part in ("query", "key", "value")
    }
    out_kernel, out_bias = arrays["attention_output/kernel"], arrays.get("attention_output/bias")
    output = products.dense(out_kernel, out_bias, 2, name, options)

    def heads(part: str, x: Any) -> Any:
        # Keys are transposed once: to (heads, features, steps).
        order = (2, 3, 1) if part == "key" else (2, 1, 3)
        y = layers.Permute(order, name=f"{name}_{part}_heads")(made[part](x))
        if sharing == 1 or part == "query":
            return y
        indices = np.repeat(np.arange(y.shape[1]), sharing).tolist()
        return Take(indices, 1, name=f"{name}_{part}_shared")(y)

    def call(query: Any, value: Any, key: Any = None, **options: Any) -> Any:
        _check_options(options, name)
        keys = heads("key", value if key is None else key)
        scores = Matmul(name=f"{name}_scores")([heads("query", query), keys])
        mixed = _mixed(layer, scores, heads("value", value), name, f"{name}_mixed")
        return output(layers.Permute((2, 1, 3), name=f"{name}_steps")(mixed))

    return call


def _mixed(layer: Any, scores: Any, value: Any, name: str, last: str) -> Any:
    weights = layers.Softmax(name=f"{name}_weights")(scores)
    if layer.dropout:
        weights = layers.Dropout(layer.dropout, name=f"{name}_dropout")(weights)
    return Matmul(name=last)([weights, value])


def attention(layer: Any, name: str) -> Decomposed:
    """`softmax(scores(q, k)) v` without projections: Luong's scores, or `Attention`'s others.

    Reference: Luong et al. 2015, section 3.1 (https://arxiv.org/abs/1508.04025).
    """

    def call(inputs: Any, **options: Any) -> Any:
        _check_options(options, name)
        query, value = inputs[:2]
        key = inputs[2] if len(inputs) == 3 else value
        if layer.score_mode == "dot":
            turned = layers.Permute((2, 1), name=f"{name}_key")(key)
            scores = Matmul(name=f"{name}_scores")([query, turned])
            scores = _times(scores, layer.scale, f"{name}_scaled")
        else:
            pairs = _times(_sums(query, key, name), layer.scale, f"{name}_scaled")
            bent = layers.Activation("tanh", name=f"{name}_tanh")(pairs)
            scores = total(bent, [3], False, f"{name}_scores")
            scores = _times(scores, layer.concat_score_weight, f"{name}_weighted")
        return _mixed(layer, scores, value, name, name)

    return call


def additive_attention(layer: Any, name: str) -> Decomposed:
    """`softmax(sum(scale * tanh(q + k))) v`.

    Reference: Bahdanau et al. 2015, appendix A.1.2 (https://arxiv.org/abs/1409.0473).
    """

    def call(inputs: Any, **options: Any) -> Any:
        _check_options(options, name)
        query, value = inputs[:2]
        key = inputs[2] if len(inputs) == 3 else value
        bent = layers.Activation("tanh", name=f"{name}_tanh")(_sums(query, key, name))
        if layer.scale is None:
            scores = total(bent, [3], False, f"{name}_scores")
        else:
            kernel = np.asarray(layer.scale).reshape(-1, 1)
            options = {"trainable": layer.trainable}
            product = products.dense(kernel, None, 1, f"{name}_product", options)(bent)
            scores = layers.Reshape(product.shape[1:3], name=f"{name}_scores")(product)
        return _mixed(layer, scores, value, name, name)

    return call


def _sums(query: Any, key: Any, name: str) -> Any:
    """`q + k` for each pair of steps: (queries, keys, features)."""
    rows = layers.Reshape((query.shape[1], 1, query.shape[2]), name=f"{name}_query_rows")(query)
    columns = layers.Reshape((1, *key.shape[1:]), name=f"{name}_key_columns")(key)
    return layers.Add(name=f"{name}_pairs")([rows, columns])


def _times(x: Any, variable: Any, name: str) -> Any:
    """`x` times a variable of one number, which stays trained; `None` is one."""
    if variable is None:
        return x
    factor = WithConstant("multiply", [], name=name, trainable=variable.trainable)
    return Part(factor, [np.asarray(variable, np.float32).reshape(())])(x)


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
