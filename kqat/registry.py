"""The one table of what is known about Keras layers.

A row says which variables are weights and along which axes their channels lie, how the scale of
the output comes about, what fuses, and which TFLite operators the layer becomes. Layers without
a row are refused by name; `register_layer` adds one.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import layers

from kqat import attention, decompositions
from kqat.elementwise import Elementwise
from kqat.errors import UnsupportedLayerError
from kqat.primitives import ChannelAffine, Matmul, Mean, ReciprocalSquareRoot, Slice


class Output(enum.Enum):
    """How the scale of a layer's output comes about."""

    OWN = "own range"
    SAME = "same scale as input"
    FIXED = "fixed range"
    VANISHES = "training only"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRule:
    """One row of the table.

    Args:
        output: how the scale of the output comes about.
        ops: the TFLite operators that the layer may become.
        weights: name of each quantizable variable -> its channel axes (`None`: one scale only).
        fixed_range: `(low, high)` that the integer kernel demands, for `Output.FIXED`.
        rounds: whether a same-scale layer computes new values, which are rounded again.
        clamp: `"relu"` or `"relu6"` for a layer that fuses into its producer.
        takes_clamp: whether a following clamp fuses into this layer.
        takes_normalization: whether a following BatchNormalization folds into this layer.
        table: whether the layer is an elementwise function that may ship as a table of 256
            entries; `ops` then names its own operator, if there is one.
        affine: whether the layer is `x * scale + offset`, one pair per channel.
        decompose: layer and name -> a callable of the same inputs, made of simpler layers, or
            `None` where the layer is simple already.
        opens: whether the layer is opened up by tracing its own `call`.
        refuse: layer -> why this very layer cannot ship and what to do instead, or `None`.
    """

    output: Output
    ops: tuple[str, ...] = ()
    weights: Mapping[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)
    fixed_range: tuple[float, float] | None = None
    rounds: bool = False
    clamp: str | None = None
    takes_clamp: bool = False
    takes_normalization: bool = False
    table: bool = False
    affine: bool = False
    decompose: Callable[[Any, str], Callable[..., Any] | None] | None = None
    opens: bool = False
    refuse: Callable[[Any], str | None] | None = None


def _channels_last(layer: Any) -> str | None:
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return "data_format='channels_first' has no TFLite kernel; build it channels_last"
    return None


def _built_rank(layer: Any) -> int:
    """Number of axes of the input that `layer` was built for; 0 where it was built for none."""
    return len((layer.get_build_config() or {}).get("input_shape") or ())


def _last_axis(layer: Any) -> str | None:
    axis = layer.axis
    axis = tuple(axis) if isinstance(axis, list | tuple) else (axis,)
    rank = getattr(layer.input_spec, "ndim", None) or _built_rank(layer)
    if axis not in ((-1,), (rank - 1,), (None,), ()):
        return f"axis={layer.axis} is not the last; permute the input so that it is"
    return None


def _plain_elu(layer: Any) -> str | None:
    if layer.alpha != 1.0:
        return f"alpha={layer.alpha} has no TFLite kernel; use alpha=1, or LeakyReLU"
    return None


def _not_dilated(layer: Any) -> str | None:
    if any(rate != 1 for rate in layer.dilation_rate):
        return f"dilation_rate={layer.dilation_rate} has no TFLite kernel; use 1"
    return _channels_last(layer)


def _softmax(layer: Any) -> str | None:
    if layer.axis not in (-1,):
        return f"axis={layer.axis} is not -1; permute the input so that it is the last"
    return None


def _nearest_or_bilinear(layer: Any) -> str | None:
    if layer.interpolation not in ("nearest", "bilinear"):
        return (
            f"interpolation={layer.interpolation!r} has no TFLite kernel; "
            "use 'nearest' or 'bilinear'"
        )
    return _channels_last(layer)


