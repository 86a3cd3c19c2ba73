"""Layers that were added to a QAT model after it was planned, or that a part of one ends at."""

import enum
from typing import Any

from kqat.base import ModelError
from kqat.graph import Graph, Node, Ref
from kqat.parts import PrecisionBoundary
from kqat.registry import LayerFacts, Output, stock_facts
from kqat.training import ActivationQuantizer, QuantizedRecurrence, QuantizeWrapper


class _State(enum.Enum):
    """What a value of a QAT model is."""

    FLOAT = "a float, of a layer that the policy leaves float, or of an input"
    CROSSING = "a float behind a precision boundary, to be rounded next"
    INTEGER = "an integer, or what lies inside a fused kernel"
    UNPLANNED = "made by a layer that was never planned"


def check_planned(graph: Graph, name: str) -> None:
    """Refuses a QAT model with layers that `kqat.quantize_model` has not seen.

    Args:
        graph: of the QAT model.
        name: of the model.

    Raises:
        ModelError: naming these layers.
    """
    walk = _Walk(graph)
    found = walk.unplanned()
    if found:
        names = ", ".join(f"'{layer}'" for layer in found)
        raise ModelError(
            f"Expected a QAT model whose layers were planned together. Received: '{name}', to "
            f"which {names} was added after kqat.quantize_model. Quantize the whole model: "
            "kqat.quantize_model(kqat.strip(model), ...); a policy leaves single layers float."
            + (
                f" Or is it a part of a QAT model that ends at {names}? Let it end at the "
                "ActivationQuantizer that rounds that value."
                if walk.unrounded_ends.issuperset(found)
                else ""
            )
        )


class _Walk:
    """One walk over the graph, from inputs to outputs."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.readers = graph.consumers()
        self.states: dict[Ref, _State] = dict.fromkeys(graph.inputs, _State.CROSSING)
        self.unrounded_ends = {
            node.name
            for node in graph.nodes
            if set(node.outputs) & set(graph.outputs)
            and not any(self.readers[ref] for ref in node.outputs)
            and not isinstance(node.layer, ActivationQuantizer | QuantizedRecurrence)
        }
        self.float_layers: dict[Ref, dict[str, None]] = {}  # value -> those that it comes from

    def unplanned(self) -> list[str]:
        """Names of the layers that were not planned, in the order in which they run."""
        found: dict[str, None] = {}
        for node in self.graph.nodes:
            state = self._state(node)
            if isinstance(node.layer, ActivationQuantizer):
                # No boundary was put between the float layers before it and the rounding.
                found |= self.float_layers.get(node.inputs[0], {})
            elif state is _State.UNPLANNED or self._is_cut_off(node):
                found[node.name] = None
            elif state is _State.FLOAT:
                before = [self.float_layers.get(ref, {}) for ref in node.inputs]
                names = {name: None for names in before for name in names} | {node.name: None}
                self.float_layers.update(dict.fromkeys(node.outputs, names))
            self.states.update(dict.fromkeys(node.outputs, state))
        return list(found)

    def _state(self, node: Node) -> _State:
        layer = node.layer
        if isinstance(layer, PrecisionBoundary):
            return _State.CROSSING
        if isinstance(layer, ActivationQuantizer | QuantizedRecurrence):
            return _State.INTEGER
        read = {self.states[ref] for ref in node.inputs if not ref.holds_indexes}
        if isinstance(layer, QuantizeWrapper) and layer.computes_with_grids:
            return _State.INTEGER
        if _State.UNPLANNED in read:
            return _State.UNPLANNED
        if _State.INTEGER in read:
            planned = self._is_planned(node)
            return _State.INTEGER if planned else _State.UNPLANNED
        if read == {_State.CROSSING} and _facts(layer, Output.VANISHES):
            return _State.CROSSING
        # An Embedding reads indexes, which are neither.
        return _State.INTEGER if not read and self._is_rounded(node) else _State.FLOAT

    def _is_cut_off(self, node: Node) -> bool:
        """Whether the model ends at sums of a kernel, and not at what rounds them."""
        layer = node.layer
        if node.name not in self.unrounded_ends or not isinstance(layer, QuantizeWrapper):
            return False
        planned = layer.facts is not None and layer.facts.output in (Output.SAME, Output.VANISHES)
        return layer.computes_with_grids and not planned

    def _is_planned(self, node: Node) -> bool:
        """Whether a layer that reads integers is one of those that `training.build` leaves bare."""
        facts = _facts(node.layer)
        if facts is None:
            return False
        if facts.output in (Output.SAME, Output.VANISHES, Output.INDEX):
            return not facts.rounds or self._is_rounded(node)
        carried = isinstance(node.layer, QuantizeWrapper)
        return self._is_rounded(node) and (carried or not facts.channel_axes)

    def _is_rounded(self, node: Node) -> bool:
        """Whether the layer's kernel ends in a rounding, behind a fused clamp or at once."""
        for ref in node.outputs:
            readers = self.readers[ref]
            if any(isinstance(reader.layer, ActivationQuantizer) for reader in readers):
                continue
            clamp = readers[0] if len(readers) == 1 else None
            facts = _facts(clamp.layer) if clamp else None
            if clamp is None or facts is None or not facts.clamps or not self._is_rounded(clamp):
                return False
        return True


def _facts(layer: Any, output: Output | None = None) -> LayerFacts | None:
    """The facts of a layer, or `None` where its output is another."""
    facts = layer.facts if isinstance(layer, QuantizeWrapper) else stock_facts(layer)
    return facts if facts is None or output in (None, facts.output) else None
