"""The plan: what was decided about a model, as data, as text and as JSON."""

import collections
import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from kqat.base import TextEnum, json_text, shortened_apart, significant, write_file
from kqat.devices import TARGETS, Misfit, lost_in_sums, misfit_lines
from kqat.grids import (
    Bounds,
    Clamp,
    Fixed,
    GradientEstimator,
    MaxAbs,
    QuantSpec,
    RangeMethod,
    StepMethod,
    clamp_to_json,
    gradient_to_dict,
    range_method_to_dict,
    step_method_to_dict,
)
from kqat.registry import LayerRule, Output


@dataclasses.dataclass(frozen=True)
class Rounding:
    """One rounding of a value: by the quantizer of `group`, as its call site `site`.

    Without `observe` the value is rounded on the group's grid but does not shape its range.
    """

    group: str
    site: int
    observe: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """Values that share one quantizer: `sources` bring ranges, one call site each.

    `hides` says that they are scores of which a mask hides some. `label` is what a report calls the
    rounded value, where it has one source. `gradient` stands for the derivative of rounding, `None`
    for the clipped straight-through estimator.
    """

    name: str
    spec: QuantSpec
    range_method: RangeMethod
    clamp: Clamp | Bounds | None
    sites: int
    sources: tuple[str, ...]
    hides: bool = False
    label: str = ""
    gradient: GradientEstimator | None = None

    @property
    def is_observed(self) -> bool:
        """Whether the range is found from data, not given."""
        return not isinstance(self.range_method, Fixed)


