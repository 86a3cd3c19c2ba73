"""Weights that a model reads in more than one place: copies of them would train apart."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from kqat.base import ModelError
from kqat.graph.tracer import Graph
from kqat.graph.values import fingerprint, sources_of, varies

# Operations that read another weight than their second operand: its inverse, or its negative.
_CHANGE_SECOND = frozenset(("Divide", "TrueDivide", "Subtract"))


@dataclasses.dataclass(frozen=True)
class Read:
    """One place where a weight is read.

    Attributes:
        place: equal for reads that are one.
        name: of the user's layer or operation.
        whole: whether it reads the numbers of the weight, in whatever order, and all of them.
        is_float: whether the layer that reads it stays float.
        numbers: what it reads, where that is not the whole weight.
        value: the variable that holds what it reads.
    """

    place: tuple[int, ...]
    name: str
    whole: bool = True
    is_float: bool = False
    numbers: np.ndarray | None = dataclasses.field(default=None, compare=False)
    value: Any = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class SharedWeight:
    """A trained variable of the user's model that is read in more than one place."""

    variable: Any
    reads: tuple[Read, ...]

    @property
    def readers(self) -> str:
        """Who reads it, for messages: `"'a' and 'b' read"`."""
        names = list(dict.fromkeys(read.name for read in self.reads))
        both = len(names) > 1
        return f"{' and '.join(map(repr, names[:3]))} {'read' if both else 'reads twice'}"

    @property
    def is_divided(self) -> bool:
        """Whether the reads are parts of the weight that have no number in common.

        A copy of each part then trains as the weight does. Known only where the numbers of the
        weight are told apart.
        """
        every = np.asarray(self.variable, np.float32).reshape(-1)
        read = np.concatenate([self._numbers(read).reshape(-1) for read in self.reads])
        return _are_distinct(every) and _are_distinct(read) and bool(np.all(np.isin(read, every)))

    @property
    def is_of_vectors(self) -> bool:
        """Whether each read is a vector, and some are computed from the weight, number by number.

        The reads may also be one number each, which may be picked out of the weight.
        """
        read = [self._numbers(read) for read in self.reads]
        if all(read.whole for read in self.reads) or any(_long_axes(v.shape) > 1 for v in read):
            return False
        sizes = {v.size for v in read}
        return sizes == {1} or sizes == {int(np.prod(self.variable.shape))}

    def _numbers(self, read: Read) -> np.ndarray:
        whole = read.numbers is None
        return np.asarray(self.variable, np.float32) if whole else np.asarray(read.numbers)


