"""Reads a tfmot `QuantizeConfig` for one layer, and makes the `kqat.QuantizeConfig` for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kqat.base import PolicyError, SpecError, UnsupportedLayerError
from kqat.config import QuantizeConfig
from kqat.grids import (
    INT8_ACTIVATION,
    Fixed,
    LastValue,
    MinMax,
    MovingAverage,
    QuantSpec,
    RangeMethod,
    arithmetic,
)
from kqat.registry import ACTIVATIONS, LayerRule, Output, rule_for
from kqat.tfmot.keras2_view import Keras2View, original

PACKAGE = "tensorflow_model_optimization"
# The decay that tfmot's MovingAverageQuantizer always uses.
DECAY = 0.999

# tfmot's quantizer -> our range method.
RANGES: dict[str, Callable[[Any], RangeMethod]] = {
    "MovingAverageQuantizer": lambda quantizer: MovingAverage(DECAY),
    "LastValueQuantizer": lambda quantizer: LastValue(),
    "AllValuesQuantizer": lambda quantizer: MinMax(),
    "FixedQuantizer": lambda quantizer: Fixed(quantizer.init_min, quantizer.init_max),
}
NONE = "NoQuantizer"
# The module of tfmot's quantizers that keep weights pruned or clustered.
_PRESERVING = "collab_opts"
# Activations that fuse into the layer's kernel, so that the layer has one output grid only.
ONE_GRID = tuple(
    name for name, row in ACTIVATIONS.items() if row.clamp or row.output is Output.VANISHES
)

Grid = tuple[QuantSpec, RangeMethod]


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a tfmot config asks for one layer.

    Attributes:
        asker: name of the config's class.
        layer: the Keras 3 layer.
        where: the layer's name and class, for messages.
        weights: attribute of the layer -> grid.
        output: grid and range method of the layer's output, or `None`.
    """

    asker: str
    layer: Any
    where: str
    weights: dict[str, QuantSpec]
    output: Grid | None


def read(config: Any, layer: Any, name: str) -> Wish:
    """What `config` asks for `layer`, whose name in messages is `name`.

    Raises:
        PolicyError: if no `kqat.QuantizeConfig` can express it.
    """
    where = f"layer '{name}' of type {type(layer).__name__}"
    asker = type(config).__name__
    try:
        weights, output = _weights(config, layer, where), _output(config, layer, where)
    except SpecError as error:
        raise PolicyError(f"{error} Asked by {asker} for {where}.") from error
    return Wish(asker, layer, where, weights, output)


def resolve(wish: Wish, *, inside: bool = False) -> QuantizeConfig | None:
    """The `kqat.QuantizeConfig` that does what `wish` asks.

    Args:
        wish: from `read`.
        inside: whether the next layer is computed in the same kernel. The output of this layer is
            then not a tensor in the file and needs no quantizer.

    Returns:
        The config, or `None` if nothing is quantized and the layer stays float.

    Raises:
        PolicyError: if the layer's integer kernel cannot do it.
        UnsupportedLayerError: if the layer has no integer form.
    """
    if not wish.weights and wish.output is None:
        return _quantizes_nothing(wish.layer, inside)
    rule = row(wish.layer)
    if wish.output is not None:
        _check_output(wish.output, rule, wish, inside)
    elif rule.output is Output.OWN and not inside:
        raise PolicyError(
            f"Expected a quantizer for the output of {wish.where}: an integer kernel has integer "
            f"outputs. Received: none from get_activations_and_quantizers and "
            f"get_output_quantizers of {wish.asker}. Return one, or give None as the config to "
            "leave the layer float."
        )
    spec, method = wish.output or (INT8_ACTIVATION, MovingAverage(DECAY))
    weights = _fit(rule, wish)
    try:
        return QuantizeConfig(weights=weights, activation=spec, activation_range=method)
    except PolicyError as error:
        raise PolicyError(f"{error} Asked by {wish.asker} for {wish.where}.") from error


def row(layer: Any) -> LayerRule:
    """The registry's row of `layer`; for an operation, a row with a range of its own."""
    is_layer = isinstance(layer, keras.layers.Layer)
    return rule_for(layer) if is_layer else LayerRule(output=Output.OWN)


def _quantizes_nothing(layer: Any, inside: bool) -> QuantizeConfig | None:
    try:
        rule = row(layer)
    except UnsupportedLayerError:
        return None
    if _weights_of(layer) and not rule.affine:
        return None
    return QuantizeConfig() if inside or rule.output is not Output.OWN else None


