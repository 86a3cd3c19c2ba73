"""Masks that users add to attention scores: `scores + (1 - mask) * -1e9`, and its kin.

A grid that holds a billion has one integer for all other scores. So a sum that only a softmax
reads becomes what `kqat.rewrites.layers.attention_masks` makes of Keras's own masks: a `Hide`.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops

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
    ChannelAffine,
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

_VANISHING = ("softmax", "sigmoid", "hard_sigmoid", "exponential")


@dataclasses.dataclass(frozen=True)
class _Mask:
    """What pushes hidden scores down, wherever a sum adds it.

    Attributes:
        base: what the bias is computed from: truth values, numbers that are 0 or 1, the bias of a
            `Hide`, or an array that is `HIDDEN` or 0.
        table: the bias of each truth value; `None` where `base` holds something else.
        scale: of a bias that is `scale * number + offset`; 0 where `base` is a bias already.
        offset: as `scale`.
        moves: the layers that the bias passes, in order, each with the shape that it takes.
    """

    base: Any
    table: np.ndarray | None = None
    scale: float = 0.0
    offset: float = 0.0
    moves: tuple[tuple[Any, tuple[int | None, ...]], ...] = ()


def hide_added_masks(
    graph: Graph, origins: Mapping[str, str], kept: Collection[str], name: str
) -> tuple[Graph, dict[str, str]]:
    """The graph with a `Hide` before each softmax for every mask that sums before it add.

    A mask is taken out of the sum that adds it and carried along the sums that follow, since a
    hidden score with something added has left the lowest integer of its grid.

    Args:
        graph: expanded, so that products with numbers are Rescalings.
        origins: name of a layer -> name of the user's layer that it is of.
        kept: the user's layers that stay as they are.
        name: of the model.

    Returns:
        The new graph and origins; those given where there is no such sum.
    """
    search = _Search(graph, {n.name for n in graph.nodes if origins[n.layer.name] in kept})
    sums = {node.name: found for node in graph.nodes if (found := search.masked(node))}
    if not any(found.changes for found in sums.values()):
        return graph, dict(origins)
    values: dict[Ref, Any] = {}
    pending: dict[Ref, list[_Mask]] = {}
    taken = {*graph.input_names, *(node.layer.name for node in graph.nodes)}
    found_origins = dict(origins)

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in keras.tree.flatten((args, kwargs)) if is_tensor(t)]
        values.update(zip(node.inputs, given, strict=True))

        def new(label: str) -> str:
            fresh = unique_name(f"{node.layer.name}_{label}", taken)
            found_origins[fresh] = origins[node.layer.name]
            return fresh

        carried = [mask for ref in node.inputs for mask in pending.get(ref, [])]
        hiding, ends = _Hiding(values, new), search.ends_in_softmax(node.outputs[0])
        if node.name in sums:
            summed = sums[node.name]
            masks = [*carried, *summed.masks]
            outputs = summed.bare(node, values, new, keeps_name=not (ends and masks))
            if ends:
                outputs = hiding.hide(outputs, masks, node.layer.name)
            elif masks:
                outputs = _spread(outputs, node.outputs[0].shape, new)
                pending[node.outputs[0]] = masks
        elif carried and not ends and not (_vanishes(node.layer) or _finds_largest(node.layer)):
            outputs = node.layer(*args, **kwargs)
            shape = tuple(node.inputs[0].shape)
            pending[node.outputs[0]] = [
                dataclasses.replace(m, moves=(*m.moves, (node.layer, shape))) for m in carried
            ]
        elif carried:
            outputs = node.layer(hiding.hide(args[0], carried, new("masked")), **kwargs)
        else:
            outputs = node.layer(*args, **kwargs)
        values.update(zip(node.outputs, keras.tree.flatten(outputs), strict=True))
        return outputs

    return trace(rebuild(graph, call, name)), found_origins


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


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A sum before a softmax, or what hands its numbers on, without the masks that it adds.

    Attributes:
        masks: what it adds to hide scores.
        operands: the other operands, each with its sign.
        constant: what else a sum with a constant adds; `None` where it is nothing.
        changes: whether the layer adds a mask as numbers; a `Hide` is right where it stands.
    """

    masks: tuple[_Mask, ...]
    operands: tuple[tuple[Ref, float], ...]
    constant: np.ndarray | None = None
    changes: bool = False

    def bare(
        self, node: Node, values: Mapping[Ref, Any], new: Callable[[str], str], *, keeps_name: bool
    ) -> Any:
        """The sum without its masks."""
        tensors = [values[ref] for ref, _ in self.operands]
        if not self.masks:
            layer = node.layer if keeps_name else duplicate(node.layer, new("bare"))
            return layer(tensors if len(node.inputs) > 1 else tensors[0])
        if len(tensors) == 1:
            (tensor,), ((_, sign),) = tensors, self.operands
            if sign < 0:
                tensor = layers.Rescaling(sign, name=new("negated"))(tensor)
            return tensor if self.constant is None else _added(tensor, self.constant, new("bias"))
        return layers.Add(name=new("bare"))(tensors)


