"""Cases for layers: at least one for every row of the registry."""

from collections.abc import Callable, Mapping
from typing import Any

from keras import layers as L
from keras import ops

from kqat.parts.single_op_layers import (
    ChannelAffine,
    Clip,
    Matmul,
    ReciprocalSquareRoot,
    Slice,
    SquaredDifference,
)
from tests.coverage.cases import Case, functional

VECTOR, ROWS, IMAGE, VOLUME = (8,), (8, 3), (8, 8, 3), (4, 6, 8, 3)


def _one(name: str, shape: tuple[int, ...], call: Callable[[Any], Any], **ops: int) -> Case:
    return Case(name=name, build=lambda: functional(shape, call), ops=ops)


def _bn(x: Any) -> Any:
    return L.BatchNormalization()(x)


def _conv(x: Any, filters: int = 3) -> Any:
    return L.Conv2D(filters, 1)(x)


WEIGHTED = (
    _one("dense", VECTOR, lambda x: L.Dense(4)(x), FULLY_CONNECTED=1),
    _one("dense_3d", (5, 8), lambda x: L.Dense(4, "relu")(x), FULLY_CONNECTED=1),
    _one("dense_4d", (3, 5, 8), lambda x: L.Dense(4, use_bias=False)(x), FULLY_CONNECTED=1),
    _one("dense_5d", VOLUME, lambda x: L.Dense(4, "relu")(x), FULLY_CONNECTED=1),
    _one("dense_bn", VECTOR, lambda x: _bn(L.Dense(4)(x)), FULLY_CONNECTED=1),
    _one(
        "dense_relu_bn",
        VECTOR,
        lambda x: _bn(L.Dense(4, "relu")(x)),
        FULLY_CONNECTED=1,
        DEPTHWISE_CONV_2D=1,
        RESHAPE=2,
    ),
    _one("conv1d", (10, 3), lambda x: L.Conv1D(4, 3)(x), CONV_2D=1, RESHAPE=2),
    _one(
        "conv1d_causal",
        (10, 3),
        lambda x: L.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu6")(x),
        CONV_2D=1,
        PAD=1,
        RESHAPE=2,
    ),
    _one(
        "conv1d_bn_relu",
        (10, 3),
        lambda x: L.ReLU()(_bn(L.Conv1D(4, 3, use_bias=False)(x))),
        CONV_2D=1,
        RESHAPE=2,
    ),
    _one("conv2d", IMAGE, lambda x: L.Conv2D(4, 3, strides=2, padding="same")(x), CONV_2D=1),
    _one(
        "conv2d_dilated_bn",
        IMAGE,
        lambda x: _bn(L.Conv2D(4, 3, dilation_rate=2, padding="same")(x)),
        CONV_2D=1,
    ),
    _one("conv2d_groups", (8, 8, 4), lambda x: L.Conv2D(4, 3, groups=2)(x), CONV_2D=1),
    _one("conv2d_bn_relu6", IMAGE, lambda x: L.ReLU(6.0)(_bn(L.Conv2D(4, 3)(x))), CONV_2D=1),
    _one(
        "conv2d_relu_bn",
        IMAGE,
        lambda x: _bn(L.Conv2D(4, 3, activation="relu")(x)),
        CONV_2D=1,
        DEPTHWISE_CONV_2D=1,
    ),
    _one(
        "depthwise1d",
        (10, 3),
        lambda x: L.DepthwiseConv1D(3, depth_multiplier=2)(x),
        DEPTHWISE_CONV_2D=1,
        RESHAPE=2,
    ),
    _one(
        "depthwise2d",
        IMAGE,
        lambda x: L.DepthwiseConv2D(3, depth_multiplier=2, activation="relu")(x),
        DEPTHWISE_CONV_2D=1,
    ),
    _one(
        "depthwise2d_dilated_bn",
        IMAGE,
        lambda x: _bn(L.DepthwiseConv2D(3, dilation_rate=2)(x)),
        DEPTHWISE_CONV_2D=1,
    ),
    _one(
        "depthwise2d_one_channel",
        (8, 8, 1),
        lambda x: L.DepthwiseConv2D(3, depth_multiplier=4)(x),
        DEPTHWISE_CONV_2D=1,
    ),
    _one(
        "separable1d",
        (10, 3),
        lambda x: L.SeparableConv1D(4, 3)(x),
        CONV_2D=1,
        DEPTHWISE_CONV_2D=1,
        RESHAPE=2,
    ),
    _one(
        "separable2d",
        IMAGE,
        lambda x: L.SeparableConv2D(4, 3, activation="relu")(x),
        CONV_2D=1,
        DEPTHWISE_CONV_2D=1,
    ),
    _one(
        "separable2d_bn",
        IMAGE,
        lambda x: _bn(L.SeparableConv2D(4, 3, use_bias=False)(x)),
        CONV_2D=1,
        DEPTHWISE_CONV_2D=1,
    ),
    _one(
        "transpose2d",
        IMAGE,
        lambda x: L.Conv2DTranspose(4, 3, strides=2, padding="same")(x),
        TRANSPOSE_CONV=1,
    ),
    _one(
        "transpose2d_relu",
        IMAGE,
        lambda x: L.Conv2DTranspose(4, 3, strides=2, activation="relu")(x),
        TRANSPOSE_CONV=1,
    ),
    _one(
        "transpose2d_bn_relu6",
        IMAGE,
        lambda x: L.ReLU(6.0)(_bn(L.Conv2DTranspose(4, 3, strides=2)(x))),
        TRANSPOSE_CONV=1,
    ),
    _one("prelu_vector", VECTOR, lambda x: L.PReLU()(x), PRELU=1),
    _one(
        "prelu_shared", IMAGE, lambda x: L.PReLU(shared_axes=[1, 2])(_conv(x)), CONV_2D=1, PRELU=1
    ),
)

