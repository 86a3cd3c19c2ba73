"""Replaces the tfmot `QuantizeConfig` objects in a policy by rules with `kqat.QuantizeConfig`.

The user's class stays as it was written for TensorFlow Model Optimization. While planning, kqat
calls its methods once with the Keras 3 layer. If that raises, it calls them with a view of the
layer as Keras 2 has it, which tfmot's own classes need. This is translated:

  * Weights: a symmetric `LastValueQuantizer`, that is, the range of the current values. Bits and
    narrow range are kept. Without narrow range the grid has one more integer, qmin. Our max-abs
    scale leaves it unused, as integer kernels may assume; tfmot uses it if the largest weight is
    negative. `per_axis` becomes one scale per output channel, if the integer kernel has those.
    tfmot takes the last axis of any kernel instead. Quantizers that also keep zeros or clusters in
    training are refused.
  * Outputs: `MovingAverageQuantizer`, `LastValueQuantizer`, `AllValuesQuantizer` and
    `FixedQuantizer` of 8 bits, or of 16 bits if symmetric. The moving average has tfmot's decay,
    but does not start at ±6. A layer has one grid for its output. So the quantizers of its
    `activation` and of its output must agree if both are given.
  * Model inputs: no tfmot config describes them. They get the quantizer that tfmot gives them.

A config that quantizes nothing leaves a layer float, unless the layer keeps its input's scale or
has a fixed one (pooling, Flatten, softmax). A quantizer between layers that share one kernel
(convolution, BatchNormalization, ReLU) is dropped, because no tensor in the file holds that value;
the plan shows it. Anything else raises `PolicyError`.

tfmot is never imported here: a user who has such a config has imported it.
"""

import dataclasses
import glob
from collections.abc import Iterator
from typing import Any

import keras

from kqat.base import PolicyError, UnsupportedLayerError
from kqat.config import QuantizeConfig, QuantizePolicy, is_foreign_config
from kqat.graph import Graph, Node, Ref
from kqat.grids import Fixed, MovingAverage, QuantSpec
from kqat.registry import LayerRule, Output
from kqat.rewrites import basic
from kqat.tfmot.configs import DECAY, Wish, read, resolve, row

INPUT_CONFIG = QuantizeConfig(activation_range=MovingAverage(DECAY))


def translate(config: Any, layer: Any) -> QuantizeConfig | None:
    """The `kqat.QuantizeConfig` that does to `layer` what a tfmot `QuantizeConfig` asks.

    Args:
        config: has the methods of tfmot's `QuantizeConfig`; its three `get_…` methods are called.
        layer: a built Keras 3 layer. No other layer is assumed to share its kernel.

    Returns:
        The config, or `None` if nothing is quantized and the layer stays float.

    Raises:
        PolicyError: if something cannot be translated; says which layer, why and what to do.
        UnsupportedLayerError: if the layer has no integer form.
    """
    return resolve(read(config, layer, layer.name))


def translate_policy(policy: QuantizePolicy, graph: Graph) -> QuantizePolicy:
    """`policy` with every tfmot config replaced by rules for single layers and inputs.

    For every layer the same rule decides as before. A tfmot rule that matched no layer stays in
    the policy, so that it is reported as unused. A tfmot config that is the default is not asked
    about layers without an operator in the file (Dropout).

    Raises:
        PolicyError, UnsupportedLayerError: as `read` and `resolve`. If several layers are at
            fault, the error names the last one.
    """
    values = (policy.default, *(value for _, value in policy.rules))
    if not any(map(is_foreign_config, values)):
        return policy
    chosen = {node: policy.match(node.name, node.layer) for node in graph.nodes}
    asked = {node: values[0 if i is None else i + 1] for node, i in chosen.items()}
    foreign = [node for node in graph.nodes if is_foreign_config(asked[node])]
    by_default = frozenset(node for node in foreign if chosen[node] is None)
    configs = _Neighbours(graph, asked, by_default).configs()
    rules: list[tuple[Any, Any]] = [(glob.escape(node.name), configs[node]) for node in foreign]
    rules += [
        (glob.escape(name), _at_width_of(configs[reader], INPUT_CONFIG))
        for name, ref in zip(graph.input_names, graph.inputs, strict=True)
        if (reader := _first_reader(graph, ref, configs)) in foreign
        and ((i := policy.match(name, None)) is None or is_foreign_config(values[i + 1]))
    ]
    used = set(chosen.values())
    rules += [
        (key, None if is_foreign_config(value) else value)
        for i, (key, value) in enumerate(policy.rules)
        if not (is_foreign_config(value) and i in used)
    ]
    default = None if is_foreign_config(policy.default) else policy.default
    return QuantizePolicy(default=default, rules=tuple(rules))


def _first_reader(graph: Graph, ref: Ref, configs: dict[Node, Any]) -> Node | None:
    """The layer whose config an input takes if no rule matches the input."""
    readers = graph.consumers()[ref]
    return next((node for node in readers if configs[node] is not None), None)


