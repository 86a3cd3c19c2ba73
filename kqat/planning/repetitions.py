"""Values that are repeated along an axis move nothing where the next layer would broadcast them.

`repeat(mask[..., None], 64, axis=-1)` before a product makes 64 equal channels, which a product
with one channel does by itself. Without them a count of steps is one number again and not 64,
so that `kqat.planning.counted_sums` sees a masked mean.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, Ref, rebuild, trace
from kqat.parts import (
    ConstantKind,
    ConstantRows,
    IndexOperation,
    Reduce,
    Select,
    Take,
    WithConstant,
    computes_each_number,
)
from kqat.planning.expansion import compute_alike

Configs = Mapping[str, QuantizeConfig | None]
_POOLS = (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D)
# Not Add: Keras takes one number for each sample for a bias, where there are as many as steps.
_MERGES = (layers.Multiply, layers.Subtract, layers.Maximum, layers.Minimum, Select)


def drop_repetitions(
    graph: Graph, origins: Mapping[str, str], configs: Configs, name: str
) -> tuple[Graph, dict[str, str]]:
    """`graph` and `origins` without repetitions along an axis that products and sums broadcast.

    A repetition is carried along through functions of each number, casts and means over other axes.
    Where something else reads the value it stays.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name; those left float stay as they are.
        name: of the model.
    """
    search = _Repetitions(graph, {p for p, user in origins.items() if configs.get(user)})
    repeated = search.found()
    if not repeated:
        return graph, dict(origins)

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if node.outputs[0] in repeated:
            return search.computed(node, *args)
        return node.layer(*args, **kwargs)

    built = dataclasses.replace(trace(rebuild(graph, call, name)), output_names=graph.output_names)
    kept = {node.layer.name for node in built.nodes}
    if not compute_alike(graph, built):
        return graph, dict(origins)
    return built, {part: user for part, user in origins.items() if part in kept}


class _Repetitions:
    """Finds values that are equal along an axis, and that a product or a sum would broadcast.

    Args:
        parts: names of the layers that may be changed.
    """

    def __init__(self, graph: Graph, parts: set[str]) -> None:
        self.graph, self.parts, self.calls = graph, parts, graph.calls()
        self.producers, self.consumers = graph.producers(), graph.consumers()

    def found(self) -> dict[Ref, int]:
        """Each such value, and the axis along which it is repeated."""
        axes: dict[Ref, int] = {}
        for node in self.graph.nodes:
            if node.layer.name not in self.parts or self.calls[id(node.layer)] > 1:
                continue
            if node.kwargs.keys() - {"training"}:
                continue
            axis = self._starts(node)
            if axis is None:
                axis = self._carried(node, axes)
            if axis is not None:
                axes[node.outputs[0]] = axis
        # One that something reads whole stays, and so does what is computed from it or with it.
        while stays := [ref for ref in axes if not self._may_go(ref, axes)]:
            axes = {ref: axis for ref, axis in axes.items() if ref not in stays}
        return axes

    def _may_go(self, ref: Ref, axes: Mapping[Ref, int]) -> bool:
        node = self.producers[ref]
        carried = self._starts(node) is not None or all(one in axes for one in node.inputs)
        readers = self.consumers[ref]
        return (
            carried
            and bool(readers)
            and ref not in self.graph.outputs
            and all(r.outputs[0] in axes or self.broadcasts(r, axes) for r in readers)
        )

    def _starts(self, node: Node) -> int | None:
        """The axis along which a layer repeats the one entry that it reads."""
        layer = node.layer
        if isinstance(layer, Take) and not any(layer.indices) and len(layer.indices) > 1:
            return int(layer.axis) if node.inputs[0].shape[layer.axis] == 1 else None
        if isinstance(layer, layers.Concatenate) and len(set(node.inputs)) == 1:
            axis = int(layer.axis) % len(node.inputs[0].shape)
            return axis if node.inputs[0].shape[axis] == 1 and axis else None
        if isinstance(layer, layers.Resizing):
            return _grown(node.inputs[0].shape, node.outputs[0].shape)
        if isinstance(layer, WithConstant) and layer.kind is ConstantKind.MULTIPLY:
            ones = bool(np.all(np.asarray(layer.value) == 1.0))
            return _grown(node.inputs[0].shape, node.outputs[0].shape) if ones else None
        return None

    def _carried(self, node: Node, axes: Mapping[Ref, int]) -> int | None:
        """The axis along which the output is repeated, as all that is read is."""
        if len(node.outputs) != 1 or not node.inputs or any(r not in axes for r in node.inputs):
            return None
        read, out, layer = node.inputs[0].shape, node.outputs[0].shape, node.layer
        axis = axes[node.inputs[0]]
        if isinstance(layer, _MERGES):
            sizes = {(len(r.shape), axes[r], r.shape[axes[r]]) for r in node.inputs}
            return axis if sizes == {(len(out), axis, out[axis])} else None
        if isinstance(layer, _POOLS) and layer.data_format == "channels_last":
            return len(out) - 1 if axis == len(read) - 1 else None
        if isinstance(layer, Reduce):
            gone = [one % len(read) for one in layer.axes]
            if axis in gone:
                return None
            return axis if layer.keepdims else axis - sum(one < axis for one in gone)
        if isinstance(layer, layers.Reshape):
            return _axis_after(read, out, axis)
        if isinstance(layer, layers.Permute):
            return 1 + list(layer.dims).index(axis)
        if isinstance(layer, ConstantRows):
            return axis if int(layer.output_dim) == 1 else None
        return axis if _of_each_number(layer) else None

    def broadcasts(self, node: Node, axes: Mapping[Ref, int]) -> bool:
        """Whether a layer repeats what it reads beside a whole value."""
        if type(node.layer) not in _MERGES or node.layer.name not in self.parts:
            return False
        shape = node.outputs[0].shape
        whole = [ref for ref in node.inputs if ref not in axes]
        along = {axes[ref] for ref in node.inputs if ref in axes}
        return all(len(ref.shape) == len(shape) for ref in node.inputs) and all(
            any(ref.shape[axis] == shape[axis] for ref in whole) for axis in along
        )

    def computed(self, node: Node, given: Any) -> Any:
        """What a layer that a repetition passes makes of values that are not repeated."""
        if self._starts(node) is not None:
            return keras.tree.flatten(given)[0]
        if isinstance(node.layer, layers.Reshape):
            read, out = node.inputs[0].shape, node.outputs[0].shape
            axis = _axis_after(read, out, _grown(given.shape, read) or 0)
            shape = [1 if i == axis else n for i, n in enumerate(out)]
            return layers.Reshape(shape[1:], name=node.layer.name)(given)
        if isinstance(node.layer, layers.Permute):
            moved = _grown(given.shape, node.inputs[0].shape)
            others = [axis for axis in node.layer.dims if axis != moved]
            if others == sorted(others):
                shape = [given.shape[axis] for axis in node.layer.dims]
                return layers.Reshape(shape, name=node.layer.name)(given)
        return node.layer(given)


def _grown(read: Any, out: Any) -> int | None:
    """The one axis that is longer than before, from 1."""
    if len(read) != len(out):
        return None
    grown = [i for i in range(1, len(out)) if read[i] != out[i]]
    return grown[0] if len(grown) == 1 and read[grown[0]] == 1 else None


def _axis_after(read: Any, out: Any, axis: int) -> int | None:
    """Where an axis is behind a reshape that keeps it whole."""
    before = math.prod(int(n or 1) for n in read[1:axis])
    for place in range(1, len(out)):
        same = math.prod(int(n or 1) for n in out[1:place]) == before
        if same and out[place] == read[axis] != 1:
            return place
    return None


def _of_each_number(layer: Any) -> bool:
    """Whether a layer computes a number of each number of its one input."""
    if isinstance(layer, IndexOperation):
        return all(np.size(option) == 1 for option in layer.options.values())
    return computes_each_number(layer) or isinstance(layer, layers.Identity)