class WeightReads:
    """Where a model reads each of its trained weights, noted while its layers are opened.

    A layer that is called more than once is one place if it stays one layer. One that is opened is
    as many places as it has calls, until `merged` says that its calls became one again.
    """

    def __init__(self) -> None:
        self._reads: dict[int, tuple[Any, list[Read]]] = {}
        self._calls: dict[int, tuple[Any, int]] = {}
        self._merged: set[int] = set()
        self._constants: list[tuple[str, Any]] = []
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
        # Beside those that read, a call may have operations of its own: a cast of what it is given.
        reading = [node for node in graph.nodes if _reads_any(node)]
        for index, node in enumerate(reading):
            self._note_node(node, (id(opened), calls, index), name, False)

    def _note_node(self, node: Any, place: tuple[int, ...], name: str, is_float: bool) -> None:
        self._alive.append(node)
        for variable in _trained(node.layer):
            # A layer is one place wherever it is called, but for a table that it reads both ways.
            both = not is_float and variable is getattr(node.layer, "embeddings", None)
            reverse = node.kwargs.get("reverse", node.args[1:2] == (True,))
            way = int(both and bool(reverse) and getattr(node.layer, "tie_weights", False))
            self._add(variable, Read((id(node.layer), way), name, True, is_float))
        changes = type(node.layer).__name__ in _CHANGE_SECOND
        for value in keras.tree.flatten((node.args, node.kwargs)):
            if isinstance(value, keras.Variable):
                changed = changes and any(value is second for second in node.args[1:2])
                for source in sources_of(value):
                    same = value is source or fingerprint(value) == fingerprint(source)
                    whole = same and not changed
                    numbers = None if whole else np.array(value, np.float32)
                    self._add(source, Read(place, name, whole, is_float, numbers, value))
            elif isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
                self._constants.append((name, value))

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
        """The weights that are read in more than one place.

        Where all of them read the same that is computed of a weight, as steps of a loop do, that is
        the weight: it trains in its place.
        """
        found: dict[int, SharedWeight] = {}
        for variable, reads in self._reads.values():
            places = {self._place(read.place): read for read in reads}
            if len(places) > 1:
                shared = self._of_one_value(tuple(places.values()))
                shared = shared or SharedWeight(variable, tuple(places.values()))
                found[id(shared.variable)] = shared
        return list(found.values())

    def _of_one_value(self, reads: tuple[Read, ...]) -> SharedWeight | None:
        """What reads have in common that is computed of a weight, if its numbers tell it apart."""
        value = reads[0].value
        if value is None or not all(read.value is value and not read.whole for read in reads):
            return None
        known = {fingerprint(variable) for variable, _ in self._reads.values()}
        if not varies(value) or fingerprint(value) in known:
            return None
        whole = (dataclasses.replace(read, whole=True, numbers=None) for read in reads)
        return SharedWeight(value, tuple(whole))

    def copied(self) -> tuple[Any, str] | None:
        """A trained weight whose numbers stand as a constant elsewhere, and in which layer."""
        sizes = {int(np.size(value)) for _, value in self._constants} - {0, 1}
        known = [v for v, _ in self._reads.values() if int(np.prod(v.shape)) in sizes]
        trained = {fingerprint(v): v for v in known if varies(v)}
        found = ((trained.get(fingerprint(value)), name) for name, value in self._constants)
        return next(((v, name) for v, name in found if v is not None), None) if trained else None

    def are_told_apart(self, found: Sequence[SharedWeight]) -> bool:
        """Whether copies of shared weights are known by their numbers.

        They are not where all its numbers are equal, or another weight has the same ones; parts of
        one are not where any two of its numbers are equal.
        """
        sizes = {int(np.prod(shared.variable.shape)) for shared in found}
        read = {id(v): v for v, _ in self._reads.values()}
        read |= {id(shared.variable): shared.variable for shared in found}
        every = [v for v in read.values() if int(np.prod(v.shape)) in sizes]
        counts = Counter(map(fingerprint, every))
        return all(
            varies(shared.variable)
            and counts[fingerprint(shared.variable)] == 1
            and (all(read.whole for read in shared.reads) or _are_distinct(shared.variable))
            for shared in found
        )

    def _place(self, place: tuple[int, ...]) -> tuple[int, ...]:
        one = len(place) == 3 and place[0] in self._merged
        return (place[0], 0, place[2]) if one else place


def check_as_many(model: keras.Model, copy: keras.Model, instead: str) -> None:
    """Checks that a copy of a model trains as many numbers as the model.

    A layer whose config holds another layer, or that reads another one's weights, has them twice in
    a copy that is made layer by layer.

    Args:
        model, copy: the user's model and what was made of it.
        instead: what to do otherwise, for the message.

    Raises:
        ModelError: if the copy trains more.
    """
    before, after = (
        sum(int(np.prod(v.shape)) for v in {id(v): v for v in one.trainable_variables}.values())
        for one in (model, copy)
    )
    if after > before:
        raise ModelError(
            f"Expected a model whose layers can be copied one by one. Received: '{model.name}', "
            f"in which layers share weights: its copy would train {after:,} numbers in place of "
            f"{before:,}. {instead}"
        )


def holders(graph: Graph, weight: Any) -> Iterator[tuple[Any, Any]]:
    """The layers of a graph with a trained variable of the same numbers, and that variable."""
    wanted, layers = fingerprint(weight), {id(n.layer): n.layer for n in graph.nodes}
    for layer in layers.values():
        for variable in _trained(layer):
            if int(np.prod(variable.shape)) == wanted[0] and fingerprint(variable) == wanted:
                yield layer, variable


def _long_axes(shape: Sequence[int]) -> int:
    return sum(size != 1 for size in shape)


def _are_distinct(weight: Any) -> bool:
    return bool(np.unique(np.asarray(weight)).size == np.size(weight))


def _reads_any(node: Any) -> bool:
    """Whether a node reads a weight or a constant."""
    given = keras.tree.flatten((node.args, node.kwargs))
    kinds = keras.Variable | np.ndarray
    return any(isinstance(v, kinds) or keras.ops.is_tensor(v) for v in given) or any(
        True for _ in _trained(node.layer)
    )


def _trained(layer: Any) -> Iterable[Any]:
    return getattr(layer, "trainable_variables", ())
