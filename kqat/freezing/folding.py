"""Layers with weights as they ship: BatchNormalization folded in, weights on their grid."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import FreezeError, UnsupportedLayerError, array_of
from kqat.freezing.frozen_weight import FrozenWeight
from kqat.graph import Part, clone
from kqat.grids import arithmetic
from kqat.parts import (
    ChannelAffine,
    ConstantKind,
    GateNumbers,
    LstmState,
    TiedWeight,
    WithConstant,
    is_factor,
)
from kqat.training import QuantizeWrapper

_EMPTY = np.float32(arithmetic.EMPTY_SCALE)


def freeze_layer(
    wrapper: QuantizeWrapper, branch: int = 0, factor: np.ndarray | None = None
) -> tuple[list[FrozenWeight], Part]:
    """The frozen weights of a wrapped layer, and the float layer that computes with them.

    A folded BatchNormalization multiplies channel scales, which leaves the trained integers as
    they are (up to the sign of gamma), and joins the bias; both in float64. So does a `factor` of
    the output, float64 of shape `(channels,)` or `(1,)`.

    Raises:
        FreezeError: if a folded weight or bias overflows float32.
    """
    layer, norms = wrapper.layer, wrapper.normalizations
    norm = norms[branch] if norms else None
    frozen = [_frozen(wrapper, name, branch) for name in wrapper.weight_specs]
    if factor is not None:
        frozen = [
            _times(weight, factor, wrapper, name)
            for name, weight in zip(wrapper.weight_specs, frozen, strict=True)
        ]
    by_variable = {
        id(getattr(layer, name)): weight.values
        for name, weight in zip(wrapper.weight_specs, frozen, strict=True)
    }
    values = [by_variable[id(v)] if id(v) in by_variable else array_of(v) for v in layer.weights]
    changes: dict[str, Any] = {"dtype": "float32"}
    if wrapper.facts.hides:
        changes["kind"] = ConstantKind.ADD
    # Training rounds in float32: where float64 would fall on the other side, training is right.
    rounded = wrapper.bias_on_grid(branch)
    moved: Any = wrapper.moved_by_inputs(branch) if rounded is None else None
    if rounded is not None and factor is not None:
        rounded = (rounded.astype(np.float64) * factor).astype(np.float32)
    if norm is not None:
        scales, offset = _normalization(norm)
        bias = np.asarray(array_of(layer.bias), np.float64) if layer.use_bias else 0.0
        bias = offset + bias * scales + (0.0 if moved is None else moved)
        bias = bias * (1.0 if factor is None else factor)
        _check_fits(bias, layer.name)
        values = [values[0], bias.astype(np.float32) if rounded is None else rounded]
        changes["use_bias"] = True
    elif rounded is not None:
        values = [
            rounded if v is layer.bias else value
            for v, value in zip(layer.weights, values, strict=True)
        ]
    elif (factor is not None or moved is not None) and getattr(layer, "bias", None) is not None:
        bias = array_of(layer.bias) + (0.0 if moved is None else moved)
        bias = (bias * (1.0 if factor is None else factor)).astype(np.float32)
        values = [
            bias if v is layer.bias else value
            for v, value in zip(layer.weights, values, strict=True)
        ]
    if isinstance(layer, TiedWeight) and len(layer.shape) == 2 and not layer.products:
        # The one is its kernel in products, the other in products with it transposed.
        frozen = [*frozen, *(one.transposed() for one in frozen)]
    if isinstance(layer, TiedWeight):
        values = [values[0], *wrapper.tied_biases_on_grid()]
    if branch:
        changes["name"] = f"{layer.name}_branch_{branch}"
    return frozen, Part(clone(layer, **changes), values)


def _frozen(wrapper: QuantizeWrapper, name: str, branch: int) -> FrozenWeight:
    spec = wrapper.weight_specs[name]
    scale = np.asarray(wrapper.scale(name, branch), np.float32)
    integers = np.rint(np.asarray(wrapper.on_grid(name, branch), np.float32) / scale)
    if wrapper.normalizations:
        factor = _normalization(wrapper.normalizations[branch])[0]
        factor = factor.reshape(wrapper.channel_shape(name))
        if wrapper.folds_before(name):
            integers = np.where(factor == 0.0, 0.0, integers)
        else:
            integers = integers * np.sign(factor)
            folded = scale.astype(np.float64) * np.abs(factor)
            _check_fits(folded * spec.qmax, wrapper.layer.name)
            scale = folded.astype(np.float32)
    integers = np.where(scale < np.finfo(np.float32).tiny, 0.0, integers)
    idle = wrapper.idle_inputs(name)
    if idle is not None:
        integers = np.where(idle, 0.0, integers)
    _check_clusters(wrapper, name, integers)
    shared = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
    empty = ~np.any(integers, axis=shared, keepdims=True)
    return FrozenWeight(
        name=f"{wrapper.layer.name}/{name}",
        integers=integers.astype(np.int8),
        scale=np.where(empty, _EMPTY, scale),
        bits=spec.bits,
        per_channel=spec.axis is not None,
    )


def _times(
    weight: FrozenWeight, factor: np.ndarray, wrapper: QuantizeWrapper, name: str
) -> FrozenWeight:
    """A weight whose output is multiplied: the same integers, but for signs, on other scales."""
    if factor.size > 1:
        factor = factor.reshape(wrapper.channel_shape(name))
    scale = weight.scale.astype(np.float64) * np.abs(factor)
    _check_fits(scale * 127.0, wrapper.layer.name)
    scale = scale.astype(np.float32)
    integers = np.where(scale < np.finfo(np.float32).tiny, 0, weight.integers * np.sign(factor))
    shared = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
    empty = ~np.any(integers, axis=shared, keepdims=True)
    return dataclasses.replace(
        weight, integers=integers.astype(np.int8), scale=np.where(empty, _EMPTY, scale)
    )


def output_factor(layer: Any) -> np.ndarray | None:
    """The factor of a layer that only multiplies, float64 of shape `(channels,)` or `(1,)`."""
    if not is_factor(layer):
        return None
    return _affine(layer)[0]


def _check_clusters(wrapper: QuantizeWrapper, name: str, integers: np.ndarray) -> None:
    """A gamma that changed its sign in training turns its channel's integers over."""
    kept = wrapper.preserve.get(name)
    found = np.unique(integers).size
    if kept and kept.clusters and found > kept.clusters:
        raise FreezeError(
            f"Expected at most {kept.clusters} distinct integers in '{name}' of "
            f"'{wrapper.layer.name}', whose clusters are preserved. Received: {found}, as a gamma "
            "of its BatchNormalization changed its sign or became zero. Train with "
            "kqat.FreezeBatchNorm, or gamma_constraint=keras.constraints.NonNeg()."
        )


