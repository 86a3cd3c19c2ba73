"""Weights as they ship: the trained integers, with BatchNormalization folded in exactly."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from kqat import LayerRule, Output, QuantizeWrapper, QuantSpec, register_layer
from kqat.base.errors import UnsupportedLayerError
from kqat.freezing.folding import channelwise, freeze_layer
from kqat.freezing.frozen_weight import FrozenWeight
from kqat.grids import arithmetic
from kqat.registry.layer_table import rule_for
from tests.kqat import reference

GAMMA = (0.5, -2.0, 0.0, 1.5)
VARIANCE = (1.0, 0.25, 4.0, 1e-12)

# Layer, shape of its input.
Make = Callable[..., layers.Layer]
FOLDING: dict[str, tuple[Make, tuple[int, ...]]] = {
    "dense": (lambda **kw: layers.Dense(4, **kw), (5,)),
    "conv": (lambda **kw: layers.Conv2D(4, 3, **kw), (6, 6, 3)),
    "conv 1-D": (lambda **kw: layers.Conv1D(4, 3, **kw), (6, 3)),
    "depthwise": (lambda **kw: layers.DepthwiseConv2D(3, depth_multiplier=2, **kw), (6, 6, 2)),
    "transpose": (lambda **kw: layers.Conv2DTranspose(4, 3, **kw), (6, 6, 3)),
}
# Bits, per channel, bias, center, scale.
GRIDS = {
    "per channel": (8, True, True, True, True),
    "4 bits": (4, True, False, True, True),
    "per tensor": (8, False, True, True, True),
    "4 bits per tensor": (4, False, False, True, True),
    "no center": (8, True, True, False, True),
    "no scale": (8, True, False, True, False),
    "neither": (8, False, False, False, False),
}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def wrapped(make: Make, shape: tuple[int, ...], grid: Any) -> QuantizeWrapper:
    """A layer and its BatchNormalization, with one negative, one dead and one constant channel."""
    bits, per_channel, bias, center, scale = grid
    layer = make(name="layer", use_bias=bias)
    axes = rule_for(layer).weights["kernel"] if per_channel else None
    spec = QuantSpec(bits=bits, symmetric=True, narrow_range=True, axis=axes)
    norm = layers.BatchNormalization(center=center, scale=scale)
    wrapper = QuantizeWrapper(layer, {"kernel": spec}, norm)
    wrapper(np.zeros((1, *shape), np.float32))
    layer.set_weights([normal(*w.shape) for w in layer.weights])
    norm.moving_mean.assign(normal(4))
    norm.moving_variance.assign(VARIANCE)
    if scale:
        norm.gamma.assign(GAMMA)
    if center:
        norm.beta.assign(normal(4))
    return wrapper


def as_model(layer: Callable[..., Any], shape: tuple[int, ...]) -> keras.Model:
    """As the frozen model is made: parts take their weights over once they were called."""
    x = keras.Input(shape)
    return keras.Model(x, layer(x))


def statistics(wrapper: QuantizeWrapper) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset of the BatchNormalization, float64, by its formula."""
    norm = wrapper.normalization
    gamma = np.asarray(norm.gamma, np.float64) if norm.scale else np.ones(4)
    beta = np.asarray(norm.beta, np.float64) if norm.center else np.zeros(4)
    factor = gamma / np.sqrt(np.asarray(norm.moving_variance, np.float64) + 1e-3)
    return factor, beta - np.asarray(norm.moving_mean, np.float64) * factor


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("make", "shape"), FOLDING.values(), ids=FOLDING)
def test_a_fold_is_exact(make: Make, shape: tuple[int, ...], grid: Any) -> None:
    wrapper = wrapped(make, shape, grid)
    (weight,), layer = freeze_layer(wrapper)
    spec = wrapper.weight_specs["kernel"]
    kernel = wrapper.layer.kernel.numpy()
    factor, offset = statistics(wrapper)
    norm_scale = wrapper.normalization.scale
    along = np.reshape(factor, wrapper.fold_factor().shape)
    if spec.axis is None:
        # The very float32 products that training rounded.
        kernel = kernel * np.where(along == 0, 1, wrapper.fold_factor().numpy())
        scale = reference.weight_scale(kernel, (), spec.bits)
        integers = reference.quantize_weight(kernel, scale, spec.bits) * (along != 0)
    else:
        scale = reference.weight_scale(kernel, spec.axis, spec.bits)
        integers = reference.quantize_weight(kernel, scale, spec.bits) * np.sign(along)
        scale = (scale.astype(np.float64) * np.abs(along)).astype(np.float32)
        scale = np.where(scale == 0, arithmetic.EMPTY_SCALE, scale)
    np.testing.assert_array_equal(weight.integers, integers)
    np.testing.assert_array_equal(weight.scale, scale)
    assert np.any(weight.scale == arithmetic.EMPTY_SCALE) == (spec.axis is not None and norm_scale)
    assert (weight.name, weight.bits) == ("layer/kernel", spec.bits)
    assert weight.per_channel == (spec.axis is not None)
    check_invariants(weight)
    bias = wrapper.layer.bias.numpy().astype(np.float64) * factor if wrapper.layer.use_bias else 0.0
    model = as_model(layer, shape)
    expected = [weight.values, (offset + bias).astype(np.float32)]
    np.testing.assert_equal(model.get_weights(), expected)
    x = normal(8, *shape)
    inferred = wrapper(x, training=False).numpy()
    # One step of an 8-bit output is 1/255 of its range; float32 sums of at most 27 products stay
    # within 1/1000 of one, though the channel of variance 0 multiplies them by 32.
    step = (inferred.max() - inferred.min()) / 255
    np.testing.assert_allclose(model(x), inferred, rtol=0, atol=step / 1000)


