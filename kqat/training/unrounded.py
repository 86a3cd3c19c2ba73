"""What the nodes of a QAT model's graph compute where nothing, or only one weight, is rounded."""

from collections.abc import Mapping
from typing import Any

import keras

from kqat.graph import Node
from kqat.grids import QuantSpec, StepMethod
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.quantized_recurrence import QuantizedRecurrence
from kqat.training.weight_wrapper import QuantizeWrapper


def call_unrounded(node: Node, *args: Any, **kwargs: Any) -> Any:
    """What a node computes in inference without rounding; the clamp of a quantizer is kept.

    Inside a recurrence the weights stay rounded: it is one value here.
    """
    layer = node.layer
    if isinstance(layer, ActivationQuantizer):
        return layer.clamped(args[0])
    if isinstance(layer, QuantizedRecurrence):
        return layer.observe(args[0], lambda *_: None)
    if isinstance(layer, QuantizeWrapper):
        return call_with(layer, {}, *args, **kwargs)
    return layer(*args, **kwargs)


def call_with(
    wrapper: QuantizeWrapper, values: Mapping[str, Any], *args: Any, branch: int = 0, **kwargs: Any
) -> Any:
    """What a wrapped layer and its BatchNormalization compute in inference.

    Args:
        wrapper: the layer.
        values: name of a weight -> the value in its place; the others are as they are, unrounded.
        args, branch, kwargs: as of the wrapper's call.
    """
    replaced = {id(getattr(wrapper.layer, name)): value for name, value in values.items()}
    mapping = [(v, replaced.get(id(v), v.value)) for v in wrapper.layer.variables]
    with keras.StatelessScope(state_mapping=mapping):
        y = wrapper.layer(*args, **wrapper.layer_options(kwargs))
    norms = wrapper.normalizations
    return norms[branch](y, training=False) if norms else y


def rounded_as(
    wrapper: QuantizeWrapper, name: str, spec: QuantSpec, method: StepMethod, branch: int = 0
) -> Any:
    """The weight `name` rounded to another grid than its own, in the variable's shape."""
    value: Any = keras.ops.cast(getattr(wrapper.layer, name).value, "float32")
    fold = wrapper.input_fold(name)
    if wrapper.normalization is not None and spec.axis is None:
        behind = wrapper.fold_factor(name, branch)
        fold = behind if fold is None else fold * behind
    if fold is None:
        return method.fake_quantize(value, method.step(value, spec), spec)
    folded = value * fold
    return method.fake_quantize(folded, method.step(folded, spec), spec) / fold
