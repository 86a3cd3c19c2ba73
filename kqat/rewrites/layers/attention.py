"""Rewrites attention layers as simple layers that each become one integer operator.

Every intermediate value gets its own quantizer, and so its own range. Matrix products become
FULLY_CONNECTED where one factor is constant, and BATCH_MATMUL elsewhere.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, config_of
from kqat.parts import ConstantKind, Matmul, Take, WithConstant, total
from kqat.rewrites.layers import matrix_products
from kqat.rewrites.layers.attention_masks import Keep, attended, causal, window, zeroed
from kqat.rewrites.layers.basic import Decomposed


def multi_head_attention(layer: Any, name: str) -> Decomposed:
    """`softmax(q k^T / sqrt(d)) v` for each head, with input and output projections.

    `1 / sqrt(d)` is multiplied into the query projection. Reference: Vaswani et al. 2017,
    section 3.2 (https://arxiv.org/abs/1706.03762).
    """
    config = config_of(layer)
    axes = config["attention_axes"]
    if axes in (None, [1], (1,), 1) and _query_rank(layer) == 3:
        return _multi_head(layer, name, config["key_dim"], 1)
    inside = _multi_head(layer, f"{name}_output", config["key_dim"], 1)
    return _over_axes(inside, (axes,) if isinstance(axes, int) else axes, name)


def _query_rank(layer: Any) -> int:
    """The rank of the queries that a built layer takes, its batch among the axes."""
    return int(layer.query_dense.equation.index(","))


def _over_axes(inside: Decomposed, axes: Sequence[int] | None, name: str) -> Decomposed:
    """Attention over some axes of many, by attention over one axis of `(others, steps, features)`.

    Each step of the axes that are not attended to attends by itself. `axes` of `None` are all but
    the batch and the features.
    """

    def call(query: Any, value: Any, key: Any = None, **options: Any) -> Any:
        masks = sorted(
            k for k, v in options.items() if "mask" in k and v is not None and v is not False
        )
        if masks:
            raise UnsupportedLayerError(
                f"Expected no masks in attention layer '{name}', whose query has shape "
                f"{tuple(query.shape)}: masks are known for (batch, steps, features). Received: "
                f"{', '.join(masks)}. Reshape its inputs to (steps, features)."
            )
        middle = range(1, len(query.shape) - 1)
        attended_to = sorted(axes or middle)
        others = [axis for axis in middle if axis not in attended_to]
        order = [*others, *attended_to, len(query.shape) - 1]

        def folded(x: Any, part: str) -> Any:
            if order != sorted(order):
                x = layers.Permute(order, name=f"{name}_{part}_ordered")(x)
            sizes = x.shape[1:-1]
            kept = [math.prod(sizes[: len(others)])] if others else []
            steps = math.prod(sizes[len(others) :])
            shape = (*kept, steps, x.shape[-1])
            if tuple(x.shape[1:]) == shape:
                return x
            return layers.Reshape(shape, name=f"{name}_{part}_steps")(x)

        given = {"value": folded(value, "value")}
        if key is not None and key is not value:
            given["key"] = folded(key, "key")
        steps = given["value"] if query is value else folded(query, "query")
        y = inside(steps, **given, **options)
        sizes = [query.shape[axis] for axis in order[:-1]]
        if order == sorted(order):
            return layers.Reshape((*sizes, y.shape[-1]), name=name)(y)
        y = layers.Reshape((*sizes, y.shape[-1]), name=f"{name}_unfolded")(y)
        return layers.Permute([order.index(axis) + 1 for axis in sorted(order)], name=name)(y)

    return call


def group_query_attention(layer: Any, name: str) -> Decomposed:
    """As `multi_head_attention`, but several query heads share one head of keys and values.

    Reference: Ainslie et al. 2023, section 2.2 (https://arxiv.org/abs/2305.13245).
    """
    config = config_of(layer)
    sharing = config["num_query_heads"] // config["num_key_value_heads"]
    return _multi_head(layer, name, config["head_dim"], sharing)


def _multi_head(layer: Any, name: str, size: int, sharing: int) -> Decomposed:
    """Attention with heads of `size` features; `sharing` query heads share one key head."""
    arrays = {"/".join(v.path.split("/")[-2:]): np.asarray(v) for v in layer.weights}
    options = matrix_products.options(layer, name)
    scale = 1.0 / np.sqrt(size)
    made = {
        part: _projection(arrays, part, 1.0 if part != "query" else scale, name, options)
        for part in ("query", "key", "value")
    }
    out_kernel, out_bias = arrays["attention_output/kernel"], arrays.get("attention_output/bias")
    output = matrix_products.dense(out_kernel, out_bias, 2, name, options)

    def heads(part: str, x: Any) -> Any:
        # Keys go straight to (heads, features, steps), so the product needs no second transpose.
        order = (2, 3, 1) if part == "key" else (2, 1, 3)
        y = made[part](x)
        if len(x.shape) == 4:  # Attention of each row by itself: a head for each row and head.
            y = layers.Permute((1, *(o + 1 for o in order)), name=f"{name}_{part}_rows")(y)
            shape = (y.shape[1] * y.shape[2], *y.shape[3:])
            return layers.Reshape(shape, name=f"{name}_{part}_heads")(y)
        y = layers.Permute(order, name=f"{name}_{part}_heads")(y)
        if sharing == 1 or part == "query":
            return y
        indices = np.repeat(np.arange(y.shape[1]), sharing).tolist()
        return Take(indices, 1, name=f"{name}_{part}_shared")(y)

    def gated(steps: Any, query: Any) -> Any:
        if not config_of(layer).get("use_gate"):
            return steps
        gate = _projection(arrays, "gate", 1.0, name, options)(query)
        gate = layers.Activation("sigmoid", name=f"{name}_gate_sigmoid")(gate)
        return layers.Multiply(name=f"{name}_gated")([steps, gate])

    def call(
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        use_causal_mask: bool = False,
        **options: Any,
    ) -> Any:
        _check_options(options, name)
        sizes, reach = (query.shape[1], value.shape[1]), config_of(layer).get("sliding_window")
        pairs = [attention_mask]
        pairs += [causal(*sizes)] if use_causal_mask else []
        pairs += [window(*sizes, reach)] if reach is not None else []
        masks = [value_mask] if key_mask is value_mask else [value_mask, key_mask]
        keep = Keep.of(name, pairs=pairs, queries=[query_mask], keys=masks)
        keys = heads("key", value if key is None else key)
        scores = Matmul(name=f"{name}_scores")([heads("query", query), keys])
        # Keras computes this in two ways (with and without dropout). They differ for a query
        # whose keys are all masked: weights of zero, or equal weights.
        weights = attended(scores, keep, name, zeros=layer.dropout > 0.0)
        mixed = _mixed(layer, weights, heads("value", value), name, f"{name}_mixed")
        order: tuple[int, ...] = (2, 1, 3)
        if len(query.shape) == 4:
            rows = (query.shape[1], mixed.shape[1] // query.shape[1], *mixed.shape[2:])
            mixed, order = layers.Reshape(rows, name=f"{name}_rows")(mixed), (1, 3, 2, 4)
        steps = layers.Permute(order, name=f"{name}_steps")(mixed)
        return output(gated(steps, query))

    return call


def _mixed(layer: Any, weights: Any, value: Any, name: str, last: str) -> Any:
    if layer.dropout:
        weights = layers.Dropout(layer.dropout, name=f"{name}_dropout")(weights)
    return Matmul(name=last)([weights, value])


def attention(layer: Any, name: str) -> Decomposed:
    """`softmax(scores(q, k)) v` without projections, for both score modes of `Attention`.

    "dot" is `q k^T`, "concat" is `sum(tanh(q + k))`.
    Reference: Luong et al. 2015, section 3.1 (https://arxiv.org/abs/1508.04025).
    """

    def call(inputs: Any, mask: Any = None, use_causal_mask: bool = False, **options: Any) -> Any:
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
        return _attended(layer, scores, value, name, mask, use_causal_mask)

    return call


def additive_attention(layer: Any, name: str) -> Decomposed:
    """`softmax(sum(scale * tanh(q + k))) v`.

    Reference: Bahdanau et al. 2015, appendix A.1.2 (https://arxiv.org/abs/1409.0473).
    """

    def call(inputs: Any, mask: Any = None, use_causal_mask: bool = False, **options: Any) -> Any:
        _check_options(options, name)
        query, value = inputs[:2]
        key = inputs[2] if len(inputs) == 3 else value
        bent = layers.Activation("tanh", name=f"{name}_tanh")(_sums(query, key, name))
        if layer.scale is None:
            scores = total(bent, [3], False, f"{name}_scores")
        else:
            kernel = np.asarray(layer.scale).reshape(-1, 1)
            options = {"trainable": layer.trainable}
            product = matrix_products.dense(kernel, None, 1, f"{name}_product", options)(bent)
            scores = layers.Reshape(product.shape[1:3], name=f"{name}_scores")(product)
        return _attended(layer, scores, value, name, mask, use_causal_mask)

    return call


def _attended(
    layer: Any, scores: Any, value: Any, name: str, mask: Any, use_causal_mask: bool
) -> Any:
    """The values, weighted by `softmax(scores)`; `mask` holds those of queries and of values."""
    pairs = [causal(*scores.shape[1:])] if use_causal_mask else []
    keep = Keep.of(name, pairs=pairs, keys=[mask[1]] if mask else [])
    hidden = mask[0] if mask else None
    # If all keys of a query are masked, Keras adds the same number to all its scores: the
    # weights are equal, not zero.
    weights = attended(scores, keep, name, zeros=False)
    if hidden is None:
        return _mixed(layer, weights, value, name, name)
    queries = Keep.of(f"{name}_query", queries=[hidden])
    return zeroed(_mixed(layer, weights, value, name, f"{name}_mixed"), queries, name)


def _sums(query: Any, key: Any, name: str) -> Any:
    """`q + k` for each pair of steps: (queries, keys, features)."""
    rows = layers.Reshape((query.shape[1], 1, query.shape[2]), name=f"{name}_query_rows")(query)
    columns = layers.Reshape((1, *key.shape[1:]), name=f"{name}_key_columns")(key)
    return layers.Add(name=f"{name}_pairs")([rows, columns])


def _times(x: Any, variable: Any, name: str) -> Any:
    """`x` times a scalar variable, which training still updates; `None` stands for one."""
    if variable is None:
        return x
    factor = WithConstant(ConstantKind.MULTIPLY, [], name=name, trainable=variable.trainable)
    return Part(factor, [np.asarray(variable, np.float32).reshape(())])(x)


def _projection(
    arrays: dict[str, np.ndarray], part: str, scale: float, name: str, options: dict[str, Any]
) -> Decomposed:
    kernel, bias = arrays[f"{part}/kernel"] * scale, arrays.get(f"{part}/bias")
    bias = None if bias is None else (bias * scale).astype(np.float32)
    scaled = ["kernel"] if bias is None else ["kernel", "bias"]
    penalized = [one for one in scaled if options[f"{one}_regularizer"]]
    if scale != 1.0 and penalized:
        raise UnsupportedLayerError(
            f"Expected no {penalized[0]}_regularizer in attention layer '{name}': kqat multiplies "
            f"its query {penalized[0]} by 1/sqrt(key_dim). Remove the regularizer."
        )
    return matrix_products.dense(kernel.astype(np.float32), bias, 1, f"{name}_{part}", options)


def _check_options(options: dict[str, Any], name: str) -> None:
    asked = {k: v for k, v in options.items() if v is not None and v is not False}
    asked.pop("training", None)
    if asked:
        raise UnsupportedLayerError(
            f"Expected no call arguments but masks for attention layer '{name}'. Received: "
            f"{sorted(asked)}. Leave them out of the call."
        )