class _Neighbours:
    """Translates the configs of a graph's layers, each with a view to its neighbours."""

    def __init__(self, graph: Graph, asked: dict[Node, Any], by_default: frozenset[Node]):
        self.graph = graph
        self.asked = asked
        self.by_default = by_default
        self.consumers = graph.consumers()
        self.producers = graph.producers()
        self.rules = {node: _rule(node) for node in graph.nodes}
        self.translated: dict[Node, QuantizeConfig | None] = {}
        self.wishes: dict[Node, Wish] = {}

    def configs(self) -> dict[Node, QuantizeConfig | None]:
        """The translated config of every node."""
        # From the outputs backwards: a value may be inside its reader's kernel, and that depends on
        # the reader's config.
        for node in reversed(self.graph.nodes):
            self.translated[node] = self._config(node)
        self.wishes = {node: self.wishes[node] for node in self.graph.nodes if node in self.wishes}
        self._follow_widths()
        for node, wish in self.wishes.items():
            if wish.output is not None:
                self._check_shared_scale(node)
                self._check_entry(node)
        return self.translated

    def _config(self, node: Node) -> QuantizeConfig | None:
        asked, rule = self.asked[node], self.rules[node]
        if not is_foreign_config(asked):
            return asked
        if node in self.by_default and rule and rule.output is Output.VANISHES:
            return QuantizeConfig()
        wish = self.wishes[node] = read(asked, node.layer, node.name)
        inside = self._is_inside(node)
        config = resolve(wish, inside=inside)
        if config is not None and wish.output is None and inside:
            behind = self.translated[self.consumers[node.outputs[0]][0]]
            config = _at_width_of(behind, config)
        return config

    def _follow_widths(self) -> None:
        """Gives same-scale layers the width of their input, if the config asks for no width."""
        for node, wish in self.wishes.items():
            config, rule = self.translated[node], self.rules[node]
            if config is None or rule is None or wish.output is not None:
                continue
            if rule.output is not Output.OWN and node.inputs:
                producer = self.producers.get(node.inputs[0])
                behind = self.translated[producer] if producer else None
                self.translated[node] = _at_width_of(behind, config)

    def _is_inside(self, node: Node) -> bool:
        """Whether the node's only reader surely shares its kernel."""
        ref, rule = node.outputs[0], self.rules[node]
        readers = self.consumers[ref]
        if rule is None or len(readers) != 1 or ref in self.graph.outputs:
            return False
        reader = readers[0]
        activation = getattr(node.layer, "activation", keras.activations.linear)
        if activation is not keras.activations.linear or self.translated[reader] is None:
            return False
        if isinstance(reader.layer, keras.layers.BatchNormalization):
            return rule.takes_normalization and self._calls(node) == self._calls(reader) == 1
        return rule.takes_clamp and _is_clamp(reader.layer)

    def _calls(self, node: Node) -> int:
        return sum(other.layer is node.layer for other in self.graph.nodes)

    def _check_shared_scale(self, node: Node) -> None:
        """Refuses a grid for the output of a same-scale layer that differs from its input's."""
        rule, mine = self.rules[node], self.translated[node]
        if rule is None or mine is None or rule.output is not Output.SAME:
            return
        for source in self._sources(node):
            theirs = self.translated[source]
            if theirs is None or (source_rule := self.rules[source]) is None:
                continue
            if source_rule.output is Output.OWN and _fixed(mine) != _fixed(theirs):
                raise PolicyError(
                    f"Expected the quantizer of layer '{source.name}' for the output of layer "
                    f"'{node.name}' of type {type(node.layer).__name__}: its integer kernel needs "
                    "the same scale for input and output. Received: "
                    f"{mine.activation_range} with {mine.activation}. Return no quantizer for it."
                )

    def _check_entry(self, node: Node) -> None:
        """Refuses a fixed range after a float layer, whose output would be rounded on it too."""
        mine = self.translated[node]
        for producer in (self.producers.get(ref) for ref in node.inputs):
            if mine is None or producer is None or self.translated[producer] is not None:
                continue
            if isinstance(mine.activation_range, Fixed):
                raise PolicyError(
                    f"Expected an observed range for the output of layer '{node.name}' of type "
                    f"{type(node.layer).__name__}: its config also rounds the output of the float "
                    f"layer '{producer.name}'. Received: "
                    f"{mine.activation_range}. Quantize '{producer.name}', or use a "
                    "MovingAverageQuantizer."
                )

    def _sources(self, node: Node) -> Iterator[Node]:
        """The layers whose scale `node`, a same-scale layer, keeps."""
        for ref in node.inputs:
            producer = self.producers.get(ref)
            rule = self.rules[producer] if producer else None
            if producer is not None and rule is not None:
                hands_on = rule.output in (Output.SAME, Output.VANISHES)
                yield from self._sources(producer) if hands_on else (producer,)


def _at_width_of(other: QuantizeConfig | None, config: QuantizeConfig) -> QuantizeConfig:
    """`config` with the activation grid of `other` if their widths differ."""
    if other is None or other.activation.bits == config.activation.bits:
        return config
    return dataclasses.replace(config, activation=other.activation)


def _fixed(config: QuantizeConfig) -> tuple[QuantSpec, Fixed | None]:
    method = config.activation_range
    return config.activation, method if isinstance(method, Fixed) else None


def _rule(node: Node) -> LayerRule | None:
    try:
        return row(node.layer)
    except UnsupportedLayerError:
        return None


def _is_clamp(layer: Any) -> bool:
    if isinstance(layer, keras.layers.ReLU):
        layer = basic.relu(layer, layer.name)
    return row(layer).clamp is not None
