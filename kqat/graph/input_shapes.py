"""Inputs whose sizes are open, as in `keras.Input((None, None, 3))`, take the sizes of a file."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from kqat.base import ModelError
from kqat.graph.keras_internals import input_struct, maker_name, masks_told
from kqat.graph.tracer import keys_of, paths_of

Shape = tuple[int | None, ...]


def input_shapes(model: keras.Model) -> dict[str, Shape]:
    """The shape of each input without its batch, by what data and files call the input.

    Empty for a model of which Keras recorded no input.
    """
    return {key: tuple(t.shape[1:]) for key, t in _by_name(input_struct(model)).items()}


def input_keys(model: keras.Model) -> list[str]:
    """What data and files call the inputs, in the order in which Keras flattens their structure."""
    struct = input_struct(model)
    return list(keys_of(struct, tuple(maker_name(t) for t in keras.tree.flatten(struct))))


def has_open_sizes(shapes: Mapping[str, Shape]) -> bool:
    """Whether a size besides the batch is unknown."""
    return any(size is None for shape in shapes.values() for size in shape)


def fits(shape: Sequence[Any], declared: Shape) -> bool:
    """Whether `shape` has whole numbers, and those that are declared."""
    return len(shape) == len(declared) and all(
        isinstance(size, int) and size > 0 and known in (None, size)
        for size, known in zip(shape, declared, strict=True)
    )


def with_input_shapes(model: keras.Model, given: Any) -> keras.Model:
    """`model` called on inputs of the given shapes; it shares all weights with `model`.

    Args:
        model: a built Keras 3 model.
        given: a shape without the batch for a model of one input; else one for each input, as a
            list in the model's order or as a mapping by the inputs' names.

    Raises:
        ModelError: if there is not one shape for each input, or if a shape has open sizes, another
            rank than the input, or another size where the input has one.
    """
    declared = input_shapes(model)
    shapes = _by_key(given, declared, model.name)
    for key, shape in shapes.items():
        if not fits(shape, declared[key]):
            raise ModelError(
                f"Expected a shape without the batch that fits {declared[key]}, of whole numbers, "
                f"for input '{key}' of model '{model.name}'. Received: {shape}. Give the sizes "
                "that the file shall have where this one has None."
            )
    if shapes == declared:
        return model
    struct = input_struct(model)
    names = {id(t): key for key, t in _by_name(struct).items()}
    fresh = keras.tree.map_structure(
        lambda t: keras.Input(shapes[names[id(t)]], dtype=t.dtype, name=maker_name(t)), struct
    )
    with masks_told():
        return keras.Model(fresh, model(fresh), name=model.name)


def _by_name(struct: Any) -> dict[str, Any]:
    """The inputs by what data and files call them, a dict's in the order in which it was made."""
    flat = keras.tree.flatten(struct)
    keys = keys_of(struct, tuple(maker_name(t) for t in flat))
    names = {id(t): key for t, key in zip(flat, keys, strict=True)}
    return {names[id(t)]: t for t, _ in paths_of(struct)}


def _by_key(given: Any, declared: Mapping[str, Shape], name: str) -> dict[str, Shape]:
    found: dict[str, Any] = {}
    if isinstance(given, Mapping):
        found = dict(given)
    elif isinstance(given, Sequence):
        one = len(declared) == 1 and not any(isinstance(size, Sequence) for size in given)
        shapes = [given] if one else given
        found = dict(zip(declared, shapes, strict=False)) if len(shapes) == len(declared) else {}
    if set(found) != set(declared) or not all(isinstance(s, Sequence) for s in found.values()):
        raise ModelError(
            f"Expected a shape for each input of model '{name}': {dict(declared)}. Received: "
            f"{given}. Give a dict of input names and shapes without the batch."
        )
    return {key: tuple(found[key]) for key in declared}
