"""Masks that users add to attention scores: `scores + (1 - mask) * -1e9`, and its kin.

A grid that holds a billion has one integer for all other scores. So a sum that only a softmax
reads becomes what `kqat.rewrites.layers.attention_masks` makes of Keras's own masks: a `Hide`.
Between the sum and the softmax there may be further sums, temperatures, layers that move, pad or
join numbers, and functions that leave low numbers low, such as a clip at -1e4.
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
    Ref,
    activation_name,
    duplicate,
    is_tensor,
    operations_between,
    rebuild,
    trace,
    unique_name,
)
from kqat.grids import HIDDEN
from kqat.parts import (
    ChannelAffine,
    Clip,
    ConstantKind,
    ConstantRows,
    Elementwise,
    Hide,
    IndexOperation,
    Learned,
    Padding,
    PaddingKind,
    Reduce,
    ReduceKind,
    Select,
    Slice,
    Take,
    WithConstant,
    ZeroPadding,
)
from kqat.planning.chosen_functions import join_choices
from kqat.planning.mask_biases import (
    Beside,
    Chosen,
    Hiding,
    Mask,
    Move,
    Through,
    added,
    is_hiding,
    one_sample,
    spread,
)
from kqat.rewrites import FAR_BELOW, zeros_around

# What is added to a hidden score at least; Swin adds this, others a billion. Softmax gives such a
# key less than float32 can tell from zero, beside scores that spread by less than 80.
LEAST_ADDED = -100.0
# Layers that put zeros around numbers.
_PADDING = (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D, ZeroPadding)
# Layers that hand numbers on as they are.
_MOVING = (
    layers.Reshape, layers.Permute, layers.Flatten, layers.Identity, layers.RepeatVector,
    layers.Dropout, layers.Cropping1D, layers.Cropping2D, layers.Cropping3D, Slice, Take, *_PADDING,
)  # fmt: skip
# Functions of one number, some of which leave low numbers low.
_FUNCTIONS = (Elementwise, Clip, layers.Activation, layers.LeakyReLU, layers.ReLU)
# Numbers to try such a function at.
_LOW = -np.geomspace(1e-2, 1e38, 161, dtype=np.float32)
# Scores; a function that changes none of these does nothing but bound what is hidden.
_SCORES = np.linspace(-1e3, 1e3, 2001, dtype=np.float32)
_LARGEST = (
    layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D, layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D,
)  # fmt: skip

# What is added at least to a score that a function bounds, as ReLU and a clip do; no score that is
# shown is as far from zero.
_FAR = -1e4

_VANISHING = ("softmax", "sigmoid", "hard_sigmoid", "exponential")


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
    if any(map(_holds_far_numbers, graph.nodes)):
        graph = join_choices(graph, origins, kept, name)
    search = _Search(graph, {n.name for n in graph.nodes if origins[n.layer.name] in kept})
    sums = {node.name: found for node in graph.nodes if (found := search.masked(node))}
    if not any(found.changes for found in sums.values()) and not any(
        search.passing(node, {}) for node in graph.nodes
    ):
        return graph, dict(origins)
    values: dict[Ref, Any] = {}
    pending: dict[Ref, list[Mask]] = {}
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
        hiding, ends = Hiding(values, new), search.ends_in_softmax(node.outputs[0])
        if node.name in sums:
            summed = sums[node.name]
            masks = [*carried, *summed.masks]
            outputs = summed.bare(node, values, new, keeps_name=not (ends and masks))
            if ends:
                outputs = hiding.hide(outputs, masks, node.layer.name)
            elif masks:
                outputs = spread(outputs, node.outputs[0].shape, new)
                pending[node.outputs[0]] = masks
        elif carried and (low := search.lowest(node)) is not None:
            outputs = hiding.lifted(node.layer(*args, **kwargs), carried, low)
        elif masks := search.passing(node, pending):
            outputs = search.bare(node, args, kwargs, new)
            if ends:
                outputs = hiding.hide(outputs, masks, new("masked"))
            else:
                pending[node.outputs[0]] = masks
        elif carried and not (
            isinstance(node.layer, Learned) or search.only_chooses(node, node.inputs[0])
        ):
            hidden = {
                id(values[ref]): hiding.hide(values[ref], pending[ref], new("masked"))
                for ref in dict.fromkeys(node.inputs)
                if ref in pending
            }
            args, kwargs = keras.tree.map_structure(lambda x: hidden.get(id(x), x), (args, kwargs))
            outputs = node.layer(*args, **kwargs)
        else:
            outputs = node.layer(*args, **kwargs)
        if carried or node.name in sums or _pads_lowest(node.layer):
            for made in operations_between(list(values.values()), keras.tree.flatten(outputs)):
                found_origins.setdefault(made.name, origins[node.layer.name])
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

    masks: tuple[Mask, ...]
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
            return tensor if self.constant is None else added(tensor, self.constant, new("bias"))
        kind = layers.Minimum if isinstance(node.layer, layers.Minimum) else layers.Add
        return kind(name=new("bare"))(tensors)


class _Search:
    """Finds the sums that mask scores."""

    def __init__(self, graph: Graph, kept: Collection[str] = ()) -> None:
        self.outputs, self.kept = set(graph.outputs), set(kept)
        self.consumers, self.producers = graph.consumers(), graph.producers()
        self.has_far_numbers = any(_holds_far_numbers(node) for node in graph.nodes)
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
            return _Sum((Mask(bias),), ((shown, 1.0),), changes=moved)
        if _factor(layer) is not None:
            return self._constant_sum(node, gain)
        if type(layer) is layers.Minimum:
            return self._gated(node, gain)
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

    def _gated(self, node: Node, gain: float) -> _Sum | None:
        """A minimum with numbers that are all far above the scores or far below them."""
        parts = [self._masks(ref, 1.0, gain, gates=True) for ref in node.inputs]
        masks = tuple(mask for part in parts if part for mask in part)
        operands = tuple(
            (ref, 1.0) for ref, part in zip(node.inputs, parts, strict=True) if part is None
        )
        if not masks or not operands or len({len(ref.shape) for ref in node.inputs}) > 1:
            return None
        return _Sum(masks, operands, changes=True)

    def lowest(self, node: Node) -> float | None:
        """What a function makes of all that is hidden, if that is no low number."""
        layer, ref = node.layer, node.outputs[0]
        if not isinstance(layer, _FUNCTIONS) or _vanishes(layer) or node.name in self.kept:
            return None
        return None if _growth(layer, self.gains[ref]) else _lowest(layer)

    def passing(self, node: Node, pending: Mapping[Ref, list[Mask]]) -> list[Mask]:
        """The masks behind a layer other than a sum; none where they end before it.

        Args:
            node: any, whether masks reach it or not.
            pending: the masks of values that are not hidden yet.
        """
        layer, ref = node.layer, node.outputs[0]
        if len(node.outputs) != 1 or self.gains[ref] == 0 or node.name in self.kept:
            return []
        masks = [pending.get(ref, []) for ref in node.inputs]
        shapes = [ref.shape for ref in node.inputs]
        if _pads_lowest(layer):
            if not masks[0] and self.ends_in_softmax(ref):
                return []  # It is right where it stands.
            widths = ((0, 0), *((a, b) for a, b in layer.widths))
            shown = np.zeros(one_sample(shapes[0]), np.float32)
            around = np.pad(shown, widths, constant_values=HIDDEN)
            return [*(mask.moved(Beside(widths, shapes[0])) for mask in masks[0]), Mask(around)]
        if isinstance(layer, layers.Concatenate):
            pairs = zip(masks, _beside(layer, shapes), strict=True)
            return [mask.moved(move) for found, move in pairs for mask in found]
        if isinstance(layer, _MOVING):
            return [mask.moved(Through(layer, shapes[0])) for mask in masks[0]]
        if isinstance(layer, (*_FUNCTIONS, layers.Minimum)) and not _vanishes(layer):
            return [mask for found in masks for mask in found]
        if isinstance(layer, Select):
            condition = node.inputs[0]
            return [
                mask.moved(Chosen(condition, where))
                for where, found in ((True, masks[1]), (False, masks[2]))
                for mask in found
            ]
        return []

    def bare(self, node: Node, args: Any, kwargs: Any, new: Callable[[str], str]) -> Any:
        """What a layer that masks pass computes of scores that are not hidden."""
        if _pads_lowest(node.layer):
            return zeros_around(args[0], [(0, 0), *node.layer.widths], new("around"))
        read = self.consumers[node.outputs[0]]
        only_bounds = isinstance(node.layer, _FUNCTIONS) and np.array_equal(
            _computed(node.layer, _SCORES), _SCORES
        )
        if only_bounds and not any(_finds_largest(reader.layer) for reader in read):
            return args[0]
        return node.layer(*args, **kwargs)

    def _constant_sum(self, node: Node, gain: float) -> _Sum | None:
        layer, operands = node.layer, ((node.inputs[0], 1.0),)
        if isinstance(layer, WithConstant) and layer.kind is ConstantKind.HIDE:
            mask = Mask(np.asarray(layer.value, np.float32))
            return _Sum((mask,), operands, changes=not self.ends_in_softmax(node.outputs[0]))
        value = addend(node)
        if value is None or not (hidden := value * gain <= LEAST_ADDED).any():
            return _Sum((), operands)
        others = np.where(hidden, np.float32(0), value)
        mask = Mask(np.where(hidden, np.float32(HIDDEN), np.float32(0)))
        return _Sum((mask,), operands, others if others.any() else None, changes=True)

    def _gain(self, ref: Ref) -> float:
        """By how much a value grows on its way to softmax, at least; 0 where others read it."""
        readers = self._readers(ref)
        if not readers or ref in self.outputs:
            return 0.0
        # A maximum beside the rest, as in `exp(x - max(x))`, passes over what is hidden.
        gains = [
            self._gain_through(node, ref)
            for node in readers
            if not (_finds_largest(node.layer) or self.only_chooses(node, ref))
        ]
        return min(gains, default=0.0)

    def only_chooses(self, node: Node, ref: Ref) -> bool:
        """Whether a node compares scores to choose between functions of the same scores alone.

        What is hidden is so in both, whatever it chooses.
        """
        if not isinstance(node.layer, IndexOperation) or node.inputs != (ref,):
            return False
        readers = self.consumers[node.outputs[0]]
        return bool(readers) and all(
            isinstance(reader.layer, Select)
            and reader.inputs[0] == node.outputs[0]
            and all(self._is_of(value, ref) for value in reader.inputs[1:])
            for reader in readers
        )

    def _is_of(self, value: Ref, ref: Ref) -> bool:
        """Whether a value is a function of `ref` and nothing else, layer by layer."""
        while value != ref:
            node = self.producers.get(value)
            if node is None or len(node.inputs) != 1 or isinstance(node.layer, Learned):
                return False
            value = node.inputs[0]
        return True

    def _gain_through(self, node: Node, ref: Ref) -> float:
        layer = node.layer
        if node.name in self.kept:
            return 0.0
        if _vanishes(layer):
            return 1.0
        factor = 0.0
        if isinstance(layer, (*_MOVING, layers.Concatenate)) or _pads_lowest(layer):
            factor = 1.0
        elif type(layer) is layers.Minimum:
            # What is not hidden may be of any shape; a mask of lower rank would move.
            factor = float(len({len(r.shape) for r in node.inputs}) == 1)
        elif isinstance(layer, Select):
            chosen = ref in node.inputs[1:] and ref != node.inputs[0]
            alike = len({len(r.shape) for r in node.inputs}) == 1
            factor = float(chosen and (alike or self.ends_in_softmax(node.outputs[0])))
        elif type(layer) is layers.Maximum:
            # Each operand is hidden before it: what is hidden in all of them stays lowest.
            factor = float(self.ends_in_softmax(node.outputs[0]))
        elif isinstance(layer, _FUNCTIONS):
            grown = _growth(layer, self.gains[node.outputs[0]])
            bounded = not grown and self.has_far_numbers and _lowest(layer) is not None
            return LEAST_ADDED / _FAR if bounded else grown
        elif (grows := _factor(layer)) is not None:
            factor = max(grows, 0.0)
        elif isinstance(layer, Hide):
            factor = float(ref == node.inputs[1] and ref != node.inputs[0])
        elif (signs := _signs(node)) is not None:
            factor = float(all(s > 0 for r, s in zip(node.inputs, signs, strict=True) if r == ref))
        return factor * self.gains[node.outputs[0]] if factor else 0.0

    def ends_in_softmax(self, ref: Ref) -> bool:
        """Whether softmax, and nothing else, reads a value, moved or beside others at most."""
        readers = self._readers(ref)
        return (
            bool(readers)
            and ref not in self.outputs
            and all(
                _vanishes(node.layer)
                or (
                    (_hands_on(node, ref) or _pads_lowest(node.layer))
                    and node.name not in self.kept
                    and self.ends_in_softmax(node.outputs[0])
                )
                for node in readers
            )
        )

    def is_ignored(self, ref: Ref) -> bool:
        """Whether what reads a value takes no notice of its lowest numbers."""
        return ref not in self.outputs and all(
            _vanishes(node.layer)
            or _finds_largest(node.layer)
            or (
                (_hands_on(node, ref) or _hides(node.layer) or type(node.layer) is layers.Maximum)
                and self.is_ignored(node.outputs[0])
            )
            for node in self._readers(ref)
        )

    def _readers(self, ref: Ref) -> list[Node]:
        """What computes with a value; a constant reads of it the number of samples alone."""
        return [node for node in self.consumers[ref] if not isinstance(node.layer, Learned)]

    def _masks(
        self, ref: Ref, scale: float, gain: float, offset: float = 0.0, *, gates: bool = False
    ) -> list[Mask] | None:
        """`scale * ref + offset` as biases, if all that it adds is zero or far below zero.

        Args:
            ref: an operand of a sum.
            scale: of the operand, as its sign.
            gain: what the sum is multiplied by before softmax, at least.
            offset: beside it.
            gates: whether scores are compared with it; what is far above them stands for zero.
        """
        moves = list[Move]()
        while (node := self.producers.get(ref)) is not None:
            if isinstance(node.layer, _MOVING) and not (
                # Zeros around numbers of which `offset` makes biases are none.
                (offset or gates) and isinstance(node.layer, _PADDING)
            ):
                moves.insert(0, Through(node.layer, node.inputs[0].shape))
            elif isinstance(node.layer, layers.Rescaling) and np.ndim(node.layer.scale) == 0:
                offset += scale * float(node.layer.offset)
                scale *= float(node.layer.scale)
            else:
                break
            ref = node.inputs[0]
        if node is not None and isinstance(node.layer, layers.Concatenate) and not gates:
            parts = self._side_by_side(node, scale, gain, offset)
            return [mask.moved(*moves) for mask in parts] or None
        if (
            node is not None
            and offset == 0
            and not gates
            and (both := self._joined(node, scale, gain))
        ):
            return [mask.moved(*moves) for mask in both]
        if node is not None and isinstance(node.layer, ConstantRows):
            table = scale * np.asarray(node.layer.embeddings, np.float64) + offset
            base, numbers = node.inputs[0], table
        else:
            base, numbers, table = ref, np.array([offset, scale + offset]), None
        if gates:
            above = numbers * gain >= -_FAR
            if not np.all(above | (numbers * gain <= LEAST_ADDED)):
                return None
            numbers = np.where(above, 0.0, numbers)
            if table is None:
                offset, scale = float(numbers[0]), float(numbers[1] - numbers[0])
            else:
                table = numbers
        if not _are_biases(numbers, gain):
            return None
        return [Mask(base, table, scale, offset, tuple(moves))]

    def _side_by_side(self, node: Node, scale: float, gain: float, offset: float) -> list[Mask]:
        """The masks of a concatenation's parts; none if a part is something else."""
        found: list[Mask] = []
        moves = _beside(node.layer, [ref.shape for ref in node.inputs])
        for ref, move in zip(node.inputs, moves, strict=True):
            producer = self.producers.get(ref)
            masks: list[Mask] | None
            if producer is not None and isinstance(producer.layer, Learned):
                value = scale * np.asarray(producer.layer.value, np.float32)[None] + offset
                bias = np.where(is_hiding(value), HIDDEN, 0.0).astype(np.float32)
                if not is_hiding(value).any():
                    continue
                masks = [Mask(bias)] if _are_biases(value, gain) else None
            else:
                masks = self._masks(ref, scale, gain, offset)
            if masks is None:
                return []
            found += [mask.moved(move) for mask in masks]
        return found

    def _joined(self, node: Node, scale: float, gain: float) -> list[Mask] | None:
        """The masks that a sum, or the lowest of several, joins to one."""
        layer, value = node.layer, addend(node)
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
            masks.append(Mask(np.where(is_hiding(value), HIDDEN, 0.0).astype(np.float32)))
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


