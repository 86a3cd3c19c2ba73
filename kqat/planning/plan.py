"""The plan as data: immutable, printable, JSON. What is decided here is decided in `planning`."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from kqat.base import write_file
from kqat.devices import Misfit
from kqat.grids import (
    Fixed,
    MaxAbs,
    QuantSpec,
    RangeMethod,
    StepMethod,
    range_method_to_dict,
    step_method_to_dict,
)
from kqat.registry import LayerRule


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
    rounded value, where it has one source.
    """

    name: str
    spec: QuantSpec
    range_method: RangeMethod
    clamp: str | None
    sites: int
    sources: tuple[str, ...]
    hides: bool = False
    label: str = ""

    @property
    def is_observed(self) -> bool:
        """Whether the range is found from data, not given."""
        return not isinstance(self.range_method, Fixed)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer (`role`: integer, float, folded, clamp or training only).

    `bits` is the width of its activations, 0 where it is float.
    """

    name: str
    origin: str
    kind: str
    role: str
    weights: Mapping[str, QuantSpec]
    weight_step: StepMethod
    normalization: str | None
    group: str | None
    ops: tuple[str, ...]
    bits: int
    note: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every decision about one model. `print(plan)` shows it; `plan.to_json()` keeps it.

    `misfits` are the layers that do not fit `target`, where one was asked for. `graph`, `roundings`
    and `steps` (the plan of one step of each recurrence, by the name of its node) are what
    `wrapping` builds from, with `rules`, the row that each integer node was planned with, by the
    node's name; they are left out of both.
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
    target: str | None = None
    misfits: tuple[Misfit, ...] = ()

    def float_layers(self) -> tuple[str, ...]:
        """Names of the layers that stay float."""
        return tuple(layer.name for layer in self.layers if layer.role == "float")

    def to_json(self) -> str:
        """The plan as JSON text, for keeping beside the `.tflite`."""
        groups = [
            {
                "name": group.name,
                "spec": group.spec.to_dict(),
                "range": range_method_to_dict(group.range_method),
                "clamp": group.clamp,
                "sources": list(group.sources),
            }
            for group in self.groups
        ]
        layers = [
            {**dataclasses.asdict(layer), "weight_step": step_method_to_dict(layer.weight_step)}
            for layer in self.layers
        ]
        table = {
            "model": self.model_name,
            "inputs": list(self.input_names),
            "outputs": list(self.output_names),
            "layers": layers,
            "groups": groups,
            "unused_rules": list(self.unused_rules),
            "target": self.target,
            "misfits": [dataclasses.asdict(misfit) for misfit in self.misfits],
        }
        return json.dumps(table, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to `path`, whole or not at all."""
        write_file(path, self.to_json().encode())

    def __str__(self) -> str:
        groups = {group.name: group for group in self.groups}
        rows = [("layer", "type", "role", "weights", "output range", "note")]
        rows += [
            (
                layer.name,
                layer.kind,
                layer.role,
                ", ".join(_weight_text(s, layer.weight_step) for s in layer.weights.values()),
                _range_text(groups[layer.group]) if layer.group else "",
                layer.note,
            )
            for layer in self.layers
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if any(spec.bits <= 4 for layer in self.layers for spec in layer.weights.values()):
            lines.append("int4: two a byte where the target has such kernels, else in int8")
        shared = [group for group in self.groups if group.sites > 1]
        lines += [f"one scale: {', '.join(group.sources)}" for group in shared]
        lines += [f"rule matched nothing: {rule}" for rule in self.unused_rules]
        if self.target is not None and not self.misfits:
            lines.append(f"target {self.target}: every layer fits")
        lines += [f"target {self.target}: {misfit}" for misfit in self.misfits]
        return "\n".join([f"plan of {self.model_name}", *lines])


def _range_text(group: Group) -> str:
    return group.label if group.spec.bits == 8 else f"{group.label}, int{group.spec.bits}"


def _weight_text(spec: QuantSpec, step: StepMethod) -> str:
    storage = 4 if spec.bits <= 4 else 8
    text = f"int{storage}" if spec.bits == storage else f"{spec.bits}-bit grid in int{storage}"
    if spec.axis is not None:
        text += " per channel"
    return text if step == MaxAbs() else f"{text} {step_method_to_dict(step)['name']}"
