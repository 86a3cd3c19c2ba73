"""Cases for layers that become several operators, and for the layers that those are made of."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers as L
from keras import ops

from kqat.parts.elementwise import Elementwise
from kqat.parts.single_op_layers import (
    DepthToSpace,
    IndexOperation,
    Select,
    SpaceToDepth,
    Take,
    ZeroPadding,
)
from tests.coverage.cases import Case, functional

STEPS, IMAGE, VOLUME = (5, 8), (8, 8, 4), (4, 6, 6, 2)


def _one(name: str, shape: tuple[int, ...], call: Callable[[Any], Any], **counts: int) -> Case:
    return Case(name=name, build=lambda: functional(shape, call), ops=counts)


def _two(name: str, shapes: Any, call: Callable[[Any, Any], Any], **counts: int) -> Case:
    def build() -> keras.Model:
        a, b = keras.Input(shapes[0], name="a"), keras.Input(shapes[1], name="b")
        return keras.Model([a, b], call(a, b), name="net")

    return Case(name=name, build=build, ops=counts)


def _attended(layer: L.Layer) -> Callable[[Any], Any]:
    return lambda x: layer([x, L.Dense(8)(x)])


def _padded(x: Any) -> Any:
    """A block of a text encoder: the rows that Keras masks as padding weigh nothing."""
    x = L.Embedding(10, 8, mask_zero=True)(x)
    y = L.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)
    return L.Dense(3)(L.Add()([x, y]))


def _augmented(x: Any) -> Any:
    """Image augmentation between two layers: it changes values in training alone."""
    x = L.RandomContrast(0.2)(L.RandomFlip()(L.Conv2D(3, 3)(x)))
    return L.Conv2D(2, 3)(x)


def _primitives(x: Any) -> list[Any]:
    deep = ZeroPadding([[0, 0], [0, 0], [0, 4]])(SpaceToDepth(2)(x))
    bent = Elementwise.of(lambda t: t * ops.tanh(t))(Take([3, 0, 3], 1)(deep))
    positive = IndexOperation("greater", {"x2": 0.0})(deep)
    return [DepthToSpace(2)(Select()([positive, deep, deep])), bent]


CASES: tuple[Case, ...] = (
    _one(
        "group_norm",
        (4, 4, 8),
        lambda x: L.GroupNormalization(2)(x),
        ADD=1,
        CAST=1,
        DEPTHWISE_CONV_2D=1,
        GATHER=1,
        MEAN=2,
        MUL=2,
        RESHAPE=2,
        SUB=1,
    ),
    _one(
        "instance_norm",
        (6, 8),
        lambda x: L.GroupNormalization(-1, scale=False, center=False)(x),
        ADD=1,
        CAST=1,
        GATHER=1,
        MEAN=2,
        MUL=2,
        RESHAPE=2,
        SUB=1,
    ),
    _one("unit_norm", (4, 8), lambda x: L.UnitNormalization()(x), L2_NORMALIZATION=1),
    _one("spectral_norm", IMAGE, lambda x: L.SpectralNormalization(L.Conv2D(3, 3))(x), CONV_2D=1),
    _one(
        "group_query_attention",
        STEPS,
        lambda x: L.GroupQueryAttention(4, 4, 2, use_bias=False)(x, x),
        BATCH_MATMUL=2,
        FULLY_CONNECTED=4,
        GATHER=2,
        RESHAPE=4,
        SOFTMAX=1,
        TRANSPOSE=4,
    ),
    _one(
        "dot_attention",
        STEPS,
        _attended(L.Attention(use_scale=True)),
        BATCH_MATMUL=2,
        FULLY_CONNECTED=1,
        MUL=1,
        SOFTMAX=1,
        TRANSPOSE=1,
    ),
    _one(
        "concat_attention",
        STEPS,
        _attended(L.Attention(score_mode="concat", use_scale=True)),
        ADD=1,
        BATCH_MATMUL=1,
        FULLY_CONNECTED=1,
        MEAN=1,
        MUL=3,
        RESHAPE=2,
        SOFTMAX=1,
        TANH=1,
    ),
    _one(
        "additive_attention",
        STEPS,
        _attended(L.AdditiveAttention()),
        ADD=1,
        BATCH_MATMUL=1,
        FULLY_CONNECTED=2,
        RESHAPE=3,
        SOFTMAX=1,
        TANH=1,
    ),
    _one(
        "causal_attention",
        STEPS,
        lambda x: L.MultiHeadAttention(2, 4, use_gate=True)(x, x, use_causal_mask=True),
        ADD=1,
        BATCH_MATMUL=2,
        FULLY_CONNECTED=5,
        LOGISTIC=1,
        MUL=1,
        RESHAPE=5,
        SOFTMAX=1,
        TRANSPOSE=4,
    ),
    _one(
        "causal_dot_attention",
        STEPS,
        lambda x: L.Attention()([x, L.Dense(8)(x)], use_causal_mask=True),
        ADD=1,
        BATCH_MATMUL=2,
        FULLY_CONNECTED=1,
        SOFTMAX=1,
        TRANSPOSE=1,
    ),
    Case(
        name="padded_attention",
        build=lambda: functional((6,), _padded, "int32"),
        ops={
            "ADD": 3,
            "BATCH_MATMUL": 2,
            "CAST": 1,
            "FULLY_CONNECTED": 5,
            "GATHER": 2,
            "LOGICAL_AND": 1,
            "NOT_EQUAL": 1,
            "RESHAPE": 7,
            "SOFTMAX": 1,
            "TRANSPOSE": 4,
        },
    ),
    _two("add_square", ((4, 4), (4, 1)), lambda a, b: L.Add()([a, b]), ADD=1),
    _two("dot", ((8,), (8,)), lambda a, b: L.Dot(axes=1)([a, b]), BATCH_MATMUL=1, RESHAPE=3),
    _two(
        "cosine",
        ((8,), (8,)),
        lambda a, b: L.Dot(axes=-1, normalize=True)([a, b]),
        BATCH_MATMUL=1,
        L2_NORMALIZATION=2,
        RESHAPE=3,
    ),
    _two("dot_3d", ((3, 5), (5, 4)), lambda a, b: L.Dot(axes=(2, 1))([a, b]), BATCH_MATMUL=1),
    _one(
        "conv3d",
        VOLUME,
        lambda x: L.Conv3D(3, 3, activation="relu")(x),
        CONCATENATION=1,
        CONV_2D=2,
        RELU=1,
        RESHAPE=7,
        STRIDED_SLICE=2,
        TRANSPOSE=2,
    ),
    _one(
        "conv3d_same",
        (5, 6, 6, 2),
        lambda x: L.Conv3D(3, (3, 2, 2), strides=2, padding="same")(x),
        CONCATENATION=1,
        CONV_2D=3,
        PAD=1,
        RESHAPE=10,
        STRIDED_SLICE=3,
        TRANSPOSE=3,
    ),
    _one(
        "conv1d_transpose",
        (6, 3),
        lambda x: L.Conv1DTranspose(4, 3, strides=2, padding="same", activation="relu")(x),
        RESHAPE=2,
        TRANSPOSE_CONV=1,
    ),
    _one(
        "time_distributed_dense",
        STEPS,
        lambda x: L.TimeDistributed(L.Dense(3))(x),
        FULLY_CONNECTED=1,
    ),
    _one(
        "time_distributed_conv",
        (3, 6, 6, 2),
        lambda x: L.TimeDistributed(L.Conv2D(3, 3, activation="relu"))(x),
        CONCATENATION=1,
        CONV_2D=3,
        RESHAPE=7,
        STRIDED_SLICE=3,
    ),
    _one(
        "time_distributed_layers",
        (3, 5, 2),
        lambda x: L.TimeDistributed(
            keras.Sequential([L.Dense(4, "relu"), L.Flatten(), L.Dense(3)])
        )(x),
        CONCATENATION=1,
        FULLY_CONNECTED=2,
        RESHAPE=1,
        STRIDED_SLICE=3,
    ),
    _one(
        "center_crop",
        IMAGE,
        lambda x: L.CenterCrop(5, 6)(L.RandomCrop(*IMAGE[:2])(x)),
        STRIDED_SLICE=1,
    ),
    _one(
        "adaptive_pools",
        IMAGE,
        lambda x: [L.AdaptiveAveragePooling2D(2)(x), L.AdaptiveMaxPooling2D((4, 2))(x)],
        AVERAGE_POOL_2D=1,
        MAX_POOL_2D=1,
    ),
    _one(
        "adaptive_pools_1d",
        (8, 3),
        lambda x: [L.AdaptiveAveragePooling1D(2)(x), L.AdaptiveMaxPooling1D(4)(x)],
        AVERAGE_POOL_2D=1,
        MAX_POOL_2D=1,
        RESHAPE=3,
    ),
    _one(
        "adaptive_pools_3d",
        VOLUME,
        lambda x: [L.AdaptiveAveragePooling3D(2)(x), L.AdaptiveMaxPooling3D((4, 2, 3))(x * 2.0)],
        AVERAGE_POOL_2D=2,
        MAX_POOL_2D=1,  # the depth is four already
        MUL=1,
        RESHAPE=5,
        TRANSPOSE=3,  # of both inputs at once
    ),
    _one("augmentation", IMAGE, _augmented, CONV_2D=2),
    _one(
        "primitives",
        IMAGE,
        _primitives,
        ADD=1,
        CAST=1,
        DEPTH_TO_SPACE=1,
        GATHER=2,
        GREATER=1,
        PAD=1,
        SELECT_V2=1,
        SPACE_TO_DEPTH=1,
    ),
    _one(
        "einsum_dense_permuted",
        (3, 4),
        lambda x: L.EinsumDense("abc,bd->adc", (5, 4), bias_axes="d")(x),
        ADD=1,
        FULLY_CONNECTED=1,
        TRANSPOSE=2,
    ),
)