def addend(node: Node) -> np.ndarray | None:
    """The constant that a layer adds, if it does only that."""
    layer = node.layer
    if getattr(layer, "trainable", False):  # An operation that stays as it is has no such thing.
        return None
    if isinstance(layer, WithConstant) and layer.kind is ConstantKind.ADD:
        return np.asarray(layer.value, np.float32)
    if isinstance(layer, ChannelAffine) and layer.gamma is None and layer.beta is not None:
        return np.asarray(layer.beta, np.float32).reshape(
            (1,) * (len(node.inputs[0].shape) - 1) + (-1,)
        )
    return None


def _beside(layer: Any, shapes: list[tuple[int | None, ...]]) -> list[Beside]:
    """What befalls the bias of each part of a concatenation."""
    axis = layer.axis % len(shapes[0])
    sizes = [shape[axis] or 0 for shape in shapes]
    return [
        Beside(
            tuple(
                (sum(sizes[:i]), sum(sizes[i + 1 :])) if a == axis else (0, 0)
                for a in range(len(shape))
            ),
            shape,
        )
        for i, shape in enumerate(shapes)
    ]


def _hands_on(node: Node, ref: Ref) -> bool:
    """Whether a layer's output holds the numbers of `ref` as they are, among others at most."""
    if isinstance(node.layer, Select):
        return ref in node.inputs[1:] and ref != node.inputs[0]
    return isinstance(node.layer, (*_MOVING, layers.Concatenate))