AFFINE = (
    _one("bn_vector", VECTOR, _bn, DEPTHWISE_CONV_2D=1, RESHAPE=2),
    _one("bn_rows", (5, 8), _bn, DEPTHWISE_CONV_2D=1, RESHAPE=2),
    _one("bn_image", IMAGE, _bn, DEPTHWISE_CONV_2D=1),
    _one("bn_volume", VOLUME, _bn, DEPTHWISE_CONV_2D=1, RESHAPE=2),
    _one("bn_relu", IMAGE, lambda x: L.ReLU()(_bn(x)), DEPTHWISE_CONV_2D=1),
    _one(
        "rescaling_offset",
        IMAGE,
        lambda x: _conv(L.Rescaling(1 / 127.5, -1.0)(x)),
        CONV_2D=1,
    ),
    _one("rescaling", IMAGE, lambda x: _conv(L.Rescaling(1 / 127.5)(x)), CONV_2D=1),
    _one(
        "normalization",
        IMAGE,
        lambda x: L.Normalization(mean=[1.0, 2, 3], variance=[1.0, 2, 3])(x),
        DEPTHWISE_CONV_2D=1,
    ),
    _one(  # as keras.applications writes it
        "normalization_axis",
        IMAGE,
        lambda x: L.Normalization(axis=3, mean=[1.0, 2, 3], variance=[1.0, 2, 3])(x),
        DEPTHWISE_CONV_2D=1,
    ),
    _one(
        "normalization_scalar",
        (4,),
        lambda x: L.Normalization(mean=1.0, variance=4.0, axis=None)(x),
        DEPTHWISE_CONV_2D=1,
        RESHAPE=2,
    ),
)

