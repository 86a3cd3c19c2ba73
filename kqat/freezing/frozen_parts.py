"""What freezing collects on its way through a QAT model: sites, weights, tables, LSTMs, names."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from kqat.freezing.frozen_weight import FrozenConstant, FrozenWeight
from kqat.graph import Graph, Node, clone, unique_name
from kqat.grids import Site
from kqat.parts import FrozenLSTM, Marker, MarkerKind, Tabulated
from kqat.registry import LayerFacts
from kqat.training import QuantizedRecurrence, QuantizeWrapper


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the frozen model: its symbolic tensor, and the grid of its integers.

    The grid is `None` where there are no integers: for floats, indexes, and what lies inside a
    fused kernel.
    """

    tensor: Any
    grid: Site | None = None


class FrozenParts:
    """The lists of a `FrozenModel`, as they fill; one for a model and the steps inside it."""

    def __init__(self, graph: Graph):
        self.sites: list[Site] = []
        self.weights: list[FrozenWeight] = []
        self.constants: list[FrozenConstant] = []
        self.tables: list[Tabulated] = []
        self.lstms: list[FrozenLSTM] = []
        self.carried: dict[int, LayerFacts] = {}  # by the identity of the frozen layer
        self._copies: dict[tuple[int, int], Any] = {}
        self._fences = 0
        own = {*graph.input_names, *_names(graph)}
        self._layer_names = set(own)
        self._site_names: set[str] = set()
        self._own_names = own

    def free_name(self, name: str) -> str:
        """`name` for a layer that freezing adds, with a number where a layer bears it already."""
        return unique_name(name, self._layer_names)

    def once(self, layer: Any, make: Callable[[Any], Any], branch: int = 0) -> Any:
        """What `make` made of a layer of the QAT model: calls of one branch stay those of one."""
        key = id(layer), branch
        if key not in self._copies:
            self._copies[key] = make(layer)
        return self._copies[key]

    def mark(self, name: str, tensor: Any, grid: Site) -> Value:
        """The value of a new site, on the grid of another, with a marker behind it."""
        index, shape = len(self.sites), tuple(tensor.shape[1:])
        site = dataclasses.replace(grid, name=self._site_name(name), shape=shape)
        self.sites.append(site)
        marker = Marker(MarkerKind.SITE, index, name=self.free_name(f"kqat_marker_{index}"))
        return Value(marker(tensor), site)

    def fence(self, tensor: Any) -> Any:
        """The tensor where integers and floats meet."""
        self._fences += 1
        return Marker(MarkerKind.FENCE, 0, name=self.free_name(f"kqat_fence_{self._fences}"))(
            tensor
        )

    def table(self, layer: Any, name: str, bits: int) -> Tabulated:
        """A layer that may ship as a lookup table for integers of `bits` bits."""
        index = len(self.tables)
        name = self.free_name(f"{name}_table_{index}")
        function = clone(layer, dtype="float32")
        if layer.weights:  # A number that was trained is one of the function's.
            function.build((None, 1))
            function.set_weights(layer.get_weights())
        self.tables.append(Tabulated(function, index, bits, name=name))
        return self.tables[-1]

    def _site_name(self, name: str) -> str:
        """A name that no other site bears; a number never makes it that of a user's layer."""
        taken = set(self._site_names)
        if name in taken:
            taken |= self._own_names
        unique = unique_name(name, taken)
        self._site_names.add(unique)
        return unique


def labels(graph: Graph) -> dict[Node, str]:
    """What reports and the file call the value of each node: the user's name of its layer.

    A further call of a layer is numbered, never as another layer is called.
    """
    taken = {_label(node.layer) for node in graph.nodes}
    found: dict[Node, str] = {}
    seen: set[str] = set()
    for node in graph.nodes:
        label = _label(node.layer)
        found[node] = unique_name(label, taken, "_call{}") if label in seen else label
        seen.add(label)
    return found


def _label(layer: Any) -> str:
    if isinstance(layer, QuantizeWrapper):
        return layer.layer.name
    return layer.label if isinstance(layer, QuantizedRecurrence) else layer.name


def _names(graph: Graph) -> Iterator[str]:
    """The names of the layers of a QAT model, of those that they wrap, and of their steps."""
    for node in graph.nodes:
        yield node.layer.name
        yield _label(node.layer)
        if isinstance(node.layer, QuantizedRecurrence):
            yield from _names(node.layer.parts.graph)