class _Search:
    """Finds the sums that mask scores."""

    def __init__(self, graph: Graph, kept: Collection[str] = ()) -> None:
        self.outputs, self.kept = set(graph.outputs), set(kept)
        self.consumers, self.producers = graph.consumers(), graph.producers()
        self.gains: dict[Ref, float] = {}
        for node in reversed(graph.nodes):
            self.gains.update((ref, self._gain(ref)) for ref in node.outputs)

    def masked(self, node: Node) -> _Sum | None:
        """What a node before a softmax adds, if it is one that masks may be carried along."""
        if node.name in self.kept or len(node.outputs) != 1:
            return None
        gain, layer = self.gains[node.outputs[0]], node.layer
        if gain == 0:
            return None
        if isinstance(layer, Hide):
            bias, shown = node.inputs
            moved = not self.ends_in_softmax(node.outputs[0])
            return _Sum((_Mask(bias),), ((shown, 1.0),), changes=moved)
        if _factor(layer) is not None:
            return self._constant_sum(node, gain)
        signs = _signs(node)
        if signs is None:
            return None
        parts = [self._masks(ref, s, gain) for ref, s in zip(node.inputs, signs, strict=True)]
        scores = [i for i, part in enumerate(parts) if part is None]
        if not scores:
            # A sum of masks alone, which nothing else hides.
            return None
        masks = tuple(mask for part in parts if part is not None for mask in part)
        operands = tuple((node.inputs[i], signs[i]) for i in scores)
        return _Sum(masks, operands, changes=bool(masks))

    def _constant_sum(self, node: Node, gain: float) -> _Sum | None:
        layer, operands = node.layer, ((node.inputs[0], 1.0),)
        if isinstance(layer, WithConstant) and layer.kind is ConstantKind.HIDE:
            mask = _Mask(np.asarray(layer.value, np.float32))
            return _Sum((mask,), operands, changes=not self.ends_in_softmax(node.outputs[0]))
        value = _addend(node)
        if value is None or not (hidden := value * gain <= LEAST_ADDED).any():
            return _Sum((), operands)
        others = np.where(hidden, np.float32(0), value)
        mask = _Mask(np.where(hidden, np.float32(HIDDEN), np.float32(0)))
        return _Sum((mask,), operands, others if others.any() else None, changes=True)

    def _gain(self, ref: Ref) -> float:
        """By how much a value grows on its way to softmax, at least; 0 where others read it."""
        readers = self.consumers[ref]
        if not readers or ref in self.outputs:
            return 0.0
        # A maximum beside the rest, as in `exp(x - max(x))`, passes over what is hidden.
        gains = [self._gain_through(n, ref) for n in readers if not _finds_largest(n.layer)]
        return min(gains, default=0.0)

    def _gain_through(self, node: Node, ref: Ref) -> float:
        layer = node.layer
        if node.name in self.kept:
            return 0.0
        if _vanishes(layer):
            return 1.0
        factor = 0.0
        if isinstance(layer, _MOVING):
            factor = 1.0
        elif (grows := _factor(layer)) is not None:
            factor = max(grows, 0.0)
        elif isinstance(layer, Hide):
            factor = float(ref == node.inputs[1] and ref != node.inputs[0])
        elif (signs := _signs(node)) is not None:
            factor = float(all(s > 0 for r, s in zip(node.inputs, signs, strict=True) if r == ref))
        return factor * self.gains[node.outputs[0]] if factor else 0.0

    def ends_in_softmax(self, ref: Ref) -> bool:
        """Whether softmax, and nothing else, reads a value, moved at most."""
        readers = self.consumers[ref]
        return (
            bool(readers)
            and ref not in self.outputs
            and all(
                _vanishes(node.layer)
                or (isinstance(node.layer, _MOVING) and self.ends_in_softmax(node.outputs[0]))
                for node in readers
            )
        )

    def is_ignored(self, ref: Ref) -> bool:
        """Whether what reads a value takes no notice of its lowest numbers."""
        return ref not in self.outputs and all(
            _vanishes(node.layer)
            or _finds_largest(node.layer)
            or (
                (isinstance(node.layer, _MOVING) or _hides(node.layer))
                and self.is_ignored(node.outputs[0])
            )
            for node in self.consumers[ref]
        )

    def _masks(self, ref: Ref, sign: float, gain: float) -> list[_Mask] | None:
        """`ref` times `sign` as biases, if all that it adds is zero or far below zero.

        Args:
            ref: an operand of a sum.
            sign: of the operand.
            gain: what the sum is multiplied by before softmax, at least.
        """
        scale, offset, moves = sign, 0.0, list[tuple[Any, tuple[int | None, ...]]]()
        while (node := self.producers.get(ref)) is not None:
            if isinstance(node.layer, _MOVING):
                moves.insert(0, (node.layer, node.inputs[0].shape))
            elif isinstance(node.layer, layers.Rescaling) and np.ndim(node.layer.scale) == 0:
                offset += scale * float(node.layer.offset)
                scale *= float(node.layer.scale)
            else:
                break
            ref = node.inputs[0]
        if node is not None and offset == 0 and (both := self._joined(node, scale, gain)):
            return [dataclasses.replace(m, moves=(*m.moves, *moves)) for m in both]
        if node is not None and isinstance(node.layer, ConstantRows):
            table = scale * np.asarray(node.layer.embeddings, np.float64) + offset
            base, numbers = node.inputs[0], table
        else:
            base, numbers, table = ref, np.array([offset, scale + offset]), None
        if not _are_biases(numbers, gain):
            return None
        return [_Mask(base, table, scale, offset, tuple(moves))]

    def _joined(self, node: Node, scale: float, gain: float) -> list[_Mask] | None:
        """The masks that a sum, or the lowest of several, joins to one."""
        layer, value = node.layer, _addend(node)
        signs = [1.0] * len(node.inputs) if type(layer) is layers.Minimum else _signs(node)
        if value is not None:
            value, signs = scale * value, [1.0]
            if not _are_biases(value, gain):
                return None
        elif signs is None or (type(layer) is layers.Minimum and scale < 0):
            return None
        parts = [
            self._masks(ref, s * scale, gain) for ref, s in zip(node.inputs, signs, strict=True)
        ]
        if any(part is None for part in parts):
            return None
        masks = [mask for part in parts for mask in part or ()]
        if value is not None:
            masks.append(_Mask(np.where(_is_hiding(value), HIDDEN, 0.0).astype(np.float32)))
        return masks


