"""`check_finite`: refuses a QAT model whose training diverged, by the layers that show it."""

import math

import keras

from kqat.base import KqatError
from kqat.graph import non_finite_variables, parts_of
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import all_layers
from kqat.training.weight_wrapper import QuantizeWrapper

# So many places are named; where training diverged, most often all layers show it.
_NAMED = 3


def check_finite(
    qat: keras.Model, error: type[KqatError], *, ranges: bool = True, purpose: str = ""
) -> None:
    """Raises `error` where weights of a QAT model are NaN or infinite; with `ranges`, ranges too.

    `purpose` says what the model is to be for, as "to diagnose".
    """
    owners: dict[int, keras.layers.Layer] = {}
    for layer in all_layers(qat):
        # A part comes behind what it is a part of.
        for part in parts_of(layer):
            owners |= {id(variable): part for variable in part.weights}
    places: dict[str, None] = {}
    of_ranges = []
    for variable, broken in non_finite_variables(qat):
        owner = owners.get(id(variable))
        is_range = isinstance(owner, ActivationQuantizer)
        if is_range and not ranges:
            continue
        of_ranges.append(is_range)
        if isinstance(owner, ActivationQuantizer):
            places[f"the range of '{owner.label or owner.name}'"] = None
            continue
        layer = owner.layer if isinstance(owner, QuantizeWrapper) else owner
        where = f"of layer '{layer.name}'" if layer is not None else f"at '{variable.path}'"
        places[
            f"'{variable.name}' {where} ({broken:,} of {math.prod(variable.shape):,} numbers)"
        ] = None
    if not places:
        return
    named = list(places)[:_NAMED]
    more = f", and in {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    remedy = (
        "kqat.calibrate(model, data) finds the ranges anew."
        if all(of_ranges)
        else "Its training diverged: go back to a checkpoint, and train on with a lower learning "
        "rate, or with clipnorm=1.0 as an argument of the optimizer."
    )
    raise error(
        f"Expected finite weights{' and ranges' if ranges else ''}"
        f"{f' {purpose}' if purpose else ''}. Received: '{qat.name}' with NaN or infinity in "
        f"{', '.join(named)}{more}. {remedy}"
    )