def _check_fits(numbers: np.ndarray, layer_name: str) -> None:
    if not np.all(np.abs(numbers) <= np.finfo(np.float32).max):
        raise FreezeError(
            f"Expected numbers that fit float32. Received: '{layer_name}', whose weights or bias "
            "do not with its normalization folded in. Give that a larger epsilon."
        )


def _normalization(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset per channel of a BatchNormalization in inference, in float64."""
    mean, variance = (
        np.asarray(array_of(v), np.float64) for v in (norm.moving_mean, norm.moving_variance)
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # `_check_fits` looks at it.
        factor = 1.0 / np.sqrt(variance + norm.epsilon)
        if norm.scale:
            factor = factor * np.asarray(array_of(norm.gamma), np.float64)
        offset = -mean * factor
    if norm.center:
        offset = offset + np.asarray(array_of(norm.beta), np.float64)
    return factor, offset


def channelwise(
    layer: Any,
    channels: int,
    free_name: Callable[[str], str] = lambda name: name,
    rounded: np.ndarray | None = None,
    as_sum: bool = False,
) -> tuple[list[FrozenWeight], Callable[..., Any]]:
    """`x * scale + offset` per channel as one integer operator with exact weights.

    A 1x1 depthwise convolution has one weight per channel, which is ±127 steps of the channel's
    own scale: no rounding error, and one rounding of the output where MUL and ADD would have two.
    One scale for all without an offset is a multiplication by a constant, and `x + c` and `c - x`
    can be an addition or subtraction. One number is 127 steps of its own scale there as well.

    Args:
        layer: an affine layer.
        channels: size of the last axis of its input.
        free_name: a name -> one that no other layer of the frozen model bears.
        rounded: the offset as training rounds it, of shape `(channels,)` or `(1,)`, if it does.
        as_sum: whether the layer is to be a sum; see `QuantizeWrapper.ships_as_sum`.

    Raises:
        FreezeError: if a factor or offset overflows float32.
    """
    factor, offset = _affine(layer)
    _check_fits(np.concatenate([factor, offset]), layer.name)
    if not np.any(offset) and np.all(factor == factor.flat[0]):
        weight = _single_steps(layer.name, factor.flat[:1].reshape(()), False)
        return [weight], layers.Rescaling(float(weight.values), name=layer.name, dtype="float32")
    if as_sum:
        weight = _single_steps(layer.name, offset.flat[:1].reshape(()), False, "offset")
        kind = ConstantKind.ADD if factor.flat[0] > 0 else ConstantKind.SUBTRACT
        one = WithConstant(kind, [], name=layer.name, dtype="float32")
        return [weight], Part(one, [weight.values])
    kernel = np.broadcast_to(factor, (channels,)).reshape(1, 1, channels, 1)
    weight = _single_steps(layer.name, kernel, True)
    bias = np.broadcast_to(offset if rounded is None else rounded, (channels,)).astype(np.float32)
    options = {"data_format": "channels_last", "dtype": "float32"}
    part = Part(layers.DepthwiseConv2D(1, name=layer.name, **options), [weight.values, bias])
    return [weight], _AsImage(part, free_name)


def gate_numbers(state: LstmState, frozen: Mapping[str, FrozenWeight]) -> dict[str, GateNumbers]:
    """The numbers of the gates of `state`, of its frozen weights by their names."""
    return {
        gate: GateNumbers(
            kernel=frozen[f"{gate}_kernel"].integers,
            kernel_scale=np.float32(frozen[f"{gate}_kernel"].scale.item()),
            recurrent=frozen[f"{gate}_recurrent"].integers,
            recurrent_scale=np.float32(frozen[f"{gate}_recurrent"].scale.item()),
            bias=np.asarray(getattr(state, f"{gate}_bias", np.zeros(state.units)), np.float32),
        )
        for gate in state.gates
    }


class _AsImage:
    """Calls a 4-D layer that works channel by channel on values of any rank."""

    def __init__(self, part: Part, free_name: Callable[[str], str]):
        self.part = part
        self.free_name = free_name
        # A layer may be called often, and each of its calls needs the same two.
        self.reshapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def __call__(self, x: Any) -> Any:
        shape = tuple(x.shape[1:])
        if len(shape) == 3:
            return self.part(x)
        if shape not in self.reshapes:
            rows = int(np.prod(shape[:-2], dtype=int)) if len(shape) > 2 else 1
            columns = shape[-2] if len(shape) > 1 else 1
            name = f"kqat_{self.part.layer.name}"
            ending = f"_{len(self.reshapes)}" if self.reshapes else ""
            image, back = (self.free_name(f"{name}_{part}{ending}") for part in ("image", "shape"))
            self.reshapes[shape] = (
                layers.Reshape((rows, columns, shape[-1]), name=image, dtype="float32"),
                layers.Reshape(shape, name=back, dtype="float32"),
            )
        before, after = self.reshapes[shape]
        return after(self.part(before(x)))


def _single_steps(
    name: str, factor: np.ndarray, per_channel: bool, part: str = "scale"
) -> FrozenWeight:
    scale = (np.abs(factor) / 127.0).astype(np.float32)
    scale = np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(0))
    integers = np.where(scale > 0, np.sign(factor) * 127, 0).astype(np.int8)
    return FrozenWeight(
        name=f"{name}/{part}",
        integers=integers,
        scale=np.where(scale > 0, scale, _EMPTY),
        bits=8,
        per_channel=per_channel,
    )


def _affine(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset of an affine layer, float64, of shape `(channels,)` or `(1,)`."""
    if isinstance(layer, layers.BatchNormalization):
        return _normalization(layer)
    if isinstance(layer, layers.Rescaling):
        parts = np.broadcast_arrays(np.float64(layer.scale), np.float64(layer.offset))
        return np.atleast_1d(parts[0]), np.atleast_1d(parts[1])
    if isinstance(layer, ChannelAffine):
        gamma = np.ones(1) if layer.gamma is None else np.asarray(layer.gamma, np.float64)
        beta = np.zeros(1) if layer.beta is None else np.asarray(layer.beta, np.float64)
        return np.broadcast_arrays(gamma, beta)[0], np.broadcast_arrays(gamma, beta)[1]
    if isinstance(layer, layers.Normalization):
        mean, variance = (
            np.asarray(v, np.float64).reshape(-1) for v in (layer.mean, layer.variance)
        )
        deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
        if layer.invert:
            return deviation, mean
        return 1.0 / deviation, -mean / deviation
    raise UnsupportedLayerError(
        f"Expected a layer that scales and shifts channels. Received: '{layer.name}' of type "
        f"{type(layer).__name__}, wrapped without a grid for a weight. Name its weights' grids."
    )
