"""Regularizers of weights that a layer of the user's own made, for the layers that hold them now.

A stock layer's copy has them by its config. What a custom layer made by `add_weight` becomes the
kernel, factor or constant of another layer.
"""

from collections.abc import Iterator
from typing import Any

import keras

from kqat.graph import Graph, fingerprint, is_of_users, parts_of, sources_of


def keep_penalties(user: Graph, simple: Graph) -> None:
    """Gives the layers of `simple`, which are copies, the regularizers of the user's weights.

    Where weights of the same numbers have different ones, none is given.

    Args:
        user: the graph of the user's model.
        simple: the graph of the layers that take its place.
    """
    wanted: dict[tuple[int, int], list[Any]] = {}
    for variable in {id(v): v for v in _made_by_users(user)}.values():
        wanted.setdefault(fingerprint(variable), []).append(variable.regularizer)
    if not any(penalty is not None for found in wanted.values() for penalty in found):
        return
    for layer in {id(node.layer): node.layer for node in simple.nodes}.values():
        for variable in getattr(layer, "trainable_variables", ()):
            found = wanted.get(fingerprint(variable), [])
            if variable.regularizer is None and found and _are_one(found):
                _penalize(layer, variable, found[0])


def _made_by_users(graph: Graph) -> Iterator[Any]:
    """The trained variables that layers of the user's own hold, and that opened calls read."""
    for node in graph.nodes:
        if isinstance(node.layer, keras.layers.Layer):
            for part in parts_of(node.layer):
                if is_of_users(part):
                    yield from (v for v in part.variables if v.trainable)
        for value in keras.tree.flatten((node.args, node.kwargs)):
            if isinstance(value, keras.Variable):
                yield from (v for v in sources_of(value) if v.trainable)


def _are_one(penalties: list[Any]) -> bool:
    first = penalties[0]
    if first is None:
        return False
    return all(one is first or _config(one) == _config(first) is not None for one in penalties)


def _config(penalty: Any) -> Any:
    return keras.regularizers.serialize(penalty) if hasattr(penalty, "get_config") else None


def _penalize(layer: Any, variable: Any, penalty: Any) -> None:
    """Lets a layer have been made with a regularizer, if it knows one of the weight."""
    names = [name.lstrip("_") for name, value in vars(layer).items() if value is variable]
    for option in (f"{name}_regularizer" for name in names):
        if hasattr(layer, option):
            setattr(layer, option, penalty)
            variable.regularizer = penalty
