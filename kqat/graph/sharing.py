"""Weights that two layers or operations read: copies of them would train apart."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from kqat.base import ModelError
from kqat.graph.tracer import Graph


def check_apart(graph: Graph, variables: Iterable[Any], owner: str) -> None:
    """Checks that no trained weight is read in two places of a graph.

    The QAT model has a copy of each layer, and of each weight that an operation reads. A layer that
    is called twice is one layer; but two layers, or two operations, that read one variable would
    get a copy each.

    Args:
        graph: of a model, or of what a custom layer computes.
        variables: of that model or layer.
        owner: for the message: `"model 'name'"`.

    Raises:
        ModelError: naming the weight and who reads it.
    """
    variables = list(variables)
    own = {id(v) for v in variables}
    trained = {id(v): v for v in variables if v.trainable}
    reads = list(_read(graph))
    # What is computed of a variable, as its transpose, has the numbers of it.
    sizes = {int(np.size(weight)) for _, _, weight in reads if id(weight) not in own}
    contents = {
        _content(v): key for key, v in trained.items() if int(np.size(v)) in sizes and _varies(v)
    }
    readers: dict[int, dict[Any, str]] = {}
    for place, name, weight in reads:
        key = id(weight) if id(weight) in trained else None
        if key is None and id(weight) not in own and contents:
            key = contents.get(_content(weight))
        if key is not None:
            readers.setdefault(key, {})[place] = name
    for key, found in readers.items():
        if len(found) > 1:
            names = list(dict.fromkeys(found.values()))
            raise ModelError(
                f"Expected each trained weight of {owner} to be read in one place. Received: "
                f"'{trained[key].path}', which {' and '.join(map(repr, names[:3]))} read"
                f"{'' if len(names) > 1 else ' twice'}: each would train a copy of its own. Let "
                "one layer own it and call that layer twice, or freeze it by trainable = False."
            )


def _read(graph: Graph) -> Iterator[tuple[Any, str, Any]]:
    """Each weight that is read: by whom, as an object and by name, and the weight."""
    for node in graph.nodes:
        for variable in getattr(node.layer, "trainable_variables", ()):
            yield id(node.layer), node.name, variable
        for value in keras.tree.flatten((node.args, node.kwargs)):
            is_array = keras.ops.is_tensor(value) or isinstance(value, np.ndarray)
            if isinstance(value, keras.Variable) or is_array:
                yield node, node.name, value


def _varies(weight: Any) -> bool:
    """Whether a weight is told from others by its numbers."""
    array = np.asarray(weight)
    return array.size > 1 and bool(array.min() != array.max())


def _content(weight: Any) -> tuple[int, bytes]:
    """The numbers of a weight in whatever order, as a key."""
    array = np.sort(np.asarray(weight, np.float32), axis=None)
    return array.size, array.tobytes()
