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
from kqat.parts import ChannelAffine, TiedWeight, WeightUse
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
    tied: dict[int, dict[Node, np.ndarray]] = {}
    added: set[tuple[int, int]] = set()
    for node, (target, addend) in addends.items():
        pair = id(node.layer), id(target.layer)
        if isinstance(target.layer, TiedWeight):
            sums = tied.setdefault(id(target.layer), {})
            sums[target] = sums.get(target, 0.0) + addend
        elif pair not in added:  # All calls of the one are behind all calls of the other.
            added.add(pair)
            into[id(target.layer)] = into.get(id(target.layer), 0.0) + addend
    made: dict[int, Any] = {}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if node in addends:
            return args[0]
        if id(node.layer) in tied:
            if id(node.layer) not in made:
                made[id(node.layer)] = _with_biases(node.layer, tied[id(node.layer)])
            part, numbers = made[id(node.layer)]
            return part(*args, **{**kwargs, **numbers.get(node, {})})
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
        if addend is None:
            continue
        config, times = configs[origins[node.layer.name]], calls[id(node.layer)]
        target = producers.get(node.inputs[0])
        while target is not None and _alone(target, readers, graph):
            once = isinstance(target.layer, TiedWeight)  # Each of its calls has a bias of its own.
            if times != (1 if once else calls[id(target.layer)]):
                break
            if config is None or configs[origins[target.layer.name]] != config:
                break
            if target in found or _vanishes(target, config):
                target = producers.get(target.inputs[0])
                continue
            if joins_bias(target, config) and _trained_alike(node, target):
                found[node] = (target, addend)
            break
    return _at_every_call(found, calls)


def _at_every_call(
    found: dict[Node, tuple[Node, np.ndarray]], calls: Mapping[int, int]
) -> dict[Node, tuple[Node, np.ndarray]]:
    """Those of the sums that are behind one layer at all of their calls."""
    targets: dict[int, list[int]] = {}
    for node, (target, _) in found.items():
        targets.setdefault(id(node.layer), []).append(id(target.layer))
    alike = {
        layer
        for layer, behind in targets.items()
        if len(behind) == calls[layer] and len(set(behind)) == 1
    }
    return {node: pair for node, pair in found.items() if id(node.layer) in alike}


def _alone(node: Node, readers: Mapping[Any, list[Node]], graph: Graph) -> bool:
    ref = node.outputs[0]
    return len(readers[ref]) == 1 and ref not in graph.outputs


def _addend(node: Node) -> np.ndarray | None:
    """What a node adds to each channel, if it does nothing else: its value is no part of a loss."""
    layer, channels = node.layer, node.outputs[0].shape[-1]
    if getattr(layer, "activity_regularizer", None) is not None:
        return None
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
    if isinstance(layer, TiedWeight):
        return node.kwargs["use"] in (WeightUse.PRODUCT, WeightUse.TRANSPOSED)
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


def _with_biases(
    layer: TiedWeight, addends: Mapping[Node, np.ndarray]
) -> tuple[Part, dict[Node, dict[str, int]]]:
    """A copy of a tied weight whose products have further addends, and which bias each takes."""
    kernel, *biases = layer.get_weights()
    numbers: dict[Node, dict[str, int]] = {}
    for node, addend in addends.items():
        number = node.kwargs.get("bias")
        if number is None:
            number = len(biases)
            biases.append(addend)
        else:
            biases[number] = biases[number] + addend
        numbers[node] = {"bias": number}
    sizes = [int(bias.size) for bias in biases]
    return Part(clone(layer, biases=sizes), [kernel, *biases]), numbers