class Role(TextEnum):
    """What becomes of a layer."""

    INTEGER = "integer"
    FLOAT = "float"
    FOLDED = "folded"
    FACTOR = "factor"
    CLAMP = "clamp"
    TRAINING_ONLY = "training only"


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Args:
        name: of the layer, or of the part that a composite layer is taken apart into.
        origin: name of the user's layer that it is a part of.
        kind: name of its class.
        role: what becomes of it.
        weights: name of each weight -> its grid.
        weight_step: how the steps of these grids are found.
        weight_gradient: what stands for the derivative of their rounding; `None` is what
            `weight_step` says.
        normalization: name of the BatchNormalization that folds into it.
        scaled_by: names of the layers before it, first to last, whose factors and offsets fold into
            its weights and bias.
        group: name of the group whose quantizer rounds its output.
        ops: the TFLite operators that it may become.
        bits: width of its activations; 0 where it is float.
        note: on its role, for a reader.
        into: name of the layer whose kernel computes it, where it is folded or fused.
        output: how the scale of its output comes about; `None` where it is float.
    """

    name: str
    origin: str
    kind: str
    role: Role
    weights: Mapping[str, QuantSpec]
    weight_step: StepMethod
    normalization: str | None
    group: str | None
    ops: tuple[str, ...]
    bits: int
    note: str
    into: str | None = None
    output: Output | None = None
    weight_gradient: GradientEstimator | None = None
    scaled_by: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every decision about one model. `print(plan)` shows it; `plan.to_json()` keeps it.

    Attributes:
        model_name, input_names, output_names: of the model.
        layers: what becomes of each layer.
        groups: layers whose outputs share one quantizer.
        tied: names of the user's layers that must have one config, as they read one weight; the
            calls of one layer are among them.
        unused_rules: rules of the policy that decide nothing.
        target: the device that was asked for, if one was.
        misfits: the layers that do not fit the target.
        graph, roundings, steps, rules: what the QAT model is built from; neither printed nor kept.
            `steps` holds the plan of one step of each recurrence, `rules` the row of the registry
            that each integer node was planned with, both by the node's name.
    """

    model_name: str
    layers: tuple[LayerPlan, ...]
    groups: tuple[Group, ...]
    unused_rules: tuple[str, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    graph: Any = dataclasses.field(repr=False, compare=False)
    roundings: Any = dataclasses.field(repr=False, compare=False)
    steps: Mapping[str, "Plan"] = dataclasses.field(repr=False, compare=False, default_factory=dict)
    rules: Mapping[str, LayerRule] = dataclasses.field(
        repr=False, compare=False, default_factory=dict
    )
    tied: tuple[tuple[str, ...], ...] = ()
    target: str | None = None
    misfits: tuple[Misfit, ...] = ()

    def of_one_config(self, name: str) -> tuple[str, ...]:
        """The user's layers that must have the config of the one of that name, itself among them.

        The first of them stands for all where one name is asked for.
        """
        return next((names for names in self.tied if name in names), (name,))

    def float_layers(self) -> tuple[str, ...]:
        """Names of the layers that stay float."""
        return tuple(layer.name for layer in self.layers if layer.role is Role.FLOAT)

    def to_json(self) -> str:
        """The plan as JSON text, for keeping beside the `.tflite`."""
        groups = [
            {
                "name": group.name,
                "spec": group.spec.to_dict(),
                "range": range_method_to_dict(group.range_method),
                "clamp": clamp_to_json(group.clamp),
                "gradient": gradient_to_dict(group.gradient),
                "sources": list(group.sources),
            }
            for group in self.groups
        ]
        layers = [
            {
                **dataclasses.asdict(layer),
                "weight_step": step_method_to_dict(layer.weight_step),
                "weight_gradient": gradient_to_dict(layer.weight_gradient),
            }
            for layer in self.layers
        ]
        table = {
            "model": self.model_name,
            "inputs": list(self.input_names),
            "outputs": list(self.output_names),
            "layers": layers,
            "groups": groups,
            "unused_rules": list(self.unused_rules),
            "tied": [list(names) for names in self.tied],
            "target": self.target,
            "misfits": [dataclasses.asdict(misfit) for misfit in self.misfits],
        }
        return json_text(table, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to `path`, whole or not at all."""
        write_file(path, self.to_json().encode())

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of the network to `path`, whole or not at all.

        Each box is what one kernel computes, coloured by its grid, with the grid of its weights and
        the scale of its output; layers that stay float are dashed. Nothing but kqat is needed for
        `.svg` and the self-contained `.html`; `.mmd` is a Mermaid flowchart, `.dot` is Graphviz's.

        Raises:
            KqatError: if the file name ends with none of these.
        """
        from kqat.planning.drawing import draw

        write_file(path, draw(self, path))

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 80) -> str:
        """The plan as a table, in lines of at most `width` characters where names allow it.

        A name that is too long for its column is shortened, so that it still differs from all
        others of the column. Columns: what becomes of the layer; the integers of its weights, `/ch`
        where each channel has a scale; the scale of its output. That is `own`, found from data; a
        range that is given, or that the kernel demands; `as input`; or `shared` with the values
        that are listed below the table.
        """
        return "\n".join([self.table(width), *(_filled(note, width) for note in self.notes())])

    def table(self, width: int = 80) -> str:
        """The table of `text` alone."""
        numbers = {group.name: number for number, group in enumerate(self._shared(), 1)}
        groups = {group.name: group for group in self.groups}
        names = [layer.name for layer in self.layers]
        rows = [tuple(_Cell(column) for column in _COLUMNS)] + [
            (
                _Cell("", layer.name),
                _Cell("", layer.kind),
                _becomes(layer, above),
                _Cell(weights_text(layer)),
                _Cell(output_scale(layer, groups, numbers)),
            )
            for layer, above in zip(self.layers, ["", *names], strict=False)
        ]
        return "\n".join([f"plan of {self.model_name}", *_table(rows, width)])

    def notes(self) -> list[str]:
        """What is to be known beside the table, in sentences."""
        notes = [
            f"shared {number}: one scale for {', '.join(group.sources)}"
            for number, group in enumerate(self._shared(), 1)
        ]
        few = [x for x in self.layers if any(spec.bits <= 4 for spec in x.weights.values())]
        if few:
            notes.append(
                "int4: packed two a byte where the target has the kernel, else stored as int8"
            )
        slow = {op for target in TARGETS.values() for op in target.slow_packed}
        if self.target is None and any(slow.intersection(layer.ops) for layer in few):
            notes.append(
                "LiteRT takes 3.5 to 5 times as long for packed convolutions: target 'litert' "
                "stores them as int8, and the argument weights= of tflite_export.convert decides "
                "otherwise"
            )
        notes += _losses_in_sums(self)
        notes += [f"rule decides nothing: {rule}" for rule in self.unused_rules]
        if self.target is not None and not self.misfits:
            notes.append(f"target {self.target}: every layer fits")
        notes += [f"target {self.target}: {text}" for text in misfit_lines(self.misfits)]
        return notes

    def _shared(self) -> list[Group]:
        return [group for group in self.groups if group.sites > 1]


def _losses_in_sums(plan: Plan) -> list[str]:
    """What kernels lose that sum many numbers, in sentences."""
    notes = [note for step in plan.steps.values() for note in _losses_in_sums(step)]
    shapes = {node.name: node.outputs[0].shape for node in plan.graph.nodes}
    for layer in plan.layers:
        summed = (shapes.get(layer.name) or (1,))[-1] or 1
        loss = max((lost_in_sums(op, layer.bits, summed) for op in layer.ops), default=0.0)
        if loss >= _LARGE_LOSS:
            notes.append(
                f"{layer.name}: the kernel of {layer.bits} bits makes values up to {loss:.1%} "
                f"too small where most of the {summed:,} numbers of a row are far below the "
                "largest: end the model before it, or leave it float or 'int8'"
            )
    return notes


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One cell of the table: words that stay whole, then a name that may be shortened."""

    words: str
    name: str = ""

    def __len__(self) -> int:
        return len(self.words) + len(self.name)

    def room(self, width: int) -> int:
        """How many characters of a column of `width` are left for the name."""
        return max(width - len(self.words), _LEAST_NAME)


# The share of a value from which on a plan tells what its kernel loses.
_LARGE_LOSS = 0.01
# The columns, and how narrow one may become before the others do, for a name cannot be told from
# its ends alone.
_COLUMNS = ("layer", "type", "becomes", "weights", "output scale")
_LEAST_NAME = 9
_LEAST_TYPE = 14


def _table(rows: list[tuple[_Cell, ...]], width: int) -> list[str]:
    """The rows in columns; those of names are narrowed until a line fits, types first."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [
        max(len(cell.words) + min(len(cell.name), _LEAST_NAME) for cell in column)
        for column in columns
    ]
    types = _COLUMNS.index("type")
    over = sum(widths) + 2 * (len(columns) - 1) - width
    while over > 0 and (spare := [i for i, wide in enumerate(widths) if wide > least[i]]):
        widest = max(spare, key=widths.__getitem__)
        widths[types if widths[types] > _LEAST_TYPE else widest] -= 1
        over -= 1
    texts = [_texts(column, wide) for column, wide in zip(columns, widths, strict=True)]
    lines = ["  ".join(row).rstrip() for row in zip(*texts, strict=True)]
    lines.insert(1, "  ".join("-" * wide for wide in widths))
    return lines


