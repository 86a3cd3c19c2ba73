"""**Table**: one row for each Keras layer, which says how it is quantized and how it ships.

A row says which variables are weights and which of their axes are channel axes, where the scale of
the output comes from, what fuses, and which TFLite operators the layer becomes. A layer without a
row is refused by name. `register_layer` adds a row.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.devices import COMPARISONS, INT8_FIXED
from kqat.grids import Bounds, Clamp
from kqat.parts import (
    ByteInput,
    ChannelAffine,
    Clip,
    ClipKind,
    ConstantKind,
    ConstantRows,
    DepthToSpace,
    Elementwise,
    Hide,
    Hold,
    IndexKind,
    IndexOperation,
    Learned,
    LearnedPower,
    Matmul,
    Padding,
    PaddingKind,
    ReciprocalSquareRoot,
    Recurrence,
    Reduce,
    ReduceKind,
    Remainder,
    Requantize,
    Select,
    Slice,
    SpaceToDepth,
    SquaredDifference,
    Stack,
    StopGradient,
    Take,
    TiedWeight,
    TopK,
    Unstack,
    WeightUse,
    WithConstant,
    ZeroPadding,
)
from kqat.registry import fused_lstms, rule
from kqat.registry.layer_facts import LayerFacts
from kqat.registry.refusals import LAYER_REASONS, reason
from kqat.registry.rule import LayerRule, Output
from kqat.rewrites import (
    attention,
    attention_masks,
    basic,
    channels_first,
    matrix_products,
    normalization,
    one_hot,
    recurrent,
    step_masks,
    time_and_depth,
)


def _conv(op: str, axes: tuple[int, ...], *extra: str) -> LayerRule:
    return LayerRule(
        output=Output.OWN,
        ops=(op, *extra),
        weights={"kernel": axes},
        takes_clamp=True,
        takes_normalization=True,
        input_axis=-2,
        decompose=basic.split_activation,
    )


def _own(*ops: str, **options: Any) -> LayerRule:
    return LayerRule(output=Output.OWN, ops=ops, **options)


def _operand(op: str, variable: str = "value", **options: Any) -> LayerRule:
    return _own(op, weights={variable: None}, operand=True, **options)


def _same(*ops: str, **options: Any) -> LayerRule:
    return LayerRule(output=Output.SAME, ops=ops, **options)


def _fixed(op: str, **options: Any) -> LayerRule:
    return LayerRule(output=Output.FIXED, ops=(op,), fixed_range=INT8_FIXED[op].range, **options)


def _resize(*ops: str) -> LayerRule:
    return _same(*ops, refuse=rule.plain_resize, rounds=True, hands_on=rule.keeps_shape)


def _index(*ops: str) -> LayerRule:
    return LayerRule(output=Output.INDEX, ops=ops)


def _comparison(op: str) -> LayerRule:
    """Of quantities also as integers, which the others prepare."""
    return _index(op, "CAST", "MUL", "SUB")


def _affine(refuse: Callable[[Any], str | None] | None = None, *extra: str) -> LayerRule:
    ops = ("RESHAPE", "DEPTHWISE_CONV_2D", "MUL", *extra)
    return LayerRule(output=Output.OWN, ops=ops, takes_clamp=True, affine=True, refuse=refuse)


def _composite(decompose: Callable[[Any, str], Any], *ops: str, **options: Any) -> LayerRule:
    return LayerRule(output=Output.OWN, ops=ops, decompose=decompose, **options)


_NORMALIZING = (
    "MEAN", "FULLY_CONNECTED", "SUB", "MUL", "CAST", "ADD", "GATHER", "DEPTHWISE_CONV_2D",
    "RESHAPE",
)  # fmt: skip
_ATTENDING = (
    "RESHAPE", "TRANSPOSE", "BATCH_MATMUL", "SOFTMAX", "LOGISTIC", "ADD", "MUL", "CAST", "GATHER",
    "LOGICAL_AND",
)  # fmt: skip
_MASKS = {"masks": True}
_STEPS = ("RESHAPE", "STRIDED_SLICE", "CONCATENATION")
# Image augmentation: in inference these layers return the image unchanged.
AUGMENTING = [
    getattr(layers, name)
    for name in (
        "AugMix CutMix MixUp RandAugment RandomBrightness RandomColorDegeneration "
        "RandomColorJitter RandomContrast RandomElasticTransform RandomErasing RandomFlip "
        "RandomGaussianBlur RandomGrayscale RandomHue RandomInvert RandomPerspective "
        "RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear "
        "RandomTranslation RandomZoom Solarization"
    ).split()
    # Older versions of Keras lack some.
    if hasattr(layers, name)
]
TRAINING_ONLY = (
    layers.Identity, layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D,
    layers.SpatialDropout3D, layers.AlphaDropout, layers.GaussianDropout, layers.GaussianNoise,
    layers.ActivityRegularization,
)  # fmt: skip
# Layers that scale and shift channels; freezing knows where they keep the two numbers.
AFFINE = (layers.BatchNormalization, layers.Rescaling, ChannelAffine, layers.Normalization)
# Layers that Keras has with the channels first or last.
_OF_EITHER_FORMAT = [
    getattr(layers, name)
    for name in (
        "Conv1D Conv2D Conv3D DepthwiseConv1D DepthwiseConv2D SeparableConv1D SeparableConv2D "
        "Conv1DTranspose Conv2DTranspose MaxPooling1D MaxPooling2D MaxPooling3D "
        "AveragePooling1D AveragePooling2D AveragePooling3D "
        "AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D "
        "AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D "
        "ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping2D Cropping3D UpSampling2D "
        "UpSampling3D Flatten CenterCrop Resizing SpatialDropout2D SpatialDropout3D"
    ).split()
    # Older versions of Keras lack some.
    if hasattr(layers, name)
]
# Layers that work along one axis, any of them.
_ALONG_ONE_AXIS = [
    getattr(layers, name)
    for name in (
        "BatchNormalization Normalization LayerNormalization RMSNormalization GroupNormalization"
    ).split()
    if hasattr(layers, name)
]
_RECURRENT_OPS = (
    "FULLY_CONNECTED", "RESHAPE", "UNPACK", "SUB", "ADD", "MUL", "STRIDED_SLICE", "PACK",
    "LOGISTIC", "TANH", "DEPTHWISE_CONV_2D", "SELECT_V2", "CONCATENATION",
)  # fmt: skip
_RECURRENT = _composite(
    recurrent.rnn, *_RECURRENT_OPS, decompose_fused=fused_lstms.fused_rnn, **_MASKS
)
_LSTM = dataclasses.replace(_RECURRENT, ops=(*_RECURRENT_OPS, *fused_lstms.OPS))
_CONV_LSTM = _composite(
    recurrent.rnn,
    "CONV_2D",
    "PAD",
    "TRANSPOSE",
    *_RECURRENT_OPS,
    **_MASKS,
    refuse=rule.channels_last,
)
_VANISHES = LayerRule(output=Output.VANISHES)
_MEAN: dict[str, Any] = {"resolution": rule.resolution_of_mean}
_SUM: dict[str, Any] = {"resolution": rule.resolution_of_sum}
_PAIRWISE = {"takes_clamp": True, "decompose": basic.pairwise}
_GLOBAL_MEAN: dict[str, Any] = {
    **_MEAN, "decompose": basic.global_mean, "hands_on": rule.keeps_count
}  # fmt: skip

# If the input's scale is larger than this, TFLite Micro's LOGISTIC and TANH saturate too early.
_MICRO_LARGEST_SCALE = 4.0

# Elementwise functions that have no int8 operator: they ship as lookup tables.
_TABULATED = (
    "celu",
    "hard_shrink",
    "hard_sigmoid",
    "log_sigmoid",
    "mish",
    "selu",
    "soft_shrink",
    "softplus",
    "softsign",
    "sparse_plus",
    "sparse_sigmoid",
    "squareplus",
    "tanh_shrink",
)

ACTIVATIONS: dict[str, LayerRule] = {
    "linear": _VANISHES,
    "relu": _own("RELU", clamp=Clamp.RELU, bounds=Bounds(0.0, math.inf)),
    "relu6": _own("RELU", clamp=Clamp.RELU6, bounds=Bounds(0.0, 6.0)),
    "hard_tanh": _own(table=True, bounds=Bounds(-1.0, 1.0)),
    "leaky_relu": _own("LEAKY_RELU", "PRELU"),
    "elu": _own("ELU", wide_table=True),
    "hard_silu": _own("HARD_SWISH", wide_table=True, resolution=rule.resolution_of_hard_swish),
    "gelu": _own("GELU", table=True),
    "exponential": _own("EXP", table=True),
    **{name: _own(table=True) for name in _TABULATED},
    "silu": _own("LOGISTIC", "MUL", decompose=basic.silu),
    "sigmoid": _fixed("LOGISTIC", largest_input_scale=_MICRO_LARGEST_SCALE),
    "softmax": _fixed("SOFTMAX"),
    "tanh": _fixed("TANH", largest_input_scale=_MICRO_LARGEST_SCALE),
    "log_softmax": _fixed("LOG_SOFTMAX"),
}


def _newer(name: str, row: LayerRule) -> dict[type, LayerRule]:
    """The row of a layer that the oldest supported Keras lacks; nothing where it does."""
    cls = getattr(layers, name, None)
    return {} if cls is None else {cls: row}


# The row of a user's function, and the row of a user's layer class that has none.
FUNCTION = _own(table=True, opens=True)
OPENED = _own(opens=True)

LAYERS: dict[type, LayerRule] = {
    layers.Lambda: FUNCTION,
    Elementwise: _own(table=True),
    LearnedPower: _own(table=True),
    Clip: _own(table=True),
    layers.Dense: dataclasses.replace(
        _conv("FULLY_CONNECTED", (-1,), "RESHAPE"), decompose=basic.dense
    ),
    layers.Conv1D: _conv("CONV_2D", (-1,), "RESHAPE", "PAD"),
    layers.Conv2D: _conv("CONV_2D", (-1,)),
    layers.DepthwiseConv1D: _conv("DEPTHWISE_CONV_2D", (-2, -1), "RESHAPE"),
    layers.DepthwiseConv2D: _conv("DEPTHWISE_CONV_2D", (-2, -1)),
    layers.Conv2DTranspose: dataclasses.replace(
        _conv("TRANSPOSE_CONV", (-2,), "RELU"), input_axis=None, refuse=rule.not_dilated
    ),
    layers.SeparableConv1D: _own(
        "DEPTHWISE_CONV_2D", "CONV_2D", "RESHAPE", decompose=basic.separable
    ),
    layers.SeparableConv2D: _own("DEPTHWISE_CONV_2D", "CONV_2D", decompose=basic.separable),
    layers.BatchNormalization: _affine(rule.one_axis),
    layers.Normalization: _affine(rule.one_axis),
    layers.Rescaling: dataclasses.replace(
        _affine(None, "ADD", "SUB"),
        resolution=rule.resolution_of_multiple,
        decompose=channels_first.rescaling,
    ),
    layers.ReLU: _own("RELU", "LEAKY_RELU", "PRELU", decompose=basic.relu),
    layers.LeakyReLU: _own("LEAKY_RELU", "PRELU"),
    layers.ELU: _own("ELU", wide_table=True, decompose=basic.elu),
    layers.PReLU: _operand("PRELU", "alpha"),
    layers.Softmax: dataclasses.replace(
        ACTIVATIONS["softmax"],
        decompose=attention_masks.softmax,
        decompose_masked=attention_masks.masked_softmax,
        masks=True,
    ),
    layers.MaxPooling1D: _same("MAX_POOL_2D", "RESHAPE", hands_on=rule.is_of_one_value),
    layers.MaxPooling2D: _same("MAX_POOL_2D", hands_on=rule.is_of_one_value),
    layers.MaxPooling3D: _same("MAX_POOL_2D", "RESHAPE", "TRANSPOSE", decompose=basic.pool_3d),
    layers.AveragePooling1D: _same(
        "AVERAGE_POOL_2D", "RESHAPE", rounds=True, hands_on=rule.is_of_one_value
    ),
    layers.AveragePooling2D: _same("AVERAGE_POOL_2D", rounds=True, hands_on=rule.is_of_one_value),
    layers.AveragePooling3D: _same(
        "AVERAGE_POOL_2D", "RESHAPE", "TRANSPOSE", decompose=basic.pool_3d
    ),
    layers.GlobalAveragePooling1D: _own(
        "MEAN", **_GLOBAL_MEAN, **_MASKS, decompose_masked=step_masks.mean_of_shown
    ),
    layers.GlobalAveragePooling2D: _own("MEAN", **_GLOBAL_MEAN),
    layers.GlobalAveragePooling3D: _own("MEAN", **_GLOBAL_MEAN),
    **dict.fromkeys(
        (layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D),
        _same("REDUCE_MAX", decompose=basic.global_max, hands_on=rule.keeps_count),
    ),
    layers.Add: _own("ADD", **_SUM, **_PAIRWISE),
    Hide: _own("ADD", hides=True),
    layers.Subtract: _own("SUB", **_SUM, takes_clamp=True),
    layers.Multiply: _own("MUL", **_PAIRWISE),
    layers.Average: _own("ADD", "MUL", decompose=basic.average),
    layers.Maximum: _same("MAXIMUM"),
    layers.Minimum: _same("MINIMUM"),
    layers.Concatenate: _same("CONCATENATION"),
    layers.Flatten: _same("RESHAPE"),
    layers.Reshape: _same("RESHAPE"),
    layers.Permute: _same("TRANSPOSE"),
    layers.RepeatVector: _same("RESHAPE", "RESIZE_NEAREST_NEIGHBOR", decompose=basic.repeat_vector),
    **{
        cls: _same(op, "RESHAPE", "TRANSPOSE", decompose=basic.adaptive_pool)
        for kind, op in (("Average", "AVERAGE_POOL_2D"), ("Max", "MAX_POOL_2D"))
        for n in (1, 2, 3)
        if (cls := getattr(layers, f"Adaptive{kind}Pooling{n}D", None))
    },
    layers.CenterCrop: _same("STRIDED_SLICE", decompose=basic.center_crop),
    layers.RandomCrop: LayerRule(output=Output.VANISHES, decompose=basic.random_crop),
    layers.CategoryEncoding: _composite(
        one_hot.category_encoding, "GATHER", "REDUCE_MAX", "MEAN", "MUL", "RESHAPE"
    ),
    layers.SpectralNormalization: _composite(normalization.spectral),
    **dict.fromkeys(
        (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D, ZeroPadding),
        _same("PAD", hands_on=rule.keeps_shape),
    ),
    layers.Cropping1D: _same("STRIDED_SLICE", hands_on=rule.keeps_shape),
    layers.Cropping2D: _same("STRIDED_SLICE", hands_on=rule.keeps_shape),
    layers.Cropping3D: _same("RESHAPE", "STRIDED_SLICE", decompose=basic.crop_3d),
    layers.UpSampling1D: _same("RESHAPE", "RESIZE_NEAREST_NEIGHBOR", decompose=basic.upsample_1d),
    layers.UpSampling2D: _same(
        "RESIZE_NEAREST_NEIGHBOR",
        "RESIZE_BILINEAR",
        refuse=rule.nearest_or_bilinear,
        decompose=basic.upsample_2d,
    ),
    layers.Resizing: _resize("RESIZE_NEAREST_NEIGHBOR", "RESIZE_BILINEAR"),
    layers.UpSampling3D: _same("RESHAPE", "RESIZE_NEAREST_NEIGHBOR", decompose=basic.upsample_3d),
    layers.LayerNormalization: _composite(normalization.layer_normalization, *_NORMALIZING),
    **_newer("RMSNormalization", _composite(normalization.rms_normalization, *_NORMALIZING)),
    layers.EinsumDense: _composite(
        matrix_products.einsum_dense, "FULLY_CONNECTED", "RESHAPE", "TRANSPOSE", "ADD"
    ),
    layers.MultiHeadAttention: _composite(
        attention.multi_head_attention, *_ATTENDING, "FULLY_CONNECTED", **_MASKS
    ),
    layers.Embedding: _own("CAST", "GATHER", weights={"embeddings": None}, table_of_rows=True),
    ConstantRows: _own("CAST", "GATHER"),
    **_newer(
        "ReversibleEmbedding",
        _composite(
            one_hot.reversible_embedding, "CAST", "GATHER", "FULLY_CONNECTED", "MUL", "TANH"
        ),
    ),
    layers.GroupNormalization: _composite(normalization.group_normalization, *_NORMALIZING),
    layers.UnitNormalization: dataclasses.replace(
        _fixed("L2_NORMALIZATION"), decompose=normalization.unit_normalization
    ),
    layers.GroupQueryAttention: _composite(
        attention.group_query_attention, *_ATTENDING, "FULLY_CONNECTED", **_MASKS
    ),
    layers.Attention: _composite(attention.attention, *_ATTENDING, "TANH", "MEAN", **_MASKS),
    layers.AdditiveAttention: _composite(
        attention.additive_attention, *_ATTENDING, "TANH", "MEAN", "FULLY_CONNECTED", **_MASKS
    ),
    layers.Dot: _composite(
        matrix_products.dot, "BATCH_MATMUL", "RESHAPE", "TRANSPOSE", "L2_NORMALIZATION"
    ),
    layers.Conv3D: _composite(
        time_and_depth.conv_3d,
        "CONV_2D",
        "RESHAPE",
        "TRANSPOSE",
        "STRIDED_SLICE",
        "CONCATENATION",
        "PAD",
    ),
    layers.Conv1DTranspose: _composite(
        time_and_depth.conv_1d_transpose, "TRANSPOSE_CONV", "RESHAPE", "RELU"
    ),
    layers.Masking: _composite(
        step_masks.masking,
        "STRIDED_SLICE",
        "RESHAPE",
        "CONCATENATION",
        "NOT_EQUAL",
        "CAST",
        "GATHER",
        "REDUCE_MAX",
        "GREATER",
        "SELECT_V2",
    ),
    layers.TimeDistributed: _composite(time_and_depth.time_distributed, *_STEPS, **_MASKS),
    **dict.fromkeys((layers.SimpleRNN, layers.GRU), _RECURRENT),
    **dict.fromkeys((layers.LSTM, layers.RNN), _LSTM),
    **dict.fromkeys(
        (layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell),
        _composite(recurrent.cell, *_RECURRENT_OPS),
    ),
    layers.StackedRNNCells: OPENED,
    **dict.fromkeys((layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D), _CONV_LSTM),
    layers.Bidirectional: _composite(
        recurrent.bidirectional,
        *_LSTM.ops,
        decompose_fused=fused_lstms.fused_bidirectional,
        **_MASKS,
    ),
    Recurrence: LayerRule(
        output=Output.INSIDE,
        ops=("UNPACK", "STRIDED_SLICE", "CONCATENATION", "RESHAPE", "SUB", "PACK"),
    ),
    ByteInput: LayerRule(output=Output.FIXED),  # its range is that of the layer
    Learned: LayerRule(output=Output.OWN),
    # What its calls have in common; each has a row of its own.
    TiedWeight: _own(
        "CAST", "GATHER", "FULLY_CONNECTED", "RESHAPE", "ADD", "MUL", weights={"kernel": None}
    ),
    Unstack: _same("UNPACK"),
    Stack: _same("PACK"),
    Slice: _same("STRIDED_SLICE"),
    Take: _same("GATHER"),
    TopK: _same("TOPK_V2"),
    DepthToSpace: _same("DEPTH_TO_SPACE"),
    SpaceToDepth: _same("SPACE_TO_DEPTH"),
    Select: _same("SELECT_V2"),
    Hold: _same("SELECT_V2", rounds=True),
    Matmul: _own("BATCH_MATMUL"),
    SquaredDifference: _own("SQUARED_DIFFERENCE", resolution=rule.resolution_of_square),
    ReciprocalSquareRoot: _own(table=True),
    ChannelAffine: _affine(),
    Requantize: _own("QUANTIZE"),
    **dict.fromkeys((*AUGMENTING, *TRAINING_ONLY, StopGradient), _VANISHES),
}


# Rows of layers that become one of several operators: (class, `kind` or `interpolation`) -> row.
KINDS: dict[tuple[type, str], LayerRule] = {
    **fused_lstms.KINDS,
    (Clip, ClipKind.GRID): _own("QUANTIZE", clamp=Clamp.BOUNDS),
    (WithConstant, ConstantKind.ADD): _operand("ADD", takes_clamp=True, **_SUM),
    (WithConstant, ConstantKind.SUBTRACT): _operand("SUB", takes_clamp=True, **_SUM),
    (WithConstant, ConstantKind.HIDE): _operand("ADD", hides=True),
    (WithConstant, ConstantKind.MULTIPLY): _operand("MUL", takes_clamp=True),
    (WithConstant, ConstantKind.SQUARED_DIFFERENCE): _operand(
        "SQUARED_DIFFERENCE", resolution=rule.resolution_of_square
    ),
    (layers.Resizing, "nearest"): _resize("RESIZE_NEAREST_NEIGHBOR"),
    (layers.Resizing, "bilinear"): _resize("RESIZE_BILINEAR"),
    (Padding, PaddingKind.LOWEST): _same("PADV2"),
    (Padding, PaddingKind.REFLECT): _same("MIRROR_PAD"),
    (Padding, PaddingKind.SYMMETRIC): _same("MIRROR_PAD"),
    (Reduce, ReduceKind.MEAN): _own("MEAN", "FULLY_CONNECTED", **_MEAN, hands_on=rule.keeps_count),
    (Remainder, ReduceKind.MEAN): _own(
        "MEAN", "FULLY_CONNECTED", resolution=rule.resolution_of_remainder
    ),
    (Reduce, ReduceKind.MAX): _same("REDUCE_MAX", hands_on=rule.keeps_count),
    (Reduce, ReduceKind.MIN): _same("REDUCE_MIN", hands_on=rule.keeps_count),
    (Reduce, ReduceKind.PROD): _own(
        "REDUCE_PROD", refuse=rule.few_factors, hands_on=rule.keeps_count
    ),
    (IndexOperation, IndexKind.ARGMAX): _index("ARG_MAX"),
    (IndexOperation, IndexKind.ARGMIN): _index("ARG_MIN"),
    (IndexOperation, IndexKind.ADD): _index("ADD"),
    (IndexOperation, IndexKind.SUBTRACT): _index("SUB"),
    (IndexOperation, IndexKind.MULTIPLY): _index("MUL"),
    (IndexOperation, IndexKind.DIVIDE): _index("DIV"),
    (IndexOperation, IndexKind.MAXIMUM): _index("MAXIMUM"),
    (IndexOperation, IndexKind.MINIMUM): _index("MINIMUM"),
    (IndexOperation, IndexKind.PAD): _index("PAD", "PADV2"),
    **{(IndexOperation, IndexKind[name]): _comparison(name) for name in COMPARISONS},
    (IndexOperation, IndexKind.CONCATENATE): _index("CONCATENATION"),
    (IndexOperation, IndexKind.LOGICAL_AND): _index("LOGICAL_AND"),
    (IndexOperation, IndexKind.LOGICAL_OR): _index("LOGICAL_OR"),
    (IndexOperation, IndexKind.LOGICAL_NOT): _index("LOGICAL_NOT"),
}


# Rows of the calls of a `TiedWeight`, whose weight has one grid for all of them.
USES: dict[WeightUse, LayerRule] = {
    WeightUse.ROWS: _own("CAST", "GATHER", weights={"kernel": None}),
    **dict.fromkeys(
        (WeightUse.PRODUCT, WeightUse.TRANSPOSED),
        _own("FULLY_CONNECTED", "RESHAPE", weights={"kernel": None}, takes_clamp=True),
    ),
    WeightUse.SUM: _own("ADD", weights={"kernel": None}, takes_clamp=True, **_SUM),
    WeightUse.FACTOR: _own("MUL", weights={"kernel": None}, takes_clamp=True),
}


# Rows that users registered; they take precedence over the stock rows.
REGISTERED: dict[type, LayerRule] = {}


def register_layer(layer_class: type, rule: LayerRule) -> None:
    """Adds the row of a layer class, or replaces its row: a registered or a stock one.

    The row serves layers of exactly this class, in every model that is planned from now on. A
    QAT model keeps the rows that it was planned with, also when it is saved and loaded.

    Raises:
        UnsupportedLayerError: if `rule` is not a `LayerRule`, or if the row could have no effect:
            the class is not a layer; it is a model or an input, for which kqat looks up no row;
            or `affine=True` is given for a class whose scale and offset kqat cannot find.
    """
    name = getattr(layer_class, "__name__", repr(layer_class))
    if not isinstance(rule, LayerRule):
        raise UnsupportedLayerError(f"Expected a LayerRule for {name}. Received: {rule!r}.")
    if not isinstance(layer_class, type) or not issubclass(layer_class, layers.Layer):
        raise UnsupportedLayerError(
            f"Expected a subclass of keras.layers.Layer to register. Received: {name}. A function "
            "of keras.ops cannot be registered; wrap it in a layer."
        )
    if issubclass(layer_class, keras.Model | layers.InputLayer):
        raise UnsupportedLayerError(
            f"Expected a layer that a row can describe. Received: {name}. kqat looks up no row for "
            "a model or an input; register the layers inside the model."
        )
    if rule.affine and not issubclass(layer_class, AFFINE):
        raise UnsupportedLayerError(
            f"Expected affine=True only for layers that scale and shift channels by known numbers: "
            f"{', '.join(c.__name__ for c in AFFINE)} and their subclasses. Received: {name}. "
            "Leave affine out, and name its variables in weights."
        )
    REGISTERED[layer_class] = rule


def registered_rule(layer: Any) -> LayerRule | None:
    """The row that a user registered for the class of `layer`, if one did."""
    return REGISTERED.get(type(layer))


def row_of_class(layer_class: type) -> LayerRule | None:
    """The row of a class, registered or else stock; `None` if it has none."""
    return REGISTERED.get(layer_class, LAYERS.get(layer_class))


def is_custom(layer: Any) -> bool:
    """Whether the class of `layer` is neither one of Keras's nor in the table."""
    stock = getattr(layers, type(layer).__name__, None) is type(layer)
    return isinstance(layer, layers.Layer) and row_of_class(type(layer)) is None and not stock