# Functions without an int8 operator of their own are looked up in a table of 256 entries.
TABLE = {"CAST": 1, "ADD": 1, "GATHER": 1}
ACTIVATION_OPS: dict[str, Mapping[str, int]] = {
    "relu": {"RELU": 1},
    "relu6": {"RELU": 1},
    "leaky_relu": {"PRELU": 1},
    "elu": {"ELU": 1},
    "hard_tanh": {"QUANTIZE": 1},
    "hard_silu": {"HARD_SWISH": 1},
    "silu": {"LOGISTIC": 1, "MUL": 1},
    "sigmoid": {"LOGISTIC": 1},
    "softmax": {"SOFTMAX": 1},
    "tanh": {"TANH": 1},
    "log_softmax": {"LOG_SOFTMAX": 1},
    **dict.fromkeys(
        (
            "gelu", "exponential", "celu", "hard_shrink", "hard_sigmoid",
            "log_sigmoid", "mish", "selu", "soft_shrink", "softplus", "softsign", "sparse_plus",
            "sparse_sigmoid", "squareplus", "tanh_shrink",
        ),
        TABLE,
    ),
}  # fmt: skip


def _activation(kind: str) -> Callable[[Any], Any]:
    return lambda x: L.Activation(kind)(x)


ACTIVATION = (
    *(
        _one(f"activation_{kind}", VECTOR, _activation(kind), **ops)
        for kind, ops in ACTIVATION_OPS.items()
    ),
    _one(
        "activation_linear",
        VECTOR,
        lambda x: L.Dense(4)(L.Activation("linear")(x)),
        FULLY_CONNECTED=1,
    ),
    _one("relu", VECTOR, lambda x: L.ReLU()(x), RELU=1),
    _one("relu6", VECTOR, lambda x: L.ReLU(6.0)(x), RELU=1),
    _one("relu_slope", VECTOR, lambda x: L.ReLU(negative_slope=0.1)(x), PRELU=1),
    _one("leaky_relu", VECTOR, lambda x: L.LeakyReLU(0.1)(x), PRELU=1),
    _one("elu", VECTOR, lambda x: L.ELU()(x), ELU=1),
    _one(
        "softmax",
        (4, 8),
        lambda x: L.Softmax()(L.Dense(8)(x)),
        FULLY_CONNECTED=1,
        SOFTMAX=1,
    ),
)

POOL = (
    _one("max_pool1d", ROWS, lambda x: L.MaxPooling1D()(x), MAX_POOL_2D=1, RESHAPE=2),
    _one("max_pool2d", IMAGE, lambda x: L.MaxPooling2D()(x), MAX_POOL_2D=1),
    _one(
        "max_pool3d", VOLUME, lambda x: L.MaxPooling3D()(x), MAX_POOL_2D=2, RESHAPE=4, TRANSPOSE=2
    ),
    _one("average_pool1d", ROWS, lambda x: L.AveragePooling1D(2)(x), AVERAGE_POOL_2D=1, RESHAPE=2),
    _one(
        "average_pool2d",
        IMAGE,
        lambda x: L.AveragePooling2D(2, padding="same")(x),
        AVERAGE_POOL_2D=1,
    ),
    _one(
        "average_pool3d",
        VOLUME,
        lambda x: L.AveragePooling3D(2)(x),
        AVERAGE_POOL_2D=2,
        RESHAPE=4,
        TRANSPOSE=2,
    ),
    _one("global_average1d", ROWS, lambda x: L.GlobalAveragePooling1D()(x), MEAN=1),
    _one("global_average2d", IMAGE, lambda x: L.GlobalAveragePooling2D()(x), MEAN=1),
    _one("global_average3d", VOLUME, lambda x: L.GlobalAveragePooling3D()(x), MEAN=1),
    _one("global_max1d", ROWS, lambda x: L.GlobalMaxPooling1D()(x), REDUCE_MAX=1),
    _one("global_max2d", IMAGE, lambda x: L.GlobalMaxPooling2D(keepdims=True)(x), REDUCE_MAX=1),
    _one("global_max3d", VOLUME, lambda x: L.GlobalMaxPooling3D()(x), REDUCE_MAX=1),
    _one(
        "global_pools_channels_first",
        ROWS,
        lambda x: L.Concatenate()(
            [
                L.GlobalAveragePooling1D(data_format="channels_first")(x),
                L.GlobalMaxPooling1D(data_format="channels_first")(x),
            ]
        ),
        MEAN=1,
        REDUCE_MAX=1,
        CONCATENATION=1,
    ),
)