def _ask(config: Any, method: str, layer: Any, where: str) -> list[Any]:
    """What the method `get_…` of the user's class returns for `layer`; `None` means nothing.

    If the call raises, the method is called again with a view of the layer as Keras 2 has it, for
    which tfmot's own classes are written.
    """
    if isinstance(config, type):
        raise PolicyError(
            f"Expected an object with tfmot's methods for {where}. Received: the class "
            f"{config.__name__}. Make an object of it: {config.__name__}()."
        )
    asker = f"{type(config).__name__}.{method}"
    try:
        returned = getattr(config, method)(layer)
    except Exception as error:
        try:
            returned = getattr(config, method)(Keras2View(layer))
        except Exception as second:
            # A class written for Keras 2 gives the better reason in its second error.
            error = error if isinstance(second, AttributeError) else second
            raise PolicyError(
                f"Expected {asker} to use what {where} has in Keras 3: "
                f"{', '.join(_attributes(layer)) or 'neither weights nor an activation'}. "
                f"Received: {type(error).__name__}: {error}. Use these names in the class, or give "
                "the config only to the layers that it was written for, as in "
                "policy={keras.layers.Dense: config}."
            ) from error
    returned = [] if returned is None else returned
    pairs = method != "get_output_quantizers"
    if not isinstance(returned, list | tuple) or (pairs and not all(map(_is_pair, returned))):
        kind = "pairs" if pairs else "quantizers"
        raise PolicyError(
            f"Expected {asker} to return a list of {kind} for {where}. Received: "
            f"{_told(returned)}. Return a list, which may be empty."
        )
    return list(returned)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _told(value: Any) -> str:
    """What a user's method returned, without the numbers of its arrays."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_told, value))}]"
    if hasattr(value, "shape"):
        kind = f"{type(value).__name__} {getattr(value, 'name', '')}".strip()
        return f"{kind} of shape {tuple(value.shape)}"
    return repr(value)


def _weights_of(layer: Any) -> list[Any]:
    return getattr(layer, "weights", [])  # an operation has none


def _attributes(layer: Any) -> list[str]:
    names = [weight.name for weight in _weights_of(layer)]
    return [*names, "activation"] if hasattr(layer, "activation") else names


def _kind(quantizer: Any, what: str) -> str:
    """The name of tfmot's class whose `__call__` rounds for `quantizer`."""
    for cls in type(quantizer).__mro__:
        if _PRESERVING in cls.__module__:
            raise PolicyError(
                f"Expected a quantizer that only rounds for {what}. Received: {cls.__name__}, "
                "which also keeps the zeros or clusters of its weights in training. Use "
                "LastValueQuantizer, and kqat.quantize_model(…, preserve='sparsity') or 'clusters'."
            )
        if cls.__module__.split(".")[0] == PACKAGE:
            if cls.__name__ in RANGES or cls.__name__ == NONE:
                return cls.__name__
        elif "__call__" in vars(cls):
            break  # the user's own rounding, which integer kernels do not compute
    raise PolicyError(
        f"Expected one of tfmot's {', '.join(RANGES)} for {what}. Received: {quantizer!r}, which "
        "rounds in its own way. Use one of these, or a kqat.QuantizeConfig."
    )


def _weights(config: Any, layer: Any, where: str) -> dict[str, QuantSpec]:
    """The grid of each weight that the config quantizes, by attribute of the layer."""
    specs: dict[str, QuantSpec] = {}
    for weight, quantizer in _ask(config, "get_weights_and_quantizers", layer, where):
        name = getattr(weight, "name", "")
        if not any(getattr(owner, name, None) is weight for owner in _owners(layer)):
            raise PolicyError(
                f"Expected get_weights_and_quantizers to return weights of {where}: "
                f"{[w.name for w in _weights_of(layer)]}. Received: {_told(weight)}."
            )
        what = f"weight '{name}' of {where}"
        if _kind(quantizer, what) != NONE:
            specs[name] = _weight_spec(quantizer, what)
    return specs


def _owners(layer: Any) -> tuple[Any, ...]:
    """The layer, and the cell that a recurrent layer repeats."""
    return (layer, layer.cell) if hasattr(layer, "cell") else (layer,)


def _activations_of(layer: Any) -> list[Any]:
    """The functions that the layer applies, those of its gates among them."""
    names = ("activation", "recurrent_activation") if hasattr(layer, "cell") else ("activation",)
    found = [getattr(owner, name, None) for owner in _owners(layer) for name in names]
    return [function for function in found if function is not None]


def _weight_spec(quantizer: Any, what: str) -> QuantSpec:
    kind = _kind(quantizer, what)
    if kind != "LastValueQuantizer":
        raise PolicyError(
            f"Expected a LastValueQuantizer for {what}: kqat takes the range of weights from their "
            f"current values. Received: {kind}. Use "
            "LastValueQuantizer(num_bits=8, per_axis=True, symmetric=True, narrow_range=True)."
        )
    if not quantizer.symmetric:
        raise PolicyError(
            f"Expected a symmetric quantizer for {what}: integer kernels take no weight zero "
            f"point. Received: {kind}(symmetric={quantizer.symmetric}). Use symmetric=True."
        )
    return QuantSpec(
        bits=quantizer.num_bits,
        symmetric=True,
        narrow_range=bool(quantizer.narrow_range),
        axis="channel" if quantizer.per_axis else None,
    )


