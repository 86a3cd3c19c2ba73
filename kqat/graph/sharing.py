"""Weights that a model reads in more than one place: copies of them would train apart."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from kqat.graph.keras_internals import sources_of
from kqat.graph.tracer import Graph


@dataclasses.dataclass(frozen=True)
class Read:
    """One place where a weight is read.

    Attributes:
        place: equal for reads that are one.
        name: of the user's layer or operation.
        whole: whether it reads the numbers of the weight, in whatever order, and all of them.
        is_float: whether the layer that reads it stays float.
    """

    place: tuple[int, ...]
    name: str
    whole: bool = True
    is_float: bool = False


@dataclasses.dataclass(frozen=True)
class SharedWeight:
    """A trained variable of the user's model that is read in more than one place."""

    variable: Any
    reads: tuple[Read, ...]

    @property
    def readers(self) -> str:
        """Who reads it, for messages: `"'a' and 'b'"`."""
        names = list(dict.fromkeys(read.name for read in self.reads))
        return " and ".join(map(repr, names[:3])) + (" twice" if len(names) == 1 else "")


class WeightReads:
    """Where a model reads each of its trained weights, noted while its layers are opened.

    A layer that is called more than once is one place if it stays one layer. One that is opened is
    as many places as it has calls, until `merged` says that its calls became one again.
    """

    def __init__(self) -> None:
        self._reads: dict[int, tuple[Any, list[Read]]] = {}
        self._calls: dict[int, tuple[Any, int]] = {}
        self._merged: set[int] = set()
        self._alive: list[Any] = []  # Two objects that live at the same time have two ids.

    def note_model(self, graph: Graph, is_float: Callable[[Any], bool | None]) -> None:
        """Notes what the nodes of a model read.

        Args:
            graph: of the model.
            is_float: node -> whether it stays float; `None` for one that is opened later.
        """
        for index, node in enumerate(graph.nodes):
            stays = is_float(node)
            if stays is not None:
                self._note_node(node, (index,), node.name, stays)

    def note_opened(self, graph: Graph, opened: Any, name: str) -> None:
        """Notes what was read where something was opened.

        Args:
            graph: of what it computes.
            opened: the layer, which may be opened for several calls; or the one node.
            name: of the user's layer.
        """
        _, calls = self._calls.get(id(opened), (opened, 0))
        self._calls[id(opened)] = opened, calls + 1
        for index, node in enumerate(graph.nodes):
            self._note_node(node, (id(opened), calls, index), name, False)

    def _note_node(self, node: Any, place: tuple[int, ...], name: str, is_float: bool) -> None:
        self._alive.append(node)
        for variable in getattr(node.layer, "trainable_variables", ()):
            # A layer inside others is one layer wherever it is called, but not for both its ways.
            way = int(bool(node.kwargs.get("reverse", node.args[1:2] == (True,))))
            self._add(variable, Read((id(node.layer), way), name, True, is_float))
        for value in keras.tree.flatten((node.args, node.kwargs)):
            if isinstance(value, keras.Variable):
                for source in sources_of(value):
                    whole = value is source or fingerprint(value) == fingerprint(source)
                    self._add(source, Read(place, name, whole, is_float))

    def _add(self, variable: Any, read: Read) -> None:
        if variable.trainable:
            self._reads.setdefault(id(variable), (variable, []))[1].append(read)

    def opened_again(self) -> list[Any]:
        """The layers that were opened for more than one call."""
        return [layer for layer, calls in self._calls.values() if calls > 1]

    def merged(self, layer: Any) -> None:
        """Says that the parts of all calls of an opened layer are those of its first."""
        self._merged.add(id(layer))

    def shared(self) -> list[SharedWeight]:
        """The weights that are read in more than one place."""
        found = []
        for variable, reads in self._reads.values():
            places = {self._place(read.place): read for read in reads}
            if len(places) > 1:
                found.append(SharedWeight(variable, tuple(places.values())))
        return found

    def _place(self, place: tuple[int, ...]) -> tuple[int, ...]:
        one = len(place) == 3 and place[0] in self._merged
        return (place[0], 0, place[2]) if one else place


def fingerprint(weight: Any) -> tuple[int, int]:
    """A number that weights of the same numbers have in common, in whatever order they stand."""
    bits = np.asarray(weight, np.float32).reshape(-1).view(np.uint32).astype(np.uint64)
    bits = (bits + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits.size, int((bits ^ (bits >> np.uint64(31))).sum(dtype=np.uint64))


def varies(weight: Any) -> bool:
    """Whether a weight is told from others by its numbers."""
    array = np.asarray(weight)
    return array.size > 1 and bool(array.min() != array.max())


def holders(graph: Graph, weight: Any) -> Iterator[tuple[Any, Any]]:
    """The layers of a graph with a trained variable of the same numbers, and that variable."""
    wanted, layers = fingerprint(weight), {id(n.layer): n.layer for n in graph.nodes}
    for layer in layers.values():
        for variable in _trained(layer):
            if int(np.prod(variable.shape)) == wanted[0] and fingerprint(variable) == wanted:
                yield layer, variable


def _trained(layer: Any) -> Iterable[Any]:
    return getattr(layer, "trainable_variables", ())