FIRST: dict[str, Any] = {"data_format": "channels_first"}


def _residual(x: Any) -> Any:
    x = L.Conv2D(5, 3, strides=2, padding="same", use_bias=False, **FIRST)(x)
    x = L.MaxPooling2D(2, 1, **FIRST)(L.ReLU()(L.BatchNormalization(axis=1)(x)))
    y = L.Conv2D(5, 3, padding="same", **FIRST)(x)
    x = L.Activation("relu")(L.Add()([x, L.BatchNormalization(axis=1)(y)]))
    return L.Dense(2)(L.Flatten(**FIRST)(x))


def _hourglass(x: Any) -> Any:
    y = L.DepthwiseConv2D(3, padding="same", activation="relu", **FIRST)(x)
    y = L.SeparableConv2D(5, 3, strides=2, padding="same", **FIRST)(y)
    a = L.Conv2DTranspose(2, 2, strides=2, **FIRST)(y)
    b = L.UpSampling2D(2, **FIRST)(y)
    y = L.Concatenate(axis=1)([x, a, b])
    return L.Conv2D(1, 1, activation="sigmoid", **FIRST)(L.ZeroPadding2D(1, **FIRST)(y))


def _sequence(x: Any) -> Any:
    x = L.Conv1D(5, 3, padding="causal", activation="relu", **FIRST)(x)
    x = L.AveragePooling1D(2, **FIRST)(L.BatchNormalization(axis=1)(x))
    return L.GlobalMaxPooling1D(**FIRST)(L.DepthwiseConv1D(3, **FIRST)(x))


def _groups(x: Any) -> Any:
    x = L.Conv2D(4, 1, **FIRST)(x)
    x = L.Conv2D(2, 3, **FIRST)(L.Activation("gelu")(L.GroupNormalization(2, axis=1)(x)))
    return ops.max_pool(x, 2, **FIRST)


# Beside what they are with the channels last, one TRANSPOSE at the input and at the output; a
# RESHAPE where there is one channel.
CHANNELS_FIRST = (
    _one(
        "first_residual",
        (3, 8, 8),
        _residual,
        TRANSPOSE=1,
        CONV_2D=2,
        MAX_POOL_2D=1,
        ADD=1,
        FULLY_CONNECTED=1,
    ),
    _one(
        "first_hourglass",
        (3, 8, 8),
        _hourglass,
        TRANSPOSE=1,
        DEPTHWISE_CONV_2D=2,
        CONV_2D=2,
        TRANSPOSE_CONV=1,
        RESIZE_NEAREST_NEIGHBOR=1,
        CONCATENATION=1,
        PAD=1,
        LOGISTIC=1,
        RESHAPE=1,
    ),
    _one(
        "first_sequence",
        (3, 12),
        _sequence,
        TRANSPOSE=1,
        RESHAPE=2,
        PAD=1,
        CONV_2D=1,
        AVERAGE_POOL_2D=1,
        DEPTHWISE_CONV_2D=2,
        REDUCE_MAX=1,
    ),
    _one(
        "first_groups",
        (3, 6, 6),
        _groups,
        TRANSPOSE=2,
        CONV_2D=2,
        RESHAPE=2,
        MEAN=2,
        SUB=1,
        MUL=2,
        CAST=2,
        ADD=2,
        GATHER=2,
        DEPTHWISE_CONV_2D=1,
        MAX_POOL_2D=1,
    ),
    _one(
        "first_volume",
        (2, 4, 4, 6),
        lambda x: L.MaxPooling3D(2, **FIRST)(L.Conv3D(3, (1, 2, 3), **FIRST)(x)),
        TRANSPOSE=4,  # two of the pooling
        RESHAPE=12,
        STRIDED_SLICE=4,
        CONV_2D=4,
        CONCATENATION=1,
        MAX_POOL_2D=2,
    ),
)