def check_invariants(weight: FrozenWeight) -> None:
    assert weight.integers.dtype == np.int8
    assert weight.scale.dtype == np.float32
    assert np.abs(weight.integers.astype(int)).max() <= 2 ** (weight.bits - 1) - 1
    assert np.all(np.isfinite(weight.scale)) and np.all(weight.scale > 0)
    np.testing.assert_array_equal(
        weight.values, (weight.integers * weight.scale).astype(np.float32)
    )
    assert not np.any(np.signbit(weight.values) & (weight.values == 0)), "-0.0"


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_alone_keeps_its_bias(bias: bool) -> None:
    spec = QuantSpec(symmetric=True, narrow_range=True, axis=-1)
    wrapper = QuantizeWrapper(layers.Dense(4, use_bias=bias, name="layer"), {"kernel": spec})
    wrapper(np.zeros((1, 5), np.float32))
    wrapper.layer.set_weights([normal(*w.shape) for w in wrapper.layer.weights])
    (weight,), layer = freeze_layer(wrapper)
    x = normal(3, 5)
    model = as_model(layer, (5,))
    np.testing.assert_array_equal(model(x), wrapper(x))
    np.testing.assert_equal(model.get_weights()[1:], wrapper.layer.get_weights()[1:])
    kernel = wrapper.layer.kernel.numpy()
    scale = reference.weight_scale(kernel, (-1,), 8)
    np.testing.assert_array_equal(weight.integers, reference.quantize_weight(kernel, scale, 8))