def _fit(rule: LayerRule, wish: Wish) -> Any:
    """The wish as `QuantizeConfig.weights`; planning checks the names against the registry."""
    for name, spec in wish.weights.items():
        if spec.bits > 8:
            raise PolicyError(
                f"Expected at most 8 bits for weight '{name}' of {wish.where}: integer kernels "
                f"take no wider weights. Received: num_bits={spec.bits}. Use num_bits=8."
            )
        if spec.axis is not None and rule.weights.get(name, ()) is None:
            raise PolicyError(
                f"Expected one scale for weight '{name}' of {wish.where}: its integer kernel takes "
                "no more. Received: per_axis=True. Use per_axis=False."
            )
    if rule.weights or not wish.weights:
        return wish.weights or None
    # A layer that is rewritten as several layers with kernels: one grid has to serve all of them.
    kernels = {w.name for w in wish.layer.weights if w.name.endswith("kernel")}
    if set(wish.weights) != kernels or len(set(wish.weights.values())) > 1:
        raise PolicyError(
            f"Expected the same quantizer for each of {sorted(kernels)} of {wish.where}, and for "
            f"no other weight. Received: {wish.weights}."
        )
    return next(iter(wish.weights.values()))


def _output(config: Any, layer: Any, where: str) -> Grid | None:
    """The grid that the config asks for the layer's output, or `None`."""
    quantizers = []
    for activation, quantizer in _ask(config, "get_activations_and_quantizers", layer, where):
        if not any(original(activation) is known for known in _activations_of(layer)):
            raise PolicyError(
                f"Expected get_activations_and_quantizers to return layer.activation of {where}; "
                f"no other activation can be quantized. Received: {activation!r}."
            )
        quantizers.append(quantizer)
    outputs = _ask(config, "get_output_quantizers", layer, where)
    if len(outputs) > 1:
        raise PolicyError(
            f"Expected one quantizer from get_output_quantizers for {where}. Received: "
            f"{len(outputs)}. Return one only."
        )
    what = f"the output of {where}"
    grids = [_grid(q, what) for q in (*quantizers, *outputs) if _kind(q, what) != NONE]
    if len(set(grids)) > 1:
        raise PolicyError(
            f"Expected one quantizer for {what}. Received: {' and '.join(map(_text, grids))}. "
            "Return the same from get_activations_and_quantizers and get_output_quantizers, or "
            "nothing from one of them."
        )
    return grids[0] if grids else None


def _grid(quantizer: Any, what: str) -> Grid:
    kind = _kind(quantizer, what)
    if getattr(quantizer, "per_axis", False):
        raise PolicyError(
            f"Expected one scale for {what}: integer kernels take one per activation. "
            f"Received: {kind}(per_axis=True). Use per_axis=False."
        )
    if quantizer.num_bits not in (8, 16) or quantizer.narrow_range:
        raise PolicyError(
            f"Expected all 256 integers of 8 bits for {what}, or all of 16 bits. Received: "
            f"{kind}(num_bits={quantizer.num_bits}, narrow_range={quantizer.narrow_range}). Use "
            "num_bits=8 or 16, narrow_range=False."
        )
    symmetric = bool(getattr(quantizer, "symmetric", False))
    if quantizer.num_bits == 16 and not symmetric:
        raise PolicyError(
            f"Expected a symmetric quantizer of 16 bits for {what}: int16 kernels take no zero "
            f"point. Received: {kind}(num_bits=16, symmetric=False). Use symmetric=True."
        )
    return QuantSpec(bits=quantizer.num_bits, symmetric=symmetric), RANGES[kind](quantizer)


def _text(grid: Grid) -> str:
    spec, method = grid
    return f"{'symmetric ' if spec.symmetric else ''}{method}"


def _check_output(output: Grid, rule: LayerRule, wish: Wish, inside: bool) -> None:
    """Refuses a grid that the layer's integer kernel cannot write."""
    spec, method = output
    given = isinstance(method, Fixed)
    fixed_range = rule.range_at(spec.bits)
    if fixed_range is not None:
        low, high = np.array(fixed_range, np.float32)
        # At 16 bits every zero point is 0.
        zero_point = 0 if spec.bits == 16 else int(arithmetic.nudge(low, high, QuantSpec())[1])
        if (spec.symmetric and zero_point) or (given and method != Fixed(*fixed_range)):
            raise PolicyError(
                f"Expected the range {fixed_range} with zero point {zero_point} for the "
                f"output of {wish.where}: its integer kernel writes no other. Received: "
                f"{_text(output)}. Return no quantizer for it."
            )
    function = getattr(wish.layer, "activation", keras.activations.linear)
    activation = keras.activations.serialize(function)
    follower = "the next layer" if inside else f"its activation {activation}"
    if not isinstance(wish.layer, keras.layers.Layer):
        # The operation is rewritten as layers later.
        follower, inside = "another layer", True
    if given and (inside or (wish.layer.weights and activation not in ONE_GRID)):
        raise PolicyError(
            f"Expected an observed range for the output of {wish.where}: {follower} comes after "
            f"it under the same config or kernel. Received: {_text(output)}. Use a "
            "MovingAverageQuantizer here, and put the FixedQuantizer on a separate layer after it."
        )
