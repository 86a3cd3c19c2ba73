"""Masks that users add to attention scores: `scores + (1 - mask) * -1e9`, and its kin.

A grid that holds a billion has one integer for all other scores. So a sum that only a softmax
reads becomes what `kqat.rewrites.layers.attention_masks` makes of Keras's own masks: a `Hide`.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import (
    Graph,
    Node,
    Part,
    Ref,
    activation_name,
    duplicate,
    is_tensor,
    rebuild,
    trace,
    unique_name,
)
from kqat.grids import HIDDEN
from kqat.parts import (
    ConstantKind,
    ConstantRows,
    Hide,
    IndexOperation,
    Padding,
    PaddingKind,
    Reduce,
    ReduceKind,
    Slice,
    Take,
    WithConstant,
)
from kqat.rewrites import FAR_BELOW

# What is added to a hidden score at least; Swin adds this, others a billion. Softmax gives such a
# key less than float32 can tell from zero, beside scores that spread by less than 80.
LEAST_ADDED = -100.0
# Layers that hand numbers on as they are.
_MOVING = (
    layers.Reshape, layers.Permute, layers.Flatten, layers.Identity, layers.RepeatVector,
    layers.Dropout, Slice, Take,
)  # fmt: skip
_LARGEST = (
    layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D, layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Mask:
    """The operand of a sum that pushes hidden scores down.

    Attributes:
        scores: the other operand.
        base: what the bias is computed from: truth values, or numbers that are 0 or 1.
        table: the bias of each truth value; `None` where `base` holds numbers.
        scale: of a bias that is `scale * number + offset`.
        offset: as `scale`.
        moves: the layers that the bias passes, in order.
    """

    scores: Ref
    base: Ref
    table: np.ndarray | None
    scale: float
    offset: float
    moves: tuple[Any, ...]


def hide_added_masks(
    graph: Graph, origins: Mapping[str, str], kept: Collection[str], name: str
) -> tuple[Graph, dict[str, str]]:
    """The graph with a `Hide` for each sum that masks the scores of a softmax.

    Args:
        graph: expanded, so that products with numbers are Rescalings.
        origins: name of a layer -> name of the user's layer that it is of.
        kept: the user's layers that stay as they are.
        name: of the model.

    Returns:
        The new graph and origins; those given where there is no such sum.
    """
    search = _Search(graph)
    sums = [node for node in graph.nodes if origins[node.layer.name] not in kept]
    constants = {node.name for node in sums if search.adds_constant_mask(node)}
    masks = {node.name: mask for node in sums if (mask := search.mask_of(node)) is not None}
    if not constants and not masks:
        return graph, dict(origins)
    values: dict[Ref, Any] = {}
    taken = {*graph.input_names, *(node.layer.name for node in graph.nodes)}
    found = dict(origins)

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in keras.tree.flatten((args, kwargs)) if is_tensor(t)]
        values.update(zip(node.inputs, given, strict=True))

        def new(label: str) -> str:
            fresh = unique_name(f"{node.layer.name}_{label}", taken)
            found[fresh] = origins[node.layer.name]
            return fresh

        if node.name in constants:
            outputs = _constant_hidden(node.layer, args[0], new)
        elif node.name in masks:
            outputs = _hidden(node.layer, masks[node.name], values, new)
        else:
            outputs = node.layer(*args, **kwargs)
        values.update(zip(node.outputs, keras.tree.flatten(outputs), strict=True))
        return outputs

    return trace(rebuild(graph, call, name)), found


def check_hidden_values(graph: Graph, origins: Mapping[str, str]) -> None:
    """Checks that only what ignores hidden values reads them: softmax, or a maximum.

    `where(mask, x, -1e9)` and padding with such a number put the lowest integer of the grid there.

    Raises:
        UnsupportedLayerError: if something else computes with them; names the user's layer.
    """
    search = _Search(graph)
    for node in graph.nodes:
        if _hides(node.layer) and not search.is_ignored(node.outputs[0]):
            raise UnsupportedLayerError(
                f"Expected a softmax or a maximum to read what '{origins[node.layer.name]}' "
                f"computes. Received: numbers of {FAR_BELOW:.0f} or less beside others, which "
                "something else reads; a grid that holds both has one integer for all others. "
                "Use a number that is as large as the others."
            )


def _hides(layer: Any) -> bool:
    if isinstance(layer, WithConstant):
        return layer.kind is ConstantKind.HIDE
    if isinstance(layer, Padding):
        return layer.kind is PaddingKind.LOWEST
    return isinstance(layer, Hide)


class _Search:
    """Finds the sums that mask scores."""

    def __init__(self, graph: Graph) -> None:
        self.outputs = set(graph.outputs)
        self.consumers, self.producers = graph.consumers(), graph.producers()

    def adds_constant_mask(self, node: Node) -> bool:
        """Whether a node adds a constant that is far below zero somewhere, before a softmax."""
        layer = node.layer
        return (
            isinstance(layer, WithConstant)
            and layer.kind is ConstantKind.ADD
            and not layer.trainable
            and float(np.min(layer.value)) <= LEAST_ADDED
            and self._ends_in_softmax(node.outputs[0])
        )

    def mask_of(self, node: Node) -> _Mask | None:
        """The mask among the two operands of a sum or difference before a softmax."""
        signs = {layers.Add: (1.0, 1.0), layers.Subtract: (None, -1.0)}.get(type(node.layer))
        if signs is None or len(node.inputs) != 2 or not self._ends_in_softmax(node.outputs[0]):
            return None
        for index, sign in enumerate(signs):
            mask = None if sign is None else self._mask(node.inputs[index], sign)
            if mask is not None:
                return dataclasses.replace(mask, scores=node.inputs[1 - index])
        return None

    def _ends_in_softmax(self, ref: Ref) -> bool:
        """Whether softmax, and nothing else, reads a value, moved at most."""
        readers = self.consumers[ref]
        return (
            bool(readers)
            and ref not in self.outputs
            and all(
                _is_softmax(node.layer)
                or (isinstance(node.layer, _MOVING) and self._ends_in_softmax(node.outputs[0]))
                for node in readers
            )
        )

    def is_ignored(self, ref: Ref) -> bool:
        """Whether what reads a value takes no notice of its lowest numbers."""
        return ref not in self.outputs and all(
            _is_softmax(node.layer)
            or isinstance(node.layer, _LARGEST)
            or (isinstance(node.layer, Reduce) and node.layer.kind is ReduceKind.MAX)
            or (isinstance(node.layer, IndexOperation) and node.layer.kind == "argmax")
            or (
                (isinstance(node.layer, _MOVING) or _hides(node.layer))
                and self.is_ignored(node.outputs[0])
            )
            for node in self.consumers[ref]
        )

    def _mask(self, ref: Ref, sign: float) -> _Mask | None:
        """`ref` times `sign` as a bias, if that is zero or far below zero."""
        scale, offset, moves = sign, 0.0, list[Any]()
        while (node := self.producers.get(ref)) is not None:
            if isinstance(node.layer, _MOVING):
                moves.insert(0, node.layer)
            elif isinstance(node.layer, layers.Rescaling) and np.ndim(node.layer.scale) == 0:
                offset += scale * float(node.layer.offset)
                scale *= float(node.layer.scale)
            else:
                break
            ref = node.inputs[0]
        if node is not None and isinstance(node.layer, ConstantRows):
            table = scale * np.asarray(node.layer.embeddings, np.float64) + offset
            base, numbers = node.inputs[0], table
        else:
            base, numbers, table = ref, np.array([offset, scale + offset]), None
        lowest = float(numbers.min())
        if lowest > LEAST_ADDED or not np.all((numbers <= LEAST_ADDED) | (np.abs(numbers) < 1e-3)):
            return None
        return _Mask(ref, base, table, scale, offset, tuple(moves))


def _is_softmax(layer: Any) -> bool:
    if isinstance(layer, layers.Activation):
        return activation_name(layer.activation) == "softmax"
    return isinstance(layer, layers.Softmax)


def _constant_hidden(layer: Any, x: Any, new: Callable[[str], str]) -> Any:
    """The sum with a constant as the sum with its other numbers, and the hiding of the rest."""
    value = np.asarray(layer.value, np.float32)
    hidden = value <= LEAST_ADDED
    others = np.where(hidden, np.float32(0), value)
    if others.any():
        added = WithConstant(ConstantKind.ADD, layer.shape, name=new("bias"), trainable=False)
        x = Part(added, [others])(x)
    hiding = WithConstant(ConstantKind.HIDE, layer.shape, name=layer.name, trainable=False)
    return Part(hiding, [np.where(hidden, np.float32(HIDDEN), np.float32(0))])(x)


def _hidden(layer: Any, mask: _Mask, values: Mapping[Ref, Any], new: Callable[[str], str]) -> Any:
    base = values[mask.base]
    if mask.table is not None:
        table = np.where(mask.table <= LEAST_ADDED, HIDDEN, 0.0).astype(np.float32)
        bias = Part(ConstantRows(*table.shape, name=new("rows"), trainable=False), [table])(base)
    else:
        shrunk = HIDDEN / min(mask.offset, mask.scale + mask.offset)
        bias = layers.Rescaling(shrunk * mask.scale, shrunk * mask.offset, name=new("bias"))(base)
    for move in mask.moves:
        bias = duplicate(move, new("bias"))(bias)
    return Hide(name=layer.name)([bias, values[mask.scores]])
