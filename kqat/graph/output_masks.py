"""Masks that Keras hands on with a model's outputs, by which losses and metrics leave steps out.

They tell nothing about values, so the graph of a model is without them. They are kept beside it, as
functions of the model's inputs, and a QAT model's outputs bear them again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras

from kqat.graph.keras_internals import Opened, maker_of, mask_function, masks_of


@keras.saving.register_keras_serializable("kqat")
class MaskedOutput(keras.layers.Layer):
    """Its first input, with a mask for losses and metrics; takes an output and the model's inputs.

    Args:
        function: a functional model of the inputs that makes the mask, or its serialized form.
    """

    def __init__(self, function: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        if not isinstance(function, keras.Model):
            function = keras.saving.deserialize_keras_object(function)
        self.function = function

    def call(self, inputs: Sequence[Any]) -> Any:
        """The output."""
        return inputs[0]

    def compute_mask(self, inputs: Sequence[Any], previous_mask: Any = None) -> Any:
        """The mask of the output."""
        return self.function(list(inputs[1:]))

    def compute_output_spec(self, inputs: Sequence[Any]) -> Any:
        """The output's."""
        return keras.KerasTensor(inputs[0].shape, dtype=inputs[0].dtype)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with the function serialized."""
        function = keras.saving.serialize_keras_object(self.function)
        return {**super().get_config(), "function": function}


def without_output_masks(
    opened: Opened,
) -> tuple[Opened, tuple[keras.Model | None, ...], bool]:
    """An opened model without `MaskedOutput`s, and what makes the mask of each output.

    That is a model of all the inputs. It is `None` for an output without a mask, and where a mask
    does not come from the inputs by operations alone; the last value says whether one does not.
    """
    outputs = keras.tree.flatten(opened.output)
    bare: dict[int, Any] = {}
    masks: list[keras.Model | None] = []
    lost = False
    for tensor, mask in zip(outputs, masks_of(opened.function, outputs), strict=True):
        layer, inputs = maker_of(tensor)
        if isinstance(layer, MaskedOutput):
            bare[id(tensor)] = inputs[0]
            masks.append(layer.function)
        else:
            masks.append(None if mask is None else mask_function(opened.tensors, mask))
            lost = lost or (mask is not None and masks[-1] is None)
    if not bare:
        return opened, tuple(masks), lost
    output = keras.tree.map_structure(lambda t: bare.get(id(t), t), opened.output)
    function = keras.Function(list(opened.function.inputs), keras.tree.flatten(output))
    return dataclasses.replace(opened, function=function, output=output), tuple(masks), lost