def _factor(layer: Any) -> float | None:
    """What a layer of one input multiplies by, at least; `None` where it does more than that."""
    if isinstance(layer, layers.Rescaling):
        return float(np.min(layer.scale))
    if isinstance(layer, ChannelAffine):
        return 1.0 if layer.gamma is None else float(np.min(layer.gamma))
    if isinstance(layer, WithConstant):
        return float(np.min(layer.value)) if layer.kind is ConstantKind.MULTIPLY else 1.0
    return None


def _addend(node: Node) -> np.ndarray | None:
    """The constant that a layer adds, if it does only that."""
    layer = node.layer
    if layer.trainable:
        return None
    if isinstance(layer, WithConstant) and layer.kind is ConstantKind.ADD:
        return np.asarray(layer.value, np.float32)
    if isinstance(layer, ChannelAffine) and layer.gamma is None and layer.beta is not None:
        return np.asarray(layer.beta, np.float32).reshape(
            (1,) * (len(node.inputs[0].shape) - 1) + (-1,)
        )
    return None


def _signs(node: Node) -> list[float] | None:
    """The signs of the operands of a sum or difference; `None` for all else."""
    if type(node.layer) is layers.Add:
        return [1.0] * len(node.inputs)
    return [1.0, -1.0] if type(node.layer) is layers.Subtract and len(node.inputs) == 2 else None


