"""A tfmot `QuantizeConfig`, the user's own class, read as a config of ours.

The class stays as it was written for TensorFlow Model Optimization: its methods are called with
the Keras 3 layer, once, while planning; where that raises, with a view of the layer as Keras 2 has
it, so that tfmot's own classes serve. What carries over:

  * weights: a symmetric `LastValueQuantizer`, which is what our weights always have: the range of
    their present values. Bits and narrow range carry over; without narrow range the grid has one
    integer more, qmin, which our max-abs scale leaves unused (integer kernels may rely on that;
    tfmot reaches for it where the largest weight is negative). Quantizers that also keep zeros or
    clusters in training are refused. `per_axis` becomes one scale per
    output channel, where integer kernels have them; tfmot takes the last axis of any kernel.
  * outputs: `MovingAverageQuantizer`, `LastValueQuantizer`, `AllValuesQuantizer` and
    `FixedQuantizer`, of 8 bits, or of 16 where they are symmetric. The moving average has tfmot's
    decay, and none of its start at ±6. A layer has one grid for its output, so the quantizers of
    its `activation` and of its output must agree where both are given.
  * model inputs, which no tfmot config describes, get the quantizer that tfmot itself gives them.

A config that quantizes nothing leaves a layer float, unless the layer only hands integers on
(pooling, Flatten, a kernel with a scale of its own). A quantizer between the parts of one kernel
(convolution, BatchNormalization, ReLU) has no integers to make and drops out, as the plan shows.
Whatever else cannot carry over is a `PolicyError`.

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
    """The config of ours that says about `layer` what a tfmot `QuantizeConfig` says.

    Args:
        config: speaks tfmot's `QuantizeConfig` protocol; its three `get_…` methods are called.
        layer: a built Keras 3 layer, taken as alone in its kernel.

    Returns:
        The config, or `None` where nothing is quantized and the layer stays float.

    Raises:
        PolicyError: if something cannot carry over; names the layer, what was found, the way out.
        UnsupportedLayerError: if the layer has no integer form.
    """
    return resolve(read(config, layer, layer.name))


def translate_policy(policy: QuantizePolicy, graph: Graph) -> QuantizePolicy:
    """`policy` with every tfmot config replaced by rules for single layers and inputs.

    Every layer keeps the rule that decides about it. A tfmot rule that matched no layer stays,
    without effect, so that it is reported as such. As the default, a tfmot config is not asked
    about layers without an operator in the file (Dropout).

    Raises:
        PolicyError, UnsupportedLayerError: as `read` and `resolve`, for the last layer at fault.
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
    """The layer whose config an input would take without a rule of its own."""
    readers = graph.consumers()[ref]
    return next((node for node in readers if configs[node] is not None), None)


class _Neighbours:
    """What a layer's neighbours in the graph say about its config."""

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
        """Every node's config, none of tfmot's among them."""
        # Backwards: whether a value lies inside its reader's kernel depends on the reader's config.
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
        """Gives layers that hand integers on, and were asked no width, that of their input."""
        for node, wish in self.wishes.items():
            config, rule = self.translated[node], self.rules[node]
            if config is None or rule is None or wish.output is not None:
                continue
            if rule.output is not Output.OWN and node.inputs:
                producer = self.producers.get(node.inputs[0])
                behind = self.translated[producer] if producer else None
                self.translated[node] = _at_width_of(behind, config)

    def _is_inside(self, node: Node) -> bool:
        """Whether the only reader lies in the same kernel; if in doubt, it does not."""
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
        """Refuses a grid for an output that has the grid of its input, if that is another one."""
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
                    f"'{node.name}' of type {type(node.layer).__name__}, whose integer kernel "
                    "demands one scale for input and output. Received: "
                    f"{mine.activation_range} with {mine.activation}. Return none."
                )

    def _check_entry(self, node: Node) -> None:
        """Refuses a given range behind a float layer, whose value planning rounds like `node`'s."""
        mine = self.translated[node]
        for producer in (self.producers.get(ref) for ref in node.inputs):
            if mine is None or producer is None or self.translated[producer] is not None:
                continue
            if isinstance(mine.activation_range, Fixed):
                raise PolicyError(
                    f"Expected an observed range for the output of layer '{node.name}' of type "
                    f"{type(node.layer).__name__}: the value that comes from float layer "
                    f"'{producer.name}' is rounded by its config too. Received: "
                    f"{mine.activation_range}. Quantize '{producer.name}', or use a "
                    "MovingAverageQuantizer."
                )

    def _sources(self, node: Node) -> Iterator[Node]:
        """The layers that bring the scale which `node` hands on."""
        for ref in node.inputs:
            producer = self.producers.get(ref)
            rule = self.rules[producer] if producer else None
            if producer is not None and rule is not None:
                hands_on = rule.output in (Output.SAME, Output.VANISHES)
                yield from self._sources(producer) if hands_on else (producer,)


def _at_width_of(other: QuantizeConfig | None, config: QuantizeConfig) -> QuantizeConfig:
    """`config` with activations as wide as those of `other`."""
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