def _plain_resize(layer: Any) -> str | None:
    if layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio or layer.antialias:
        return "only plain resizing has a TFLite kernel; leave aspect ratio and antialias options"
    return _nearest_or_bilinear(layer)


def _conv(op: str, axes: tuple[int, ...], *extra: str) -> LayerRule:
    return LayerRule(
        output=Output.OWN,
        ops=(op, *extra),
        weights={"kernel": axes},
        takes_clamp=True,
        takes_normalization=True,
        decompose=decompositions.split_activation,
        refuse=_channels_last,
    )


def _own(*ops: str, **options: Any) -> LayerRule:
    return LayerRule(output=Output.OWN, ops=ops, **options)


def _same(*ops: str, **options: Any) -> LayerRule:
    return LayerRule(output=Output.SAME, ops=ops, **options)


def _affine(refuse: Callable[[Any], str | None] | None = None) -> LayerRule:
    ops = ("RESHAPE", "DEPTHWISE_CONV_2D", "MUL")
    return LayerRule(output=Output.OWN, ops=ops, takes_clamp=True, affine=True, refuse=refuse)


def _composite(decompose: Callable[[Any, str], Any], *ops: str) -> LayerRule:
    return LayerRule(output=Output.OWN, ops=ops, decompose=decompose)


_VANISHES = LayerRule(output=Output.VANISHES)
_PAIRWISE = {"takes_clamp": True, "decompose": decompositions.pairwise}
_POOL = {"refuse": _channels_last}

# Fixed scales: TFLite quantization specification, SOFTMAX, LOGISTIC, TANH, LOG_SOFTMAX.
_FIXED = {
    "sigmoid": ("LOGISTIC", (0.0, 255 / 256)),
    "softmax": ("SOFTMAX", (0.0, 255 / 256)),
    "tanh": ("TANH", (-1.0, 127 / 128)),
    "log_softmax": ("LOG_SOFTMAX", (-255 / 16, 0.0)),
}

# Elementwise functions without an int8 operator of their own.
_TABULATED = (
    "celu",
    "hard_shrink",
    "hard_sigmoid",
    "hard_tanh",
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
    "relu": _own("RELU", clamp="relu"),
    "relu6": _own("RELU", clamp="relu6"),
    "leaky_relu": _own("LEAKY_RELU"),
    "elu": _own("ELU"),
    "hard_silu": _own("HARD_SWISH"),
    "gelu": _own("GELU", table=True),
    "exponential": _own("EXP", table=True),
    **{name: _own(table=True) for name in _TABULATED},
    "silu": _own("LOGISTIC", "MUL", decompose=decompositions.silu),
    **{
        name: LayerRule(output=Output.FIXED, ops=(op,), fixed_range=fixed_range)
        for name, (op, fixed_range) in _FIXED.items()
    },
}

# A function of the user's own, and a layer of the user's own without a row.
FUNCTION = _own(table=True, opens=True)
OPENED = _own(opens=True)

