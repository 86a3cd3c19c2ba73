"""Constants added behind a convolution, a Dense or their BatchNormalization join its bias.

The sum is one kernel in the file, so it is one layer in training: what is added has no scale of
its own, and the value before it is not rounded.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, Part, clone, rebuild, trace
from kqat.parts import ChannelAffine
from kqat.planning.layer_configs import row_for
from kqat.registry import Output

Configs = Mapping[str, QuantizeConfig | None]


def join_biases(graph: Graph, origins: Mapping[str, str], configs: Configs, name: str) -> Graph:
    """`graph` without the sums of which the addend is now a bias.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name; only layers of one config are joined.
        name: of the model.
    """
    addends = _found(graph, origins, configs)
    if not addends:
        return graph
    into: dict[int, np.ndarray] = {}
    for target, addend in addends.values():
        into[id(target.layer)] = into.get(id(target.layer), 0.0) + addend
    made: dict[int, Any] = {}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if node in addends:
            return args[0]
        if id(node.layer) not in into:
            return node.layer(*args, **kwargs)
        if id(node.layer) not in made:
            made[id(node.layer)] = _with_bias(node.layer, into[id(node.layer)])
        return made[id(node.layer)](*args, **kwargs)

    joined = trace(rebuild(graph, call, name))
    return dataclasses.replace(joined, output_names=graph.output_names)


def _found(
    graph: Graph, origins: Mapping[str, str], configs: Configs
) -> dict[Node, tuple[Node, np.ndarray]]:
    """Each sum that can go -> the node whose bias it joins, and what it adds to it."""
    producers, readers, calls = graph.producers(), graph.consumers(), graph.calls()
    found: dict[Node, tuple[Node, np.ndarray]] = {}
    for node in graph.nodes:
        addend = _addend(node)
        if addend is None or calls[id(node.layer)] > 1:
            continue
        config = configs[origins[node.layer.name]]
        target = producers.get(node.inputs[0])
        while (
            target is not None and _alone(target, readers, graph) and calls[id(target.layer)] == 1
        ):
            if config is None or configs[origins[target.layer.name]] != config:
                break
            if target in found or _vanishes(target, config):
                target = producers.get(target.inputs[0])
                continue
            if joins_bias(target, config) and _trained_alike(node, target):
                found[node] = (target, addend)
            break
    return found


def _alone(node: Node, readers: Mapping[Any, list[Node]], graph: Graph) -> bool:
    ref = node.outputs[0]
    return len(readers[ref]) == 1 and ref not in graph.outputs


def _addend(node: Node) -> np.ndarray | None:
    """What a node adds to each channel, if it does nothing else."""
    layer, channels = node.layer, node.outputs[0].shape[-1]
    if isinstance(layer, ChannelAffine) and layer.gamma is None and layer.beta is not None:
        return np.asarray(layer.beta, np.float32)
    if type(layer) is not layers.Rescaling or not np.all(np.asarray(layer.scale) == 1.0):
        return None
    offset = np.asarray(layer.offset, np.float32)
    # Of more than one axis it is of places, which have no bias.
    return np.resize(offset, channels or 1) if offset.size in (1, channels) else None


def _vanishes(node: Node, config: QuantizeConfig) -> bool:
    rule = row_for(node.layer, node.name, config)
    return rule is not None and rule.output is Output.VANISHES


def joins_bias(node: Node, config: QuantizeConfig) -> bool:
    """Whether a node ends with a bias, or a shift that ships as one."""
    layer: Any = node.layer
    if isinstance(layer, layers.BatchNormalization):
        return layer.beta is not None
    rule = row_for(layer, node.name, config)
    linear = getattr(layer, "activation", None) in (None, keras.activations.linear)
    own = layer.activity_regularizer is None and getattr(layer, "bias_constraint", None) is None
    return rule is not None and rule.takes_normalization and linear and own


def _trained_alike(adding: Node, target: Node) -> bool:
    trained = bool(adding.layer.trainable_weights)
    return not trained or bool(target.layer.trainable)


def _with_bias(layer: Any, addend: np.ndarray) -> Any:
    """A copy of a layer whose bias is larger by `addend`; it may have had none."""
    is_norm = isinstance(layer, layers.BatchNormalization)
    bias = layer.beta if is_norm else layer.bias if layer.use_bias else None
    weights = layer.get_weights()
    if bias is None:
        at = 1  # behind the kernel
        return Part(clone(layer, use_bias=True), [*weights[:at], addend, *weights[at:]])
    at = next(i for i, variable in enumerate(layer.weights) if variable is bias)
    weights[at] = weights[at] + addend
    return Part(clone(layer), weights)