def _are_biases(numbers: np.ndarray, gain: float) -> bool:
    """Whether numbers are all zero or far below zero, and not all zero."""
    hidden = _is_hiding(numbers)
    return bool(hidden.any() and np.all(numbers[hidden] * gain <= LEAST_ADDED))


def _is_hiding(numbers: np.ndarray) -> np.ndarray:
    """Which numbers of a mask hide; the others are zero but for a rounding."""
    return np.abs(numbers) >= 1e-3


def _vanishes(layer: Any) -> bool:
    """Whether a layer is softmax, or another function that makes zero of what is far below zero.

    The room of `shown_bounds` is enough for those: `exp(-room)` is less than half a step.
    """
    if isinstance(layer, layers.Activation):
        return activation_name(layer.activation) in _VANISHING
    return isinstance(layer, layers.Softmax)


def _finds_largest(layer: Any) -> bool:
    return (
        isinstance(layer, _LARGEST)
        or (isinstance(layer, Reduce) and layer.kind is ReduceKind.MAX)
        or (isinstance(layer, IndexOperation) and layer.kind == "argmax")
    )


def _added(x: Any, value: np.ndarray, name: str) -> Any:
    layer = WithConstant(ConstantKind.ADD, list(value.shape), name=name, trainable=False)
    return Part(layer, [value])(x)


def _spread(x: Any, shape: tuple[int | None, ...], new: Callable[[str], str]) -> Any:
    """`x` broadcast to a shape, which starts with the batch."""
    if tuple(x.shape[1:]) == tuple(shape[1:]):
        return x
    return _added(x, np.zeros(_one(shape), np.float32), new("spread"))


def _one(shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """The shape of one sample, in a batch of one."""
    return (1, *(size or 1 for size in shape[1:]))


class _Hiding:
    """Makes the layers that hide scores.

    Args:
        values: the tensors of the new graph.
        new: gives a layer's name.
    """

    def __init__(self, values: Mapping[Ref, Any], new: Callable[[str], str]) -> None:
        self.values, self.new = values, new

    def hide(self, scores: Any, masks: list[_Mask], name: str) -> Any:
        """The scores, hidden where a mask says so; the last layer bears `name`."""
        biases = [self._bias(mask) for mask in masks]
        constants = [bias for bias in biases if not is_tensor(bias)]
        if constants:
            joined = np.minimum.reduce(np.broadcast_arrays(*constants))
            biases = [joined, *(bias for bias in biases if is_tensor(bias))]
        for index, bias in enumerate(biases):
            last = index == len(biases) - 1
            label = name if last else self.new("hidden")
            if is_tensor(bias):
                scores = Hide(name=label)([bias, scores])
            else:
                shape = list(bias.shape)
                layer = WithConstant(ConstantKind.HIDE, shape, name=label, trainable=False)
                scores = Part(layer, [bias])(scores)
        return scores

    def _bias(self, mask: _Mask) -> Any:
        if isinstance(mask.base, np.ndarray):
            return _moved_constant(mask)
        bias = self.values[mask.base]
        if mask.table is not None:
            table = np.where(_is_hiding(mask.table), HIDDEN, 0.0).astype(np.float32)
            rows = ConstantRows(*table.shape, name=self.new("rows"), trainable=False)
            bias = Part(rows, [table])(bias)
        elif mask.scale:
            shrunk = HIDDEN / min(mask.offset, mask.scale + mask.offset)
            bias = layers.Rescaling(
                shrunk * mask.scale, shrunk * mask.offset, name=self.new("bias")
            )(bias)
        for move, shape in mask.moves:
            bias = duplicate(move, self.new("bias"))(_spread(bias, shape, self.new))
        return bias


def _moved_constant(mask: _Mask) -> np.ndarray:
    value = mask.base
    for move, shape in mask.moves:
        value = ops.convert_to_numpy(move(np.broadcast_to(value, _one(shape))))
    return value
