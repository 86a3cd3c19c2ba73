"""A sum over the last axis, and the constants that it weighs its addends by, are one Dense.

Else it is a MEAN and a MUL by the count, as no runtime's SUM serves all of them, and a MUL for the
constants. FULLY_CONNECTED with the constants for weights rounds once, and takes no other values
than its own: the mean of many, or of products with small numbers, has next to none of its grid.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import layers

from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, Part, rebuild, trace
from kqat.grids import Fixed
from kqat.parts import ChannelAffine, ConstantKind, Reduce, ReduceKind, WithConstant
from kqat.planning.layer_configs import row_for

Configs = Mapping[str, QuantizeConfig | None]
# Products of int8 integers and weights, of which an int32 holds so many.
_MOST_ADDENDS = 2**15


@dataclasses.dataclass(frozen=True)
class _RowSum:
    """A sum over the last axis.

    Attributes:
        mean: its node that reduces.
        weights: by which it multiplies the addends.
        inner: the name of what is computed before an axis is dropped, that of a node of the chain
            which is there no longer.
    """

    mean: Node
    weights: np.ndarray
    inner: str

    def made(self, name: str, x: Any) -> Any:
        """The sum of `x`."""
        keeps = self.mean.layer.keepdims
        own = name if keeps else self.inner
        dense = layers.Dense(1, use_bias=False, trainable=False, name=own)
        y = Part(dense, [self.weights.astype(np.float32)[:, None]])(x)
        return y if keeps else layers.Reshape(tuple(x.shape[1:-1]), name=name)(y)


def join_row_sums(graph: Graph, origins: Mapping[str, str], configs: Configs, name: str) -> Graph:
    """`graph` in which sums over the last axis are a Dense, where that saves a kernel.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name; nodes of one config are joined, of 8 bits.
        name: of the model.
    """
    search = _Search(graph, origins, configs)
    found: dict[Node, _RowSum] = {}
    taken: set[Node] = set()
    for node in reversed(graph.nodes):
        if node not in taken and (chain := search.ending_at(node)) is not None:
            nodes, found[node] = chain
            taken.update(nodes)
    if not found:
        return graph
    skipped = taken - set(found)

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if node in skipped:
            return args[0]  # Only the end of the chain reads it.
        if node in found:
            return found[node].made(node.layer.name, args[0])
        return node.layer(*args, **kwargs)

    joined = trace(rebuild(graph, call, name))
    return dataclasses.replace(joined, output_names=graph.output_names)


class _Search:
    """Looks for means over the last axis, and what multiplies their addends and them."""

    def __init__(self, graph: Graph, origins: Mapping[str, str], configs: Configs) -> None:
        self.origins, self.configs = origins, configs
        self.producers, self.readers = graph.producers(), graph.consumers()
        self.calls = graph.calls()
        self.outputs = set(graph.outputs)

    def ending_at(self, node: Node) -> tuple[list[Node], _RowSum] | None:
        """The nodes of a sum whose last is `node`, and the sum."""
        config = self._config(node)
        weights = getattr(config, "weights", None)
        if config is None or config.activation.bits != 8 or getattr(weights, "bits", 0) != 8:
            return None
        if isinstance(config.activation_range, Fixed):
            return None  # It is of values that would be no more.
        nodes, factor = [node], 1.0
        if (scale := _number(node)) is not None:
            before = self._before(node, config)
            if before is None:
                return None
            nodes, factor = [before, node], scale
        mean = nodes[0]
        if not _is_row_mean(mean) or not self._is_plain(node):
            return None
        size = int(mean.inputs[0].shape[-1] or 1)
        numbers = np.full(size, factor / size)
        while (before := self._before(nodes[0], config)) is not None:
            factors = _factors(before, size)
            if factors is None:
                break
            nodes.insert(0, before)
            numbers = numbers * factors
        if nodes[0] is mean and (node is mean or not self._is_one_kernel(mean, node)):
            return None  # No constant is before it, and what it multiplies by costs no kernel more.
        return nodes, _RowSum(mean, numbers, str(nodes[-2].layer.name))

    def _config(self, node: Node) -> QuantizeConfig | None:
        return self.configs[self.origins[node.layer.name]]

    def _before(self, node: Node, config: QuantizeConfig) -> Node | None:
        """The node of the same config that makes what `node` alone reads."""
        ref = node.inputs[0]
        found = self.producers.get(ref)
        if found is None or len(self.readers[ref]) != 1 or ref in self.outputs:
            return None
        return found if self._config(found) == config and self._is_plain(found) else None

    def _is_plain(self, node: Node) -> bool:
        """Whether a node is the one call of a layer that adds no penalty of its output."""
        penalty = getattr(node.layer, "activity_regularizer", None)
        return self.calls[id(node.layer)] == 1 and penalty is None

    def _is_one_kernel(self, mean: Node, node: Node) -> bool:
        """Whether a sum is one kernel as a Dense, and two else.

        Without its last axis it is a Dense and a Reshape, unless another one follows.
        """
        readers = self.readers[node.outputs[0]]
        reshaped = readers and all(type(reader.layer) is layers.Reshape for reader in readers)
        return (mean.layer.keepdims or bool(reshaped)) and not self._is_taken_up(node)

    def _is_taken_up(self, node: Node) -> bool:
        """Whether the weights of a layer behind take up the number that a node multiplies by."""
        ref = node.outputs[0]
        for reader in self.readers[ref]:
            if type(reader.layer) in (layers.Reshape, layers.Flatten, layers.Permute):
                if self._is_taken_up(reader):
                    return True
                continue
            row = row_for(reader.layer, reader.name, self._config(reader))
            if row is not None and row.input_axis is not None:
                return True
        return False


def _is_row_mean(node: Node) -> bool:
    layer: Any = node.layer
    if type(layer) is not Reduce or layer.kind is not ReduceKind.MEAN:
        return False
    shape = node.inputs[0].shape
    last = {axis % len(shape) for axis in layer.axes} == {len(shape) - 1}
    return last and len(shape) > 1 and 1 < (shape[-1] or 0) <= _MOST_ADDENDS


def _number(node: Node) -> float | None:
    """The one number that a node multiplies by, if it does nothing else."""
    layer: Any = node.layer
    if type(layer) is not layers.Rescaling or np.size(layer.scale) != 1 or np.any(layer.offset):
        return None
    return float(np.reshape(layer.scale, ()))


def _factors(node: Node, size: int) -> np.ndarray | None:
    """The numbers, along the last axis, that a node multiplies by; `None` if it does more."""
    layer: Any = node.layer
    if (scale := _number(node)) is not None:
        return np.full(size, scale)
    if type(layer) is ChannelAffine and layer.scale and not layer.center and not layer.trainable:
        return np.asarray(layer.gamma, np.float64)
    if type(layer) is WithConstant and layer.kind is ConstantKind.MULTIPLY and not layer.trainable:
        shape = tuple(layer.shape)
        of_rows = shape[-1:] == (size,) and set(shape[:-1]) <= {1}
        same = tuple(node.inputs[0].shape) == tuple(node.outputs[0].shape)
        return np.asarray(layer.value, np.float64).reshape(-1) if of_rows and same else None
    return None
