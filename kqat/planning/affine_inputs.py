"""Layers that scale and shift the input of a kernel, which its weights and its bias can do as well.

`(x * c + d) @ w + b` is `x @ (c * w) + (b + d @ w)`: a Rescaling, a Normalization or a
BatchNormalization in front of a Dense or a convolution needs no operator of its own. The values
that are padded are zero, so that an offset needs a kernel that pads nothing.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import keras
import numpy as np

from kqat.graph import Node, Ref
from kqat.grids import Fixed, LearnedMethod
from kqat.parts import is_factor
from kqat.planning.layer_configs import weight_grids, weight_step
from kqat.planning.planned_graph import PlannedGraph
from kqat.registry import Output

# Weights of one scale that are multiplied by unlike factors lose as many bits: no more than two.
MOST_UNLIKE = 4.0
# Grids of fewer bits have none to lose.
LEAST_BITS = 8


def find_before(
    planned: PlannedGraph,
    integer: list[Node],
    folded: Mapping[Node, Node],
    factors: Mapping[Node, Node],
    keeps_clusters: bool,
) -> dict[Node, tuple[Node, ...]]:
    """Layers that scale and shift what only kernels read -> these kernels.

    Args:
        planned: the graph, and what is decided about it.
        integer: its nodes that compute on integers, in the order in which they run.
        folded, factors: those of them that a kernel before them computes; see `Fusions`.
        keeps_clusters: whether training keeps the number of distinct values of weights.
    """
    found: dict[Node, tuple[Node, ...]] = {}
    if planned.states is not None:
        return found
    search = _Search(planned, frozenset(folded.values()), keeps_clusters, found)
    taken = {*folded, *factors}
    for node in reversed(integer):
        rule = planned.rules[node]
        if rule is not None and rule.affine and node not in taken and _is_alone(planned, node):
            numbers = _numbers(node)
            kernels = [] if numbers.are_to_come else search.behind(node.outputs[0], numbers)
            if kernels:
                found[node] = tuple(dict.fromkeys(kernels))
    return dict(reversed(found.items()))


def _is_alone(planned: PlannedGraph, node: Node) -> bool:
    """Whether a node is the only call of its layer, and its output has no range by the policy."""
    config = planned.configs[node]
    ranged = config is None or isinstance(config.activation_range, Fixed)
    return planned.calls[id(node.layer)] == 1 and not ranged


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """What a layer multiplies by, of shape `(channels,)` or `(1,)`, and whether it adds, too.

    Those of statistics that nobody has taken yet are to come: training on features of unlike sizes
    makes the factors as unlike, and the weights of the large ones would round to zero.
    """

    factor: np.ndarray
    adds: bool
    are_to_come: bool

    @property
    def is_one_factor(self) -> bool:
        """Whether all that it does is to multiply all values by one number."""
        return self.factor.size == 1 and not self.adds


def _numbers(node: Node) -> _Numbers:
    """What a layer does to 0 and to 1 tells its numbers, however it keeps them."""
    layer: Any = node.layer
    shape = [size or 1 for size in node.inputs[0].shape]
    shape[:-1] = [1] * (len(shape) - 1)
    zero, one = (
        np.asarray(keras.ops.convert_to_numpy(layer(fill(shape, layer.compute_dtype))), np.float64)
        for fill in (keras.ops.zeros, keras.ops.ones)
    )
    # What is trained may come to add.
    adds = not is_factor(layer) and (bool(layer.variables) or bool(np.any(zero)))
    factor = (one - zero).reshape(-1)
    alike = all(np.all(part == part.flat[0]) for part in (factor, zero))
    single = alike and not layer.variables
    takes_statistics = layer.trainable and bool(layer.non_trainable_variables)
    are_to_come = alike and factor.size > 1 and takes_statistics
    return _Numbers(factor[:1] if single else factor, adds, are_to_come)


class _Search:
    """Looks for the kernels that read a value, behind layers that only hand it on."""

    def __init__(
        self,
        planned: PlannedGraph,
        normalized: Collection[Node],
        keeps_clusters: bool,
        found: Mapping[Node, tuple[Node, ...]],
    ):
        self.planned = planned
        self.normalized = normalized
        self.keeps_clusters = keeps_clusters
        self.found = found

    def behind(self, ref: Ref, numbers: _Numbers) -> list[Node]:
        """The kernels that take the numbers up; none where one reader cannot."""
        readers = self.planned.consumers[ref]
        if ref in self.planned.outputs or not readers:
            return []
        kernels: list[Node] = []
        for reader in readers:
            found = self._of(reader, numbers)
            if not found:
                return []
            kernels += found
        return kernels

    def _of(self, reader: Node, numbers: _Numbers) -> list[Node]:
        rule = self.planned.rules[reader]
        if rule is None:
            return []
        if reader in self.found:
            kernels = list(self.found[reader])
            return kernels if all(self._takes(kernel, numbers) for kernel in kernels) else []
        if rule.output is Output.VANISHES or self._hands_on(reader, numbers):
            return self.behind(reader.outputs[0], numbers)
        return [reader] if self._takes(reader, numbers) else []

    def _hands_on(self, reader: Node, numbers: _Numbers) -> bool:
        """Whether a layer only moves values: with one factor, it may as well come first."""
        rule = self.planned.rules[reader]
        moves = rule is not None and rule.output is Output.SAME and not rule.rounds
        if not moves or len(reader.inputs) != 1 or len(reader.outputs) != 1:
            return False
        if numbers.is_one_factor:
            return bool(numbers.factor[0] > 0.0)
        return _keeps_channels(reader)

    def _takes(self, node: Node, numbers: _Numbers) -> bool:
        """Whether the weights of a kernel can be multiplied, and its bias take an offset up."""
        rule, config, layer = self.planned.rules[node], self.planned.configs[node], node.layer
        if rule is None or config is None or rule.input_axis is None or len(node.inputs) != 1:
            return False
        grids = weight_grids(node.name, layer, rule, config)
        if self.planned.calls[id(layer)] != 1 or list(grids) != list(rule.weights):
            return False
        # A step that is trained is one of the weights as they are: an optimizer moves it by an
        # amount that a factor of 1/255 would make 255 times as much.
        if isinstance(weight_step(rule, config), LearnedMethod):
            return False
        ((name, spec),) = grids.items()
        has_bias = node in self.normalized or layer.use_bias
        if numbers.adds and not (has_bias and _adds_offsets(layer)):
            return False
        if numbers.factor.size == 1:
            return bool(numbers.factor[0] != 0.0)
        channels = getattr(layer, name).shape[rule.input_axis]
        sizes = np.abs(numbers.factor[numbers.factor != 0.0])
        alike = sizes.size > 0 and sizes.max() <= MOST_UNLIKE * sizes.min()
        fits = channels == numbers.factor.size and spec.bits >= LEAST_BITS
        return bool(alike) and fits and not self.keeps_clusters


def _adds_offsets(layer: Any) -> bool:
    """Whether one number added to all inputs of a channel adds one number to all outputs."""
    padded = getattr(layer, "padding", "valid") != "valid"
    return not padded or all(size == 1 for size in layer.kernel_size)


def _keeps_channels(node: Node) -> bool:
    """Whether a layer that moves values leaves each in its channel, the last axis."""
    layer: Any = node.layer
    shape = [size or 1 for size in node.inputs[0].shape]
    numbers = np.broadcast_to(np.arange(1.0, shape[-1] + 1.0, dtype=np.float32), shape)
    moved = np.asarray(keras.ops.convert_to_numpy(layer(numbers)))
    return moved.shape[-1] == shape[-1] and bool(np.all(moved == numbers.reshape(-1, shape[-1])[0]))