@pytest.mark.parametrize("axis", [None, -1], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("kernel", [0.0, 1e-44, 1e-38], ids=["zero", "subnormal", "tiny"])
def test_a_kernel_of_nothing_is_zeros_on_a_fine_grid(kernel: float, axis: Any) -> None:
    spec = QuantSpec(symmetric=True, narrow_range=True, axis=axis)
    wrapper = QuantizeWrapper(layers.Dense(4), {"kernel": spec})
    wrapper(np.zeros((1, 5), np.float32))
    wrapper.layer.kernel.assign(np.full((5, 4), kernel))
    (weight,), _ = freeze_layer(wrapper)
    assert not weight.integers.any()
    assert np.all(weight.scale == arithmetic.EMPTY_SCALE)
    check_invariants(weight)


def affine_norm(shape: tuple[int, ...]) -> layers.Layer:
    norm = layers.BatchNormalization(name="affine")
    norm.build((None, *shape))
    norm.set_weights([np.array(GAMMA), normal(4), normal(4), np.array(VARIANCE)])
    return norm


def affine_normalization(shape: tuple[int, ...], invert: bool = False) -> layers.Layer:
    moments = {"mean": [1.0, 2.0, 3.0, 4.0], "variance": [4.0, 1.0, 9.0, 0.0]}
    layer = layers.Normalization(**moments, invert=invert, name="affine")
    layer.build((None, *shape))
    return layer


AFFINE: dict[str, Callable[[tuple[int, ...]], layers.Layer]] = {
    "norm": affine_norm,
    "rescaling": lambda shape: layers.Rescaling(1 / 127.5, -1.0, name="affine"),
    "rescaling by channel": lambda shape: layers.Rescaling(
        [1.0, -2.0, 0.0, 3.0], 0.5, name="affine"
    ),
    "normalization": affine_normalization,
    "inverse": lambda shape: affine_normalization(shape, invert=True),
}


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 2, 3, 4)], ids=len)
@pytest.mark.parametrize("make", AFFINE.values(), ids=AFFINE)
def test_an_affine_layer_is_one_operator_without_rounding(
    make: Callable[[tuple[int, ...]], layers.Layer], shape: tuple[int, ...]
) -> None:
    affine = make(shape)
    (weight,), layer = channelwise(affine, 4)
    x = normal(3, *shape)
    expected = affine(x).numpy()
    # float32: a handful of roundings of the largest value.
    found = as_model(layer, shape)(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-7 * np.abs(expected).max())
    assert set(np.abs(weight.integers).reshape(-1).tolist()) <= {0, 127}
    assert weight.integers.shape == (1, 1, 4, 1)
    assert (weight.name, weight.per_channel) == ("affine/scale", True)
    check_invariants(weight)


def test_one_factor_for_all_is_a_multiplication() -> None:
    (weight,), layer = channelwise(layers.Rescaling(-0.125, name="affine"), 4)
    assert isinstance(layer, layers.Rescaling)
    assert (weight.integers, weight.scale) == (-127, np.float32(0.125 / 127))
    assert layer.scale == float(weight.values)
    check_invariants(weight)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("offset", [3.0, -0.001])
def test_one_number_added_is_a_sum(sign: float, offset: float) -> None:
    affine = layers.Rescaling(sign, offset, name="affine")
    (weight,), layer = channelwise(affine, 4, as_sum=True)
    assert (weight.name, weight.per_channel, weight.scale.shape) == ("affine/offset", False, ())
    assert weight.integers == np.sign(offset) * 127
    x = normal(3, 5, 4)
    np.testing.assert_array_equal(as_model(layer, (5, 4))(x), weight.values + np.float32(sign) * x)
    check_invariants(weight)


@pytest.mark.parametrize(
    ("affine", "shape", "sums"),
    [
        (layers.Rescaling(1.0, 2.0), (4,), True),
        (layers.Rescaling(-1.0, 1.0), (3, 4), True),
        (layers.Rescaling([1.0] * 4, [2.0] * 4), (2, 2, 3, 4), True),
        # One operator is all that it takes as it is.
        (layers.Rescaling(1.0, 2.0), (2, 3, 4), False),
        (layers.Rescaling(2.0, 2.0), (4,), False),
        (layers.Rescaling(1.0, [1.0, 2.0, 3.0, 4.0]), (4,), False),
        (layers.Rescaling(1.0, 0.0), (4,), False),
        (affine_norm((4,)), (4,), False),
    ],
)
def test_which_affine_layers_are_sums(
    affine: layers.Layer, shape: tuple[int, ...], sums: bool
) -> None:
    wrapper = QuantizeWrapper(affine, {})
    wrapper(np.zeros((1, *shape), np.float32))
    assert wrapper.ships_as_sum is sums


def test_only_layers_that_scale_and_shift_may_be_called_affine() -> None:
    class Squared(layers.Layer):
        def call(self, x: Any) -> Any:
            return x * x

    with pytest.raises(UnsupportedLayerError, match=r"affine=True only .*Received: Squared"):
        register_layer(Squared, LayerRule(output=Output.OWN, affine=True))
    with pytest.raises(UnsupportedLayerError, match=r"'square' of type Squared"):
        channelwise(Squared(name="square"), 4)


def test_what_was_trained_in_half_precision_ships_in_float32() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        wrapper = wrapped(*FOLDING["dense"], GRIDS["per channel"])
    finally:
        keras.config.set_dtype_policy("float32")
    _, layer = freeze_layer(wrapper)
    assert as_model(layer, (5,))(normal(2, 5)).dtype == "float32"