LAYERS: dict[type, LayerRule] = {
    layers.Lambda: FUNCTION,
    Elementwise: _own(table=True),
    layers.Dense: dataclasses.replace(
        _conv("FULLY_CONNECTED", (-1,), "RESHAPE"), decompose=decompositions.dense
    ),
    layers.Conv1D: _conv("CONV_2D", (-1,), "RESHAPE", "PAD"),
    layers.Conv2D: _conv("CONV_2D", (-1,)),
    layers.DepthwiseConv1D: _conv("DEPTHWISE_CONV_2D", (-2, -1), "RESHAPE"),
    layers.DepthwiseConv2D: _conv("DEPTHWISE_CONV_2D", (-2, -1)),
    layers.Conv2DTranspose: dataclasses.replace(
        _conv("TRANSPOSE_CONV", (-2,), "RELU"), refuse=_not_dilated
    ),
    layers.SeparableConv1D: _own(
        "DEPTHWISE_CONV_2D", "CONV_2D", "RESHAPE", decompose=decompositions.separable
    ),
    layers.SeparableConv2D: _own(
        "DEPTHWISE_CONV_2D", "CONV_2D", decompose=decompositions.separable
    ),
    layers.BatchNormalization: _affine(_last_axis),
    layers.Normalization: _affine(_last_axis),
    layers.Rescaling: _affine(),
    layers.ReLU: _own("RELU", "LEAKY_RELU", decompose=decompositions.relu),
    layers.LeakyReLU: _own("LEAKY_RELU"),
    layers.ELU: _own("ELU", refuse=_plain_elu),
    layers.PReLU: _own("PRELU", weights={"alpha": None}),
    layers.Softmax: dataclasses.replace(ACTIVATIONS["softmax"], refuse=_softmax),
    layers.MaxPooling1D: _same("MAX_POOL_2D", "RESHAPE", **_POOL),
    layers.MaxPooling2D: _same("MAX_POOL_2D", **_POOL),
    layers.MaxPooling3D: _same(
        "MAX_POOL_2D", "RESHAPE", "TRANSPOSE", decompose=decompositions.pool_3d, **_POOL
    ),
    layers.AveragePooling1D: _same("AVERAGE_POOL_2D", "RESHAPE", rounds=True, **_POOL),
    layers.AveragePooling2D: _same("AVERAGE_POOL_2D", rounds=True, **_POOL),
    layers.AveragePooling3D: _same(
        "AVERAGE_POOL_2D", "RESHAPE", "TRANSPOSE", decompose=decompositions.pool_3d, **_POOL
    ),
    layers.GlobalAveragePooling1D: _own("MEAN", **_POOL),
    layers.GlobalAveragePooling2D: _own("MEAN", **_POOL),
    layers.GlobalAveragePooling3D: _own("MEAN", **_POOL),
    layers.GlobalMaxPooling1D: _same("REDUCE_MAX", **_POOL),
    layers.GlobalMaxPooling2D: _same("REDUCE_MAX", **_POOL),
    layers.GlobalMaxPooling3D: _same("REDUCE_MAX", **_POOL),
    layers.Add: _own("ADD", **_PAIRWISE),
    layers.Subtract: _own("SUB", takes_clamp=True),
    layers.Multiply: _own("MUL", **_PAIRWISE),
    layers.Average: _own("ADD", "MUL", decompose=decompositions.average),
    layers.Maximum: _same("MAXIMUM"),
    layers.Minimum: _same("MINIMUM"),
    layers.Concatenate: _same("CONCATENATION"),
    layers.Flatten: _same("RESHAPE"),
    layers.Reshape: _same("RESHAPE"),
    layers.Permute: _same("TRANSPOSE"),
    layers.RepeatVector: _same(
        "RESHAPE", "RESIZE_NEAREST_NEIGHBOR", decompose=decompositions.repeat_vector
    ),
    layers.ZeroPadding1D: _same("PAD", **_POOL),
    layers.ZeroPadding2D: _same("PAD", **_POOL),
    layers.ZeroPadding3D: _same("PAD", **_POOL),
    layers.Cropping1D: _same("STRIDED_SLICE", **_POOL),
    layers.Cropping2D: _same("STRIDED_SLICE", **_POOL),
    layers.Cropping3D: _same("RESHAPE", "STRIDED_SLICE", decompose=decompositions.crop_3d, **_POOL),
    layers.UpSampling1D: _same(
        "RESHAPE", "RESIZE_NEAREST_NEIGHBOR", decompose=decompositions.upsample_1d
    ),
    layers.UpSampling2D: _same(
        "RESIZE_NEAREST_NEIGHBOR",
        "RESIZE_BILINEAR",
        refuse=_nearest_or_bilinear,
        decompose=decompositions.upsample_2d,
    ),
    layers.Resizing: _same(
        "RESIZE_NEAREST_NEIGHBOR", "RESIZE_BILINEAR", refuse=_plain_resize, rounds=True
    ),
    layers.UpSampling3D: _same(
        "RESHAPE", "RESIZE_NEAREST_NEIGHBOR", decompose=decompositions.upsample_3d, **_POOL
    ),
    layers.LayerNormalization: _composite(
        attention.layer_normalization,
        "MEAN",
        "SUB",
        "MUL",
        "CAST",
        "ADD",
        "GATHER",
        "DEPTHWISE_CONV_2D",
        "RESHAPE",
    ),
    layers.RMSNormalization: _composite(
        attention.rms_normalization,
        "MEAN",
        "MUL",
        "CAST",
        "ADD",
        "GATHER",
        "RESHAPE",
        "DEPTHWISE_CONV_2D",
    ),
    layers.EinsumDense: _composite(attention.einsum_dense, "FULLY_CONNECTED", "RESHAPE"),
    layers.MultiHeadAttention: _composite(
        attention.multi_head_attention,
        "FULLY_CONNECTED",
        "RESHAPE",
        "TRANSPOSE",
        "BATCH_MATMUL",
        "SOFTMAX",
    ),
    Slice: _same("STRIDED_SLICE"),
    Mean: _own("MEAN"),
    Matmul: _own("BATCH_MATMUL"),
    ReciprocalSquareRoot: _own(table=True),
    ChannelAffine: _affine(),
    layers.Identity: _VANISHES,
    layers.Dropout: _VANISHES,
    layers.SpatialDropout1D: _VANISHES,
    layers.SpatialDropout2D: _VANISHES,
    layers.SpatialDropout3D: _VANISHES,
    layers.AlphaDropout: _VANISHES,
    layers.GaussianDropout: _VANISHES,
    layers.GaussianNoise: _VANISHES,
    layers.ActivityRegularization: _VANISHES,
}


