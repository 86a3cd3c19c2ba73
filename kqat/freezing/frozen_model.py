"""`FrozenModel`: all that `tflite_export` sees of a trained model."""

import dataclasses
import functools
from collections.abc import Mapping

import keras

from kqat.devices import Replacement
from kqat.freezing.frozen_weight import FrozenConstant, FrozenWeight
from kqat.graph import Graph, Node, trace, unique_name
from kqat.grids import Site
from kqat.parts import ByteInput, FrozenLSTM, MarkerKind, Tabulated, is_marker


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What the exporter asks of one node of the frozen graph.

    Attributes:
        label: the name of the layer in messages: for a lookup table, that of its function's layer.
        bits: width of the integers that the node's kernel works on; `None` where it computes on
            floats, or is a marker.
        ops: the TFLite operators that the layer may become; for a lookup table, those that its
            function would become instead.
        own_kernel: for a lookup table: the operators that compute its function rightly for
            integers of this width and scale; empty where only the table is right.
        keeps_integers: whether the output holds the very integers of the input.
        function: Keras's name of the activation function that the layer applies, if it does.
        replacements: the functions nearest to that, best first.
    """

    label: str = ""
    bits: int | None = None
    ops: tuple[str, ...] = ()
    own_kernel: tuple[str, ...] = ()
    keeps_integers: bool = False
    function: str | None = None
    replacements: tuple[Replacement, ...] = ()


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A trained model, ready to be lowered.

    Attributes:
        model: float Keras model with `Marker(i)` after the value of `sites[i]`.
        sites: every value that is an integer in the file.
        weights: the integers and scales of every weight; weights are found by content.
        tables: the elementwise layers that may ship as tables, by their `Tabulated` index.
        lstms: the LSTMs that ship as one operator.
        input_names, output_names: those of the user's model, in its order: the keys of a dict.
        constants: weights that are values of their own, with their grids; found by content too.
        node_facts: what the exporter asks of the nodes of `graph` that compute on integers, by
            their names; see `facts`.
    """

    model: keras.Model
    sites: tuple[Site, ...]
    weights: tuple[FrozenWeight, ...]
    tables: tuple[Tabulated, ...]
    lstms: tuple[FrozenLSTM, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    constants: tuple[FrozenConstant, ...] = ()
    node_facts: Mapping[str, NodeFacts] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def graph(self) -> Graph:
        """The graph of `model`: its nodes in the order in which they run, and how to run them."""
        return trace(self.model)

    @functools.cached_property
    def byte_inputs(self) -> frozenset[str]:
        """The names of the uint8 inputs whose bytes are the file's integers.

        Others are read by layers that the plan leaves float.
        """
        readers, found = self.graph.consumers(), set()
        for ref, name in zip(self.graph.inputs, self.input_names, strict=True):
            nodes = readers[ref]
            values = [value for node in nodes for value in node.outputs]
            marked = all(is_marker(n.layer, MarkerKind.SITE) for v in values for n in readers[v])
            if nodes and marked and all(isinstance(node.layer, ByteInput) for node in nodes):
                found.add(name)
        return frozenset(found)

    def with_facts(self, found: Mapping[str, NodeFacts]) -> "FrozenModel":
        """The same with `node_facts`, found of its `graph`, which is not traced again."""
        frozen = dataclasses.replace(self, node_facts=found)
        vars(frozen)["graph"] = self.graph
        return frozen

    def facts(self, node: Node) -> NodeFacts:
        """What is known of a node of `graph`; of one that computes on floats, nothing."""
        return self.node_facts.get(node.name, NodeFacts())

    def unused_name(self, name: str) -> str:
        """`name`, or where a layer of `model` bears it, with a number behind."""
        return unique_name(name, {operation.name for operation in self.model.operations})
