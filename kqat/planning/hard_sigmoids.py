"""Hard sigmoids behind a kernel: its bias, its clamp and one factor in the place of a table.

`relu6(x + 3) / 6`: a convolution adds the 3 as it adds its bias, and clamps to 0..6 as it writes
its output. Squeeze-and-excitation of MobileNetV3 and kin ends so.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras import activations, layers

from kqat.graph import Graph, Node, rebuild, trace
from kqat.planning.biases import Configs, joins_bias


def split_hard_sigmoids(
    graph: Graph, origins: Mapping[str, str], configs: Configs, name: str
) -> tuple[Graph, dict[str, str]]:
    """`graph` and `origins` with three layers for each hard sigmoid that a kernel can carry out.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name.
        name: of the model.
    """
    found = [n for n in graph.nodes if _is_hard_sigmoid(n) and _carried(n, graph, origins, configs)]
    if not found:
        return graph, dict(origins)
    more: dict[str, str] = {}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if node not in found:
            return node.layer(*args, **kwargs)
        own = str(node.layer.name)
        parts = {part: f"{own}_{part}" for part in ("shift", "relu6")}
        more.update(dict.fromkeys(parts.values(), origins[own]))
        y = layers.Rescaling(1.0, 3.0, name=parts["shift"])(args[0])
        y = layers.Activation("relu6", name=parts["relu6"])(y)
        return layers.Rescaling(1.0 / 6.0, name=own)(y)

    split = trace(rebuild(graph, call, name))
    return dataclasses.replace(split, output_names=graph.output_names), {**origins, **more}


def _is_hard_sigmoid(node: Node) -> bool:
    layer: Any = node.layer
    return type(layer) is layers.Activation and layer.activation is activations.hard_sigmoid


def _carried(node: Node, graph: Graph, origins: Mapping[str, str], configs: Configs) -> bool:
    """Whether the kernel before a node can add, clamp and hand on what the node reads."""
    ref, calls = node.inputs[0], graph.calls()
    producer = graph.producers().get(ref)
    if producer is None or ref in graph.outputs or len(graph.consumers()[ref]) != 1:
        return False
    if calls[id(node.layer)] != 1 or calls[id(producer.layer)] != 1:
        return False
    config = configs[origins[node.layer.name]]
    if config is None or config.activation.bits != 8:
        return False
    return configs[origins[producer.layer.name]] == config and joins_bias(producer, config)