MERGE = (
    _one("add", IMAGE, lambda x: L.Add()([x, _conv(x)]), ADD=1, CONV_2D=1),
    _one(
        "add_three_relu",
        IMAGE,
        lambda x: L.ReLU()(L.Add()([x, _conv(x), _conv(x)])),
        ADD=2,
        CONV_2D=2,
    ),
    _one("subtract", IMAGE, lambda x: L.Subtract()([x, _conv(x)]), SUB=1, CONV_2D=1),
    _one("multiply", IMAGE, lambda x: L.Multiply()([x, _conv(x)]), MUL=1, CONV_2D=1),
    _one(
        "average_three",
        IMAGE,
        lambda x: L.Average()([x, _conv(x), _conv(x)]),
        ADD=2,
        MUL=1,
        CONV_2D=2,
    ),
    _one(
        "maximum_three", IMAGE, lambda x: L.Maximum()([x, _conv(x), _conv(x)]), MAXIMUM=2, CONV_2D=2
    ),
    _one("minimum", IMAGE, lambda x: L.Minimum()([x, _conv(x)]), MINIMUM=1, CONV_2D=1),
    _one(
        "concatenate",
        IMAGE,
        lambda x: L.Concatenate()([x, _conv(x), _conv(x, 2)]),
        CONCATENATION=1,
        CONV_2D=2,
    ),
)

MOVE = (
    _one("flatten", IMAGE, lambda x: L.Dense(3)(L.Flatten()(x)), FULLY_CONNECTED=1),
    _one("reshape", IMAGE, lambda x: _conv(L.Reshape((4, 4, 12))(_conv(x))), CONV_2D=2, RESHAPE=1),
    _one("permute", IMAGE, lambda x: _conv(L.Permute((2, 1, 3))(_conv(x))), CONV_2D=2, TRANSPOSE=1),
    _one("permute_input", IMAGE, lambda x: _conv(L.Permute((2, 1, 3))(x)), CONV_2D=1, TRANSPOSE=1),
    _one(
        "repeat_vector",
        VECTOR,
        lambda x: L.RepeatVector(5)(x),
        RESHAPE=2,
        RESIZE_NEAREST_NEIGHBOR=1,
    ),
    _one("zero_padding1d", ROWS, lambda x: L.ZeroPadding1D(2)(x), PAD=1),
    _one(
        "zero_padding2d",
        IMAGE,
        lambda x: L.Conv2D(4, 3, 2)(L.ZeroPadding2D(((0, 1), (0, 1)))(x)),
        CONV_2D=1,  # SAME means this padding
    ),
    _one(
        "zero_padding2d_on_one_side",
        IMAGE,
        lambda x: L.Conv2D(4, 3)(L.ZeroPadding2D(((2, 0), (2, 0)))(x)),
        CONV_2D=1,
        PAD=1,
    ),
    _one("zero_padding3d", VOLUME, lambda x: L.ZeroPadding3D(1)(x), PAD=1),
    _one("cropping1d", ROWS, lambda x: L.Cropping1D(2)(x), STRIDED_SLICE=1),
    _one("cropping2d", IMAGE, lambda x: L.Cropping2D(2)(x), STRIDED_SLICE=1),
    _one("cropping3d", (6, 6, 6, 3), lambda x: L.Cropping3D(2)(x), RESHAPE=3, STRIDED_SLICE=2),
    _one(
        "up_sampling1d", ROWS, lambda x: L.UpSampling1D(2)(x), RESHAPE=2, RESIZE_NEAREST_NEIGHBOR=1
    ),
    _one("up_sampling2d", IMAGE, lambda x: L.UpSampling2D(2)(x), RESIZE_NEAREST_NEIGHBOR=1),
    _one(
        "up_sampling2d_bilinear",
        IMAGE,
        lambda x: L.UpSampling2D(2, interpolation="bilinear")(x),
        RESIZE_BILINEAR=1,
    ),
    _one(
        "up_sampling3d",
        VOLUME,
        lambda x: L.UpSampling3D(2)(x),
        RESHAPE=3,
        RESIZE_NEAREST_NEIGHBOR=2,
    ),
    _one("resizing", IMAGE, lambda x: L.Resizing(12, 12)(x), RESIZE_BILINEAR=1),
    _one("slice", IMAGE, lambda x: Slice([1, 0, 0], [7, 8, 2], [2, 1, 1])(x), STRIDED_SLICE=1),
)