def register_layer(layer_class: type, rule: LayerRule) -> None:
    """Adds (or replaces) the row of a layer class, a user's own or a stock one."""
    if not isinstance(rule, LayerRule):
        raise UnsupportedLayerError(
            f"Expected a LayerRule for {layer_class.__name__}. Received: {rule!r}."
        )
    LAYERS[layer_class] = rule


def is_custom(layer: Any) -> bool:
    """Whether `layer` is of a class that neither Keras nor the table knows."""
    stock = getattr(layers, type(layer).__name__, None) is type(layer)
    return isinstance(layer, layers.Layer) and type(layer) not in LAYERS and not stock


def rule_for(layer: Any, name: str | None = None) -> LayerRule:
    """The row of `layer`; custom layers, which have none, are opened up.

    Args:
        layer: a Keras layer or operation.
        name: where it stands in the model, for the error message.

    Raises:
        UnsupportedLayerError: if there is none, or the row refuses this very layer.
    """
    where = f"layer '{name or layer.name}' of type {type(layer).__name__}"
    rule = LAYERS.get(type(layer))
    if isinstance(layer, layers.Activation):
        activation = keras.activations.serialize(layer.activation)
        rule = ACTIVATIONS.get(activation) if isinstance(activation, str) else FUNCTION
        where += f" with activation {activation!r}"
    elif rule is None and is_custom(layer):
        rule = OPENED
    if rule is None:
        raise UnsupportedLayerError(
            f"Expected layers with an integer form. Received: {where}. Leave it float with "
            f"policy={{'{name or layer.name}': None}}, use one of kqat.supported_layers(), or "
            "describe it with kqat.register_layer."
        )
    problem = rule.refuse(layer) if rule.refuse else None
    if problem:
        raise UnsupportedLayerError(f"Received: {where}, which cannot ship: {problem}.")
    return rule


def supported_layers() -> tuple[str, ...]:
    """Names of the layer classes that have a row, sorted."""
    return tuple(sorted(cls.__name__ for cls in LAYERS))