def _texts(column: Sequence[_Cell], width: int) -> list[str]:
    """The cells of a column in `width` characters, their names shortened and told apart."""
    rooms = {cell.room(width) for cell in column}
    short = {room: shortened_apart((cell.name for cell in column), room) for room in rooms}
    return [(c.words + short[c.room(width)][c.name]).ljust(width) for c in column]


def _becomes(layer: LayerPlan, above: str) -> _Cell:
    """What becomes of a layer that stands below the one named `above`."""
    if layer.role is Role.TRAINING_ONLY:
        return _Cell("nothing")
    if layer.into is None:
        return _Cell("integer" if layer.role is Role.CLAMP else layer.role.value)
    verb = "folded into" if layer.role is Role.FOLDED else "fused into"
    return _Cell(f"{verb} above") if layer.into == above else _Cell(f"{verb} ", layer.into)


def output_scale(layer: LayerPlan, groups: Mapping[str, Group], numbers: Mapping[str, int]) -> str:
    """Where the scale of a layer's output comes from; empty where it has none of its own."""
    if layer.group is None:
        words = {Output.SAME: "as input", Output.INDEX: "none", Output.INSIDE: "inside"}
        return words.get(layer.output, "") if layer.output else ""
    group = groups[layer.group]
    if layer.name not in group.sources:
        return "as input"
    method, parts = group.range_method, []
    if group.name in numbers:
        parts.append(f"shared {numbers[group.name]}")
    if isinstance(method, Fixed):
        parts.append(f"{significant(method.low, 4)} to {significant(method.high, 4)}")
    parts = parts or ["own"]
    return ", ".join(parts if group.spec.bits == 8 else [*parts, f"int{group.spec.bits}"])


def _filled(words: str, width: int) -> str:
    """A note in lines of `width` characters; a name stays in one piece."""
    return textwrap.fill(
        words, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def weights_text(layer: LayerPlan) -> str:
    """The integers of a layer's weights: `int8/ch`, `6 × int8`."""
    texts = collections.Counter(_weights(s, layer.weight_step) for s in layer.weights.values())
    return ", ".join(text if n == 1 else f"{n} × {text}" for text, n in texts.items())


def _weights(spec: QuantSpec, step: StepMethod) -> str:
    """The integers of a weight: `int8/ch` with one scale per channel, `3-bit in int4/ch lsq`."""
    storage = 4 if spec.bits <= 4 else 8
    text = f"int{storage}" if spec.bits == storage else f"{spec.bits}-bit in int{storage}"
    if spec.axis is not None:
        text += "/ch"
    return text if step == MaxAbs() else f"{text} {step_method_to_dict(step)['name']}"