# Layers that do something in training only; each stands between two that stay.
_TRAINING_ONLY: tuple[tuple[tuple[int, ...], Callable[[], Any]], ...] = (
    ((5, 8), lambda: L.Identity()),
    ((5, 8), lambda: L.Dropout(0.3)),
    ((5, 8), lambda: L.SpatialDropout1D(0.3)),
    (IMAGE, lambda: L.SpatialDropout2D(0.3)),
    (VOLUME, lambda: L.SpatialDropout3D(0.3)),
    ((5, 8), lambda: L.AlphaDropout(0.3)),
    ((5, 8), lambda: L.GaussianDropout(0.3)),
    ((5, 8), lambda: L.GaussianNoise(0.1)),
    ((5, 8), lambda: L.ActivityRegularization(1e-3)),
)


def _vanishing(shape: tuple[int, ...], make: Callable[[], Any]) -> Case:
    def call(x: Any) -> Any:
        return L.Dense(3)(make()(L.Dense(x.shape[-1], "relu")(x)))

    name = type(make()).__name__
    return _one(name, shape, call, FULLY_CONNECTED=2)


VANISHING = tuple(_vanishing(shape, make) for shape, make in _TRAINING_ONLY)


def _square(x: Any) -> Any:
    return SquaredDifference()([x, L.GlobalMaxPooling1D(keepdims=True)(x)])


def _product(x: Any) -> Any:
    return Matmul()([x, L.Permute((2, 1))(L.Dense(8)(x))])


# What the registry decomposes into layers with one operator each, and those layers.
_REST = {"ADD": 1, "CAST": 1, "DEPTHWISE_CONV_2D": 1, "GATHER": 1, "MUL": 2, "RESHAPE": 2}
_LAYER_NORM = {**_REST, "FULLY_CONNECTED": 3, "SUB": 2}
_ATTENTION = {"BATCH_MATMUL": 2, "RESHAPE": 4, "SOFTMAX": 1, "TRANSPOSE": 4}
COMPOSITE = (
    _one("layer_norm", (5, 8), lambda x: L.LayerNormalization()(x), **_LAYER_NORM),
    _one("rms_norm", (5, 8), lambda x: L.RMSNormalization()(x), FULLY_CONNECTED=1, **_REST),
    _one(
        "einsum_dense",
        (5, 8),
        lambda x: L.EinsumDense("abc,cd->abd", (5, 4), "relu", "d")(x),
        FULLY_CONNECTED=1,
    ),
    _one(
        "attention",
        (5, 8),
        lambda x: L.MultiHeadAttention(2, 4)(x, x),
        FULLY_CONNECTED=4,
        **_ATTENTION,
    ),
    _one("squared_difference", (5, 8), _square, REDUCE_MAX=1, SQUARED_DIFFERENCE=1),
    _one("matmul", (5, 8), _product, BATCH_MATMUL=1, FULLY_CONNECTED=1, TRANSPOSE=1),
    _one("rsqrt", VECTOR, lambda x: ReciprocalSquareRoot()(L.ReLU()(x)), RELU=1, **TABLE),
    _one("clip", VECTOR, lambda x: Clip(0.5, 1.0)(x), **TABLE),
    _one("channel_affine", IMAGE, lambda x: ChannelAffine()(x), DEPTHWISE_CONV_2D=1),
)

CASES = (
    *WEIGHTED,
    *AFFINE,
    *ACTIVATION,
    *POOL,
    *CHANNELS_FIRST,
    *MERGE,
    *MOVE,
    *COMPOSITE,
    *VANISHING,
)
