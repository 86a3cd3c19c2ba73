"""How the weights and the values of a QAT model lie on their grids: what is rounded, and where.

A `RoundedTensor` is one tensor that the file holds in integers. Its numbers are counted in units of
the integers, so that channels with scales of their own share one axis.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kqat.base import CalibrationError, ModelError
from kqat.graph import Graph, Node
from kqat.grids import LOWEST, QuantSpec, arithmetic, nearest_name
from kqat.training import (
    ActivationQuantizer,
    QuantizedRecurrence,
    QuantizeWrapper,
    ValueNames,
    as_tensors,
    batches,
    check_quantized,
    some_samples,
)

# At most so many samples are counted, in batches as those of calibration.
SAMPLES = 128
# Bins over a grid, where it has more integers than this; a grid of fewer has finer bins.
_BINS = 256
# Bins on either side of a grid hold what is clipped: a share of the grid's width.
_MARGIN = 8
# What a tensor of values is: what enters the model, what leaves it, or what lies between.
VALUES, INPUT, OUTPUT = "values", "input", "output"


@dataclasses.dataclass(frozen=True, eq=False)
class RoundedTensor:
    """One tensor that is rounded to a grid.

    Attributes:
        layer: name of the layer that has the weight or makes the value, `lstm/kernel_part` inside
            of a recurrence.
        what: name of the weight, or `"values"`.
        title: what it is called alone: `conv/kernel`, or the name of the value, which the report
            of `tflite_export.verify` and a `Diagnosis` have too.
        role: of values `"input"`, `"output"` or `"values"`; of a weight its name.
        names: every name that asks for it: the layer's, the value's, the quantizer's.
        spec: the grid.
        scale: one step, in real units; of a weight one for each channel or all.
        zero_point: the integer of real zero.
        quantizer, site: of a value, else `None` and 0.
        wrapper, branch: of a weight, else `None` and 0.
    """

    layer: str
    what: str
    title: str
    role: str
    names: tuple[str, ...]
    spec: QuantSpec
    quantizer: ActivationQuantizer | None = None
    site: int = 0
    wrapper: QuantizeWrapper | None = None
    branch: int = 0

    @property
    def scale(self) -> np.ndarray:
        """One step of the grid, in real units: float32, one number or one for each channel."""
        if self.wrapper is not None:
            scale = keras.ops.convert_to_numpy(self.wrapper.scale(self.what, self.branch))
            return np.asarray(scale, np.float32)
        return np.asarray(self._nudged()[0])

    @property
    def zero_point(self) -> int:
        """The integer that stands for zero."""
        return 0 if self.wrapper is not None else int(self._nudged()[1])

    @property
    def is_calibrated(self) -> bool:
        """Whether the grid is known: that of a weight always is."""
        return self.quantizer is None or self.quantizer.is_calibrated()

    def real_range(self) -> tuple[float, float]:
        """The least and the largest value of the grid, in real units, over all channels."""
        spec, scale = self.spec, float(np.max(self.scale))
        zero = self.zero_point
        return (spec.qmin - zero) * scale, (spec.qmax - zero) * scale

    def _nudged(self) -> tuple[Any, Any]:
        assert self.quantizer is not None
        low, high = self.quantizer.range()
        return arithmetic.nudge(np.float32(low), np.float32(high), self.spec)


@dataclasses.dataclass(eq=False)
class GridCounts:
    """The numbers of a tensor, counted along its grid.

    Attributes:
        tensor: whose.
        edges: of the bins, in integers of the grid; the first and the last bin also hold all that
            lies beyond them.
        exact: how many numbers were in each bin before rounding.
        rounded: how many are in each after it.
        total, clipped: how many there are, and how many of them lie outside the grid: more than
            half a step beyond its ends.
        far: how many of these lie more than one step beyond, so that clipping costs more than
            rounding can. A softmax's 1.0 is clipped to 255/256, which does not.
    """

    tensor: RoundedTensor
    edges: np.ndarray
    exact: np.ndarray
    rounded: np.ndarray
    total: int = 0
    clipped: int = 0
    far: int = 0

    @classmethod
    def of(cls, tensor: RoundedTensor) -> "GridCounts":
        """None counted yet."""
        spec = tensor.spec
        levels = spec.qmax - spec.qmin + 1
        # Each integer in the middle of as many bins as every other.
        width = max(levels // _BINS, 1) if levels >= _BINS else 1.0 / _fine_bins(levels)
        margin = max(levels / _MARGIN, 1.0)
        margin = np.ceil(margin / width) * width
        count = round((levels + 2 * margin) / width)
        edges = spec.qmin - 0.5 - margin + width * np.arange(count + 1)
        return cls(tensor, edges, np.zeros(count, np.int64), np.zeros(count, np.int64))

    @property
    def clipped_share(self) -> float:
        """The share of numbers that lie outside the grid, 0..1."""
        return self.clipped / max(self.total, 1)

    @property
    def far_share(self) -> float:
        """The share of numbers that lie more than one step outside the grid, 0..1."""
        return self.far / max(self.total, 1)

    def add(self, position: np.ndarray, rounded: np.ndarray) -> None:
        """Takes in numbers, in integers of the grid, before and after rounding; of any shape."""
        spec = self.tensor.spec
        self.exact += self._counted(position)
        self.rounded += self._counted(rounded)
        outside = (position < spec.qmin - 0.5) | (position > spec.qmax + 0.5)
        self.total += position.size
        self.clipped += int(np.count_nonzero(outside))
        beyond = (position < spec.qmin - 1.0) | (position > spec.qmax + 1.0)
        self.far += int(np.count_nonzero(beyond))

    def _counted(self, numbers: np.ndarray) -> np.ndarray:
        first, width = self.edges[0], self.edges[1] - self.edges[0]
        place = np.floor((numbers.ravel() - first) / width)
        place = np.clip(place, 0, len(self.exact) - 1).astype(np.int64)
        return np.bincount(place, minlength=len(self.exact))


def _fine_bins(levels: int) -> int:
    """How many bins each integer of a small grid has: odd, so that it is inside the middle one."""
    return max(64 // levels, 1) // 2 * 2 + 1 if levels < _BINS // 2 else 1


def rounded_tensors(model: keras.Model, graph: Graph) -> list[RoundedTensor]:
    """Every weight and every value of a QAT model that is rounded, in the order of the network.

    A layer that is called more than once is listed once, where its weights are the same.

    Args:
        model: the QAT model.
        graph: of it.

    Raises:
        ModelError: if `model` is no QAT model.
    """
    check_quantized(model)
    found: dict[Any, RoundedTensor] = {}
    for key, tensor in _tensors(graph, ""):
        found.setdefault(key, tensor)
    return list(found.values())


def _tensors(graph: Graph, prefix: str) -> Iterator[tuple[Any, RoundedTensor]]:
    names, producers = ValueNames(graph), graph.producers()
    for node in graph.nodes:
        layer = node.layer
        if isinstance(layer, QuantizedRecurrence):
            yield from _tensors(layer.parts.graph, f"{prefix}{layer.label}/")
        elif isinstance(layer, QuantizeWrapper):
            own = f"{prefix}{layer.layer.name}"
            for name, spec in layer.weight_specs.items():
                branch = node.kwargs.get("branch", 0) if layer.folds_before(name) else 0
                title = f"{own}/{name}" + (f"_branch_{branch}" if branch else "")
                names_of = (own, title)
                tensor = RoundedTensor(
                    own, name, title, name, names_of, spec, wrapper=layer, branch=branch
                )
                yield (id(layer), name, branch), tensor
        elif isinstance(layer, ActivationQuantizer) and node.kwargs.get("observe", True):
            site = node.kwargs.get("site", 0)
            value = f"{prefix}{names.of(layer, site)}"
            maker = _maker(node, producers)
            own = value if maker is None else f"{prefix}{_name_of(maker)}"
            tensor = RoundedTensor(
                own,
                VALUES,
                value,
                VALUES if prefix else role_of(node, graph),
                tuple(dict.fromkeys((own, value, layer.name, layer.label))),
                layer.spec,
                quantizer=layer,
                site=site,
            )
            yield (id(layer), site), tensor


def role_of(node: Node, graph: Graph) -> str:
    """What the value that a node rounds is: the model's input, its output, or one between.

    An Identity behind it may bear the output's name.
    """
    if node.inputs[0] in graph.inputs:
        return INPUT
    readers, waiting = graph.consumers(), list(node.outputs)
    while waiting:
        ref = waiting.pop()
        if ref in graph.outputs:
            return OUTPUT
        kinds = (keras.layers.Identity, ActivationQuantizer)
        waiting += [x for n in readers[ref] if isinstance(n.layer, kinds) for x in n.outputs]
    return VALUES


def _maker(node: Node, producers: Mapping[Any, Node]) -> Node | None:
    """The node that computes what a quantizer rounds; `None` for an input of the model."""
    maker = producers.get(node.inputs[0])
    while maker is not None and isinstance(maker.layer, ActivationQuantizer):
        maker = producers.get(maker.inputs[0])
    return maker


def _name_of(node: Node) -> str:
    layer = node.layer
    if isinstance(layer, QuantizeWrapper):
        return str(layer.layer.name)
    return str(layer.label) if isinstance(layer, QuantizedRecurrence) else node.name


def chosen(
    tensors: Sequence[RoundedTensor], layers: Sequence[str] | str | None, model_name: str
) -> list[RoundedTensor]:
    """The tensors that `layers` ask for, in the order of the network; all where it is `None`.

    Args:
        tensors: from `rounded_tensors`.
        layers: names of layers or values, with `*` for any letters.
        model_name: for messages.

    Raises:
        ModelError: if a name asks for nothing.
        CalibrationError: if a grid that is asked for is not known yet.
    """
    asked = [layers] if isinstance(layers, str) else list(layers or ("*",))
    known = list(dict.fromkeys(tensor.layer for tensor in tensors))
    hit: set[int] = set()
    for pattern in asked:
        new = {
            index
            for index, tensor in enumerate(tensors)
            if any(fnmatch.fnmatchcase(name, str(pattern)) for name in tensor.names)
        }
        if not new:
            raise ModelError(
                f"Expected names of quantized layers of '{model_name}'. Received: {pattern!r}."
                f"{nearest_name(str(pattern), known)} They are {known}."
            )
        hit |= new
    found = [tensor for index, tensor in enumerate(tensors) if index in hit]
    for tensor in found:
        if not tensor.is_calibrated:
            assert tensor.quantizer is not None
            raise CalibrationError(
                f"Expected calibrated ranges. Received: '{model_name}', of which "
                f"'{tensor.quantizer.name}', the values of '{tensor.layer}', has no range. Use "
                "kqat.calibrate, or train."
            )
    return found


def counts_of_weight(tensor: RoundedTensor) -> GridCounts:
    """The weights of a tensor, counted."""
    wrapper, name = tensor.wrapper, tensor.what
    assert wrapper is not None
    exact, rounded = (
        np.asarray(keras.ops.convert_to_numpy(x), np.float64)
        for x in (wrapper.folded(name, tensor.branch), wrapper.on_grid(name, tensor.branch))
    )
    counts, scale = GridCounts.of(tensor), tensor.scale.astype(np.float64)
    # Weights that all are zero have no step worth the name.
    scale = np.where(scale > 0.0, scale, 1.0)
    counts.add(exact / scale, np.round(rounded / scale))
    return counts


def counts_of_values(
    graph: Graph, tensors: Sequence[RoundedTensor], data: Any
) -> dict[RoundedTensor, GridCounts]:
    """The values of tensors, counted while the QAT model runs on at most 128 samples.

    Args:
        graph: of the QAT model.
        tensors: those of values among them are counted.
        data: typical inputs, as for `kqat.calibrate`.

    Raises:
        CalibrationError: if data are misshapen, or there are none.
    """
    counts = {
        (id(tensor.quantizer), tensor.site): GridCounts.of(tensor)
        for tensor in tensors
        if tensor.quantizer is not None
    }

    def note(quantizer: ActivationQuantizer, site: int, value: Any) -> None:
        found = counts.get((id(quantizer), site))
        if found is not None:
            found.add(*positions(found.tensor, value))

    for batch in batches(some_samples(data, graph, SAMPLES), graph):
        graph.run(as_tensors(batch, graph), noting(note))
    return {found.tensor: found for found in counts.values()}


def noting(note: Callable[[ActivationQuantizer, int, Any], None]) -> Callable[..., Any]:
    """For `Graph.run`: every node as in inference; each value goes to `note` before its rounding.

    Inside a recurrence nothing but the weights is rounded on the way.
    """

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.layer
        if isinstance(layer, QuantizedRecurrence):
            layer.observe(args[0], note)
        elif isinstance(layer, ActivationQuantizer) and node.kwargs.get("observe", True):
            note(layer, node.kwargs.get("site", 0), args[0])
        return layer(*args, **kwargs)

    return call


def positions(tensor: RoundedTensor, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """A value (any shape) in integers of its grid, before and after rounding.

    What a clamp or a mask takes away is no value that is clipped.
    """
    quantizer, spec = tensor.quantizer, tensor.spec
    assert quantizer is not None
    real = keras.ops.cast(quantizer.clamped(value), "float32")
    real = np.asarray(keras.ops.convert_to_numpy(real)).ravel()
    if quantizer.hides:
        real = real[real != np.float32(LOWEST)]
    scale, zero = tensor.scale, tensor.zero_point
    steps = real / scale
    rounded = np.clip(np.floor(steps + np.float32(0.5)) + zero, spec.qmin, spec.qmax)
    return steps.astype(np.float64) + zero, rounded