def _computed(function: Any, numbers: np.ndarray) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(function(numbers[:, None])))[:, 0]


def _growth(function: Any, gain: float) -> float:
    """By how much numbers grow in a function and behind it, at least, if they lie far below zero.

    0 where the function lifts such numbers up.

    Args:
        function: a layer.
        gain: behind it.
    """
    if not gain:
        return 0.0
    low = _computed(function, _LOW) * gain <= LEAST_ADDED
    below = np.logical_and.accumulate(low[::-1])[::-1]  # It, and all that is lower.
    return float(LEAST_ADDED / _LOW[np.argmax(below)]) if below.any() else 0.0


def _lowest(function: Any) -> float | None:
    """The one value that a layer's function has of all numbers far below zero, if there is one."""
    found = _computed(function, _LOW[_LOW <= _FAR])
    return float(found[0]) if np.ptp(found) == 0 and np.isfinite(found[0]) else None


def _holds_far_numbers(node: Node) -> bool:
    """Whether a layer holds numbers so far from zero that it may make a mask."""
    layer = node.layer
    if _hides(layer):
        return True
    held: list[Any] = [addend(node)]
    if isinstance(layer, layers.Rescaling):
        held += [layer.scale, layer.offset]
    if isinstance(layer, ConstantRows):
        held.append(layer.embeddings)
    if isinstance(layer, Learned):
        held.append(layer.value)
    return any(np.any(np.abs(np.asarray(v)) >= -_FAR) for v in held if v is not None)


def _signs(node: Node) -> list[float] | None:
    """The signs of the operands of a sum or difference; `None` for all else."""
    if type(node.layer) is layers.Add:
        return [1.0] * len(node.inputs)
    return [1.0, -1.0] if type(node.layer) is layers.Subtract and len(node.inputs) == 2 else None


def _are_biases(numbers: np.ndarray, gain: float) -> bool:
    """Whether numbers are all zero or far below zero, and not all zero."""
    hidden = is_hiding(numbers)
    return bool(hidden.any() and np.all(numbers[hidden] * gain <= LEAST_ADDED))


def _pads_lowest(layer: Any) -> bool:
    return isinstance(layer, Padding) and layer.kind is PaddingKind.LOWEST


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