def _kind(layer: Any) -> str:
    return str(getattr(layer, "kind", getattr(layer, "interpolation", "")))


def rule_for(
    layer: Any, name: str | None = None, options: Mapping[str, Any] | None = None
) -> LayerRule:
    """The row of `layer`; a custom layer without one gets the row that traces its `call`.

    Args:
        layer: a Keras layer or operation.
        name: its path in the model, for the error message.
        options: the keyword arguments of the call, on which the row of a `TiedWeight` depends.

    Raises:
        UnsupportedLayerError: if there is no row, or the row refuses the options of this layer.
    """
    if options and isinstance(layer, TiedWeight):
        return _of_columns(layer, USES[WeightUse(options["use"])])
    where = _described(layer, name)
    rule = registered_rule(layer) or _stock_rule(layer)
    if rule is None:
        why = reason(type(layer).__name__, LAYER_REASONS)
        raise UnsupportedLayerError(
            f"Expected layers with an integer form. Received: {where}. Leave it float with "
            f"policy={{'{name or layer.name}': None}}, use one of kqat.supported_layers(), or "
            f"describe it with kqat.register_layer.{why}"
        )
    problem = rule.refuse(layer) if rule.refuse else None
    if problem:
        raise UnsupportedLayerError(
            f"Expected options with an integer form. Received: {where}, which cannot ship: "
            f"{problem}."
        )
    return rule


