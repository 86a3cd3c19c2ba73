"""Layers left float that compute nothing follow their neighbours.

A Flatten or a Dropout hands on what it is given, and so does a layer of a user's own that only adds
a loss of it. Left float between integers, by a rule of the policy or because nobody annotated it,
it would only turn them into floats and back.
"""

from collections.abc import Mapping

import keras
import numpy as np

from kqat.base import UnsupportedLayerError
from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, Ref, fill, trace_call
from kqat.registry import LayerRule, Output, is_custom, rule_for

# Operators that move values; others with one scale for input and output compute (a maximum).
_MOVES = frozenset({"RESHAPE", "TRANSPOSE", "STRIDED_SLICE"})
# Operations of Keras that do the same.
_MOVING_OPERATIONS = frozenset(
    "ExpandDims Flatten GetItem Moveaxis Ravel Reshape Squeeze Swapaxes Transpose".split()
)

Configs = Mapping[str, QuantizeConfig | None]


def follow_neighbours(graph: Graph, configs: Configs) -> dict[str, QuantizeConfig | None]:
    """`configs` with one for each layer left float that computes nothing, beside an integer layer.

    Such a layer is as the layer is that makes its input. Where that is a model input, it is as
    the layers are that read its output, if none of them is float.

    Args:
        graph: of the user's model.
        configs: of its nodes, by name; `None` where the policy leaves one float.
    """
    return _Followers(graph, configs).configs


class _Followers:
    """One walk over the nodes, in the order in which they run."""

    def __init__(self, graph: Graph, configs: Configs):
        self.producers, self.consumers = graph.producers(), graph.consumers()
        self.outputs = frozenset(graph.outputs)
        self.rules = {node: _rule(node) for node in graph.nodes}
        self.configs = dict(configs)
        floats = [node for node in graph.nodes if configs[node.name] is None]
        moving = [n for n in floats if self._moves(n) and not n.inputs[0].holds_indexes]
        self.followers = {*moving}
        for node in graph.nodes:
            if node in self.followers:
                self.configs[node.name] = self._neighbour(node)

    def _moves(self, node: Node) -> bool:
        rule = self.rules[node]
        if len(node.inputs) != 1 or len(node.outputs) != 1:
            return False
        return _moves_by_its_row(node, rule) or _hands_on(node)

    def _neighbour(self, node: Node) -> QuantizeConfig | None:
        producer = self.producers.get(node.inputs[0])
        if producer is None:
            return self._reader(node.outputs[0])
        if self._vanishes(producer) and producer not in self.followers:
            # A Dropout with a config of its own is as its own input is.
            return self._neighbour(producer) and self.configs[producer.name]
        return self.configs[producer.name]

    def _vanishes(self, node: Node) -> bool:
        rule = self.rules[node]
        return rule is not None and rule.output is Output.VANISHES

    def _reader(self, ref: Ref) -> QuantizeConfig | None:
        """The config of the layers that read a value, through followers; `None` if one is float."""
        found = None
        if ref in self.outputs:
            return None
        for node in self.consumers[ref]:
            follows = node in self.followers or self._vanishes(node)
            config = self._reader(node.outputs[0]) if follows else self.configs[node.name]
            if config is None:
                return None
            found = found or config
        return found


def _moves_by_its_row(node: Node, rule: LayerRule | None) -> bool:
    if rule is None:
        return type(node.layer).__name__ in _MOVING_OPERATIONS
    same = rule.output is Output.SAME and not rule.rounds
    same = same and (rule.decompose is None or rule.decompose(node.layer, node.name) is None)
    return rule.output is Output.VANISHES or (same and _MOVES.issuperset(rule.ops))


def _hands_on(node: Node) -> bool:
    """Whether a layer returns the very numbers that it is given, as a Rescaling by 1 does.

    The converter takes it out, and leaves nothing between integers and integers.
    """
    ref, layer = node.inputs[0], node.layer
    if not isinstance(layer, keras.layers.Layer) or node.outputs[0].shape != ref.shape:
        return False
    sizes = [size or 1 for size in ref.shape[1:]]
    numbers = np.random.default_rng(0).normal(size=(2, *sizes)).astype(ref.dtype)
    args, kwargs = fill((node.args, node.kwargs), lambda _: keras.ops.convert_to_tensor(numbers))
    try:
        with keras.StatelessScope():
            same = np.array_equal(layer(*args, **kwargs), numbers)
        if same and _rule(node) is None:  # It is opened then.
            x = keras.KerasTensor(ref.shape, dtype=ref.dtype)
            args, kwargs = fill((node.args, node.kwargs), lambda _: x)
            trace_call(layer, args, kwargs, node.name, is_custom)
    except Exception:  # Whatever a user's own class raises: left float, it need not be opened.
        return False
    return same


def _rule(node: Node) -> LayerRule | None:
    if not isinstance(node.layer, keras.layers.Layer):
        return None
    try:
        return rule_for(node.layer, node.name)
    except UnsupportedLayerError:
        return None
