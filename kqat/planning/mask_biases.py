"""`Mask`: what hides attention scores; its bias on the way that the scores take, and as a layer."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from keras import layers, ops

from kqat.graph import Part, Ref, duplicate, is_tensor
from kqat.grids import HIDDEN
from kqat.parts import ConstantKind, ConstantRows, Hide, WithConstant
from kqat.rewrites import truth, zeros_around

Shape = tuple[int | None, ...]
NewName = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Through:
    """A bias passes a layer that moves, crops or pads.

    Attributes:
        layer: of the scores, or of the mask's own numbers.
        shape: that the layer takes.
    """

    layer: Any
    shape: Shape

    def constant(self, bias: np.ndarray) -> np.ndarray:
        """The bias as an array, of one sample."""
        moved = self.layer(np.broadcast_to(bias, one_sample(self.shape)))
        return np.asarray(ops.convert_to_numpy(moved))

    def tensor(self, bias: Any, new: NewName) -> Any:
        """The bias as a tensor."""
        return duplicate(self.layer, new("bias"))(spread(bias, self.shape, new))


@dataclasses.dataclass(frozen=True)
class Beside:
    """A bias gets other scores around it or beside it, of which it hides none.

    Attributes:
        widths: of those before and behind, for each axis; the batch has none.
        shape: of the scores that the bias is of.
    """

    widths: tuple[tuple[int, int], ...]
    shape: Shape

    def constant(self, bias: np.ndarray) -> np.ndarray:
        """The bias as an array, of one sample."""
        return np.pad(np.broadcast_to(bias, one_sample(self._least(bias))), self.widths)

    def tensor(self, bias: Any, new: NewName) -> Any:
        """The bias as a tensor."""
        return zeros_around(spread(bias, self._least(bias), new), list(self.widths), new("bias"))

    def _least(self, bias: Any) -> Shape:
        """The bias's shape, with its size along each axis that grows."""
        triples = zip(bias.shape, self.shape, self.widths, strict=True)
        return tuple(whole if any(width) else size for size, whole, width in triples)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A bias holds where a condition chooses the scores that it is of.

    Attributes:
        condition: truth values.
        where: what they are there.
    """

    condition: Ref
    where: bool


Move = Through | Beside | Chosen


@dataclasses.dataclass(frozen=True)
class Mask:
    """What pushes hidden scores down, wherever a sum adds it.

    Attributes:
        base: what the bias is computed from: truth values, numbers that are 0 or 1, the bias of a
            `Hide`, or an array that is `HIDDEN` or 0.
        table: the bias of each truth value; `None` where `base` holds something else.
        scale: of a bias that is `scale * number + offset`; 0 where `base` is a bias already.
        offset: as `scale`.
        moves: what the bias passes, in order.
    """

    base: Any
    table: np.ndarray | None = None
    scale: float = 0.0
    offset: float = 0.0
    moves: tuple[Move, ...] = ()

    def moved(self, *moves: Move) -> "Mask":
        """The mask behind further moves."""
        return dataclasses.replace(self, moves=(*self.moves, *moves))


class Hiding:
    """Makes the layers that hide scores.

    Args:
        values: the tensors of the new graph.
        new: gives a layer's name.
    """

    def __init__(self, values: Mapping[Ref, Any], new: Callable[[str], str]) -> None:
        self.values, self.new = values, new

    def hide(self, scores: Any, masks: list[Mask], name: str) -> Any:
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

    def _bias(self, mask: Mask) -> Any:
        if isinstance(mask.base, np.ndarray):
            return self._moved(mask.base, mask.moves)
        bias = self.values[mask.base]
        if mask.table is not None:
            table = np.where(is_hiding(mask.table), HIDDEN, 0.0).astype(np.float32)
            rows = ConstantRows(*table.shape, name=self.new("rows"), trainable=False)
            bias = Part(rows, [table])(bias)
        elif mask.scale:
            shrunk = HIDDEN / min(mask.offset, mask.scale + mask.offset)
            bias = layers.Rescaling(
                shrunk * mask.scale, shrunk * mask.offset, name=self.new("bias")
            )(bias)
        return self._moved(bias, mask.moves)

    def _moved(self, bias: Any, moves: Iterable[Move]) -> Any:
        """A bias, an array or a tensor, behind moves."""
        for move in moves:
            if isinstance(move, Chosen):
                condition = self.values[move.condition]
                values = (0.0, 1.0) if move.where else (1.0, 0.0)
                factor = truth(condition, values, condition.shape[1:], self.new("chosen"))
                bias = self._times(factor, bias)
            elif is_tensor(bias):
                bias = move.tensor(bias, self.new)
            else:
                bias = move.constant(bias)
        return bias

    def _times(self, x: Any, factor: Any) -> Any:
        if is_tensor(factor):
            return layers.Multiply(name=self.new("product"))([x, factor])
        shape, name = list(factor.shape), self.new("product")
        layer = WithConstant(ConstantKind.MULTIPLY, shape, name=name, trainable=False)
        return Part(layer, [np.asarray(factor, np.float32)])(x)

    def lifted(self, x: Any, masks: list[Mask], low: float) -> Any:
        """What a function makes of scores, with `low`, its lowest value, where a mask says so."""
        for mask in masks:
            bias = self._bias(mask)
            if not is_tensor(bias):
                hidden = bias / HIDDEN
                x = self._times(x, 1 - hidden)
                x = added(x, (low * hidden).astype(np.float32), self.new("lowest")) if low else x
                continue
            shown = layers.Rescaling(-1 / HIDDEN, 1.0, name=self.new("shown"))(bias)
            x = self._times(x, shown)
            if low:
                lowest = layers.Rescaling(low / HIDDEN, name=self.new("lowest"))(bias)
                x = layers.Add(name=self.new("lifted"))([x, lowest])
        return x


def is_hiding(numbers: np.ndarray) -> np.ndarray:
    """Which numbers of a mask hide; the others are zero but for a rounding."""
    return np.abs(numbers) >= 1e-3


def added(x: Any, value: np.ndarray, name: str) -> Any:
    """`x + value`; the value has a batch axis of one."""
    layer = WithConstant(ConstantKind.ADD, list(value.shape), name=name, trainable=False)
    return Part(layer, [value])(x)


def spread(x: Any, shape: tuple[int | None, ...], new: Callable[[str], str]) -> Any:
    """`x` broadcast to a shape, which starts with the batch."""
    if tuple(x.shape[1:]) == tuple(shape[1:]):
        return x
    return added(x, np.zeros(one_sample(shape), np.float32), new("spread"))


def one_sample(shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """The shape of one sample, in a batch of one."""
    return (1, *(size or 1 for size in shape[1:]))