def stock_facts(layer: Any, options: Mapping[str, Any] | None = None) -> LayerFacts | None:
    """The facts of a layer that carries none, because it was planned with a stock row.

    `options` are the keyword arguments of the call, as for `rule_for`.

    For a stock class the stock row is read even if a user registered another: a QAT model that was
    planned with a registered row carries its facts. For a custom class the registered row is read,
    because models saved by older releases do not carry it.
    """
    if options and isinstance(layer, TiedWeight):
        return LayerFacts.of(rule_for(layer, options=options))
    rule = _stock_rule(layer) or registered_rule(layer)
    return None if rule is None else LayerFacts.of(rule)


def _of_columns(layer: TiedWeight, row: LayerRule) -> LayerRule:
    """The row of a tied weight, with scales for its columns where only products read it."""
    return dataclasses.replace(row, weights={"kernel": (-1,)}) if layer.products else row


def _described(layer: Any, name: str | None) -> str:
    where = f"layer '{name or layer.name}' of type {type(layer).__name__}"
    if type(layer) is layers.Activation and registered_rule(layer) is None:
        where += f" with activation {basic.activation_name(layer.activation)!r}"
    return where


def _stock_rule(layer: Any) -> LayerRule | None:
    # A subclass may compute anything: it is a custom layer.
    if type(layer) is layers.Activation:
        activation = basic.activation_name(layer.activation)
        return FUNCTION if activation is None else ACTIVATIONS.get(activation)
    if type(layer) is TiedWeight:
        return _of_columns(layer, LAYERS[TiedWeight])
    stock = KINDS.get((type(layer), _kind(layer)), LAYERS.get(type(layer)))
    if stock is None:
        return OPENED if is_custom(layer) else None
    moved = _moved(layer)
    if moved is None:
        return stock
    return dataclasses.replace(stock, ops=(*stock.ops, "TRANSPOSE", "RESHAPE"), decompose=moved)


def _moved(layer: Any) -> Callable[[Any, str], Any] | None:
    """The rewrite of a layer whose channels, or whose axis, are not last, as kernels need it."""
    if type(layer) in _OF_EITHER_FORMAT and layer.data_format == "channels_first":
        return channels_first.between_transpositions
    if type(layer) in _ALONG_ONE_AXIS and channels_first.moved_axis(layer) is not None:
        return channels_first.along_last_axis
    return None


def supported_layers() -> tuple[str, ...]:
    """Names of the layer classes that have a row, sorted."""
    return tuple(sorted({cls.__name__ for cls in (*LAYERS, *REGISTERED)}))
