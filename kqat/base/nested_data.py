"""`flat_data`: data in the nested structure of a model's inputs, as one level of arrays."""

from collections.abc import Iterator, Mapping
from typing import Any


def flat_data(data: Any, count: int, structure: Any = None) -> Any:
    """Data for a model of `count` inputs, without dicts and lists inside dicts and lists.

    Data of the model's own nested `structure` become a list in the order in which Keras flattens
    it: where lists are inside, inputs are called by their own names, and not by keys.

    `{"meta": {"age": x}, "pair": [y, z]}` becomes `{"meta_age": x, "pair_0": y, "pair_1": z}`, as
    files name such inputs. A list becomes one in the order in which Keras flattens it, if that
    makes one array per input. What has one level comes back as it is.
    """
    if _is_nested(structure) and _is_alike(data, structure):
        return list(_leaves(data))
    if isinstance(data, Mapping):
        nested = any(isinstance(part, Mapping) or _is_list(part) for part in data.values())
        return dict(_joined(data)) if nested else data
    if isinstance(data, list | tuple) and len(data) != count:
        leaves = list(_leaves(data))
        if len(leaves) == count and all(hasattr(leaf, "shape") for leaf in leaves):
            return type(data)(leaves)
    return data


def _is_nested(structure: Any) -> bool:
    parts = structure.values() if isinstance(structure, Mapping) else structure
    return isinstance(structure, Mapping | list | tuple) and any(
        isinstance(part, Mapping | list | tuple) for part in parts
    )


def _is_alike(data: Any, structure: Any) -> bool:
    """Whether data have the keys and the lengths of a structure, with an array for each leaf."""
    if isinstance(structure, Mapping):
        return (
            isinstance(data, Mapping)
            and data.keys() == structure.keys()
            and all(_is_alike(data[key], part) for key, part in structure.items())
        )
    if isinstance(structure, list | tuple):
        return (
            isinstance(data, list | tuple)
            and len(data) == len(structure)
            and all(map(_is_alike, data, structure))
        )
    return hasattr(data, "shape")


def _is_list(part: Any) -> bool:
    return isinstance(part, list | tuple) and all(hasattr(x, "shape") for x in part)


def _joined(data: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, part in data.items():
        if isinstance(part, Mapping) or _is_list(part):
            inside = part if isinstance(part, Mapping) else dict(enumerate(part))
            yield from ((f"{key}_{inner}", value) for inner, value in _joined(inside))
        else:
            yield str(key), part


def _leaves(data: Any) -> Iterator[Any]:
    """The arrays of a structure; a dict's in the order of its keys, as in `keras.tree`."""
    if isinstance(data, Mapping):
        for key in sorted(data):
            yield from _leaves(data[key])
    elif isinstance(data, list | tuple):
        for part in data:
            yield from _leaves(part)
    else:
        yield data
