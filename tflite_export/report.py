"""What verification found, as data: printable, and JSON."""

import dataclasses
import json
import os
import textwrap
from typing import Any

from kqat.saving import write_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteDifference:
    """One value in lockstep: `differing` of its `elements` differ, by `max_steps` at most.

    `ties` of the differing ones lie exactly between two steps in float arithmetic (an average of
    two integers often does), where kernels choose either neighbour.
    """

    name: str
    operator: str
    elements: int
    max_steps: int
    differing: int
    ties: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputAgreement:
    """One output end to end: steps between the rounded Keras model and the file.

    For an output that is float by the plan, a step is 1/255 of the spread of its values.

    `top1_agreement` is the share of samples with the same largest class, `None` where the
    output is not a vector of classes.
    """

    name: str
    max_steps: int
    equal_fraction: float
    top1_agreement: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeReport:
    """One runtime; `problem` says why there is no more to say, if it did not run."""

    runtime: str
    problem: str | None = None
    sites: tuple[SiteDifference, ...] = ()
    unmatched: tuple[str, ...] = ()
    outputs: tuple[OutputAgreement, ...] = ()
    arena_bytes: int | None = None

    @property
    def max_steps(self) -> int:
        """Largest difference of any value in lockstep."""
        return max((site.max_steps for site in self.sites), default=0)

    def by_operator(self) -> dict[str, SiteDifference]:
        """Operator -> the differences of all that it wrote, added up."""
        table: dict[str, SiteDifference] = {}
        for site in self.sites:
            total = table.get(site.operator)
            table[site.operator] = site if total is None else _sum(total, site)
        return dict(sorted(table.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A verified file. `print(report)` shows it; `report.save(path)` keeps it as JSON."""

    model_name: str
    size_bytes: int
    samples: int
    operators: dict[str, int]
    float_operators: int
    runtimes: tuple[RuntimeReport, ...]

    @property
    def is_full_integer(self) -> bool:
        """Whether no operator reads or writes a float."""
        return self.float_operators == 0

    def on(self, runtime: str) -> RuntimeReport:
        """The part about one runtime."""
        return next(part for part in self.runtimes if part.runtime == runtime)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to `path`, whole or not at all."""
        write_file(path, self.to_json().encode())

    def __str__(self) -> str:
        count = sum(self.operators.values())
        kinds = ", ".join(f"{number} {name}" for name, number in self.operators.items())
        lines = [
            *_wrapped(
                f"{self.model_name}: {self.size_bytes:,} bytes, {count} operators, "
                f"{self.float_operators} of them float",
                "",
            ),
            *_wrapped(kinds, "  "),
            f"lockstep over {self.samples} samples, in output steps:",
        ]
        for part in self.runtimes:
            lines += _runtime_lines(part)
        return "\n".join(lines)


def _sum(a: SiteDifference, b: SiteDifference) -> SiteDifference:
    return SiteDifference(
        name=a.operator,
        operator=a.operator,
        elements=a.elements + b.elements,
        max_steps=max(a.max_steps, b.max_steps),
        differing=a.differing + b.differing,
        ties=a.ties + b.ties,
    )


def _runtime_lines(part: RuntimeReport) -> list[str]:
    if part.problem is not None:
        return [f"  {part.runtime}: did not run", *_wrapped(part.problem, "    ")]
    arena = "" if part.arena_bytes is None else f", arena {part.arena_bytes:,} bytes"
    lines = [f"  {part.runtime}: at most {part.max_steps} in lockstep{arena}"]
    for operator, row in part.by_operator().items():
        share = 100 * row.differing / max(row.elements, 1)
        ties = f", {100 * row.ties / row.differing:.0f} % ties" if row.ties else ""
        lines += _wrapped(
            f"{operator:<24}max {row.max_steps} {share:7.3f} % of {row.elements:,} differ{ties}",
            "    ",
        )
    if part.unmatched:
        lines += _wrapped("not compared: " + ", ".join(part.unmatched), "    ")
    for output in part.outputs:
        top1: Any = output.top1_agreement
        lines += _wrapped(
            f"output {output.name!r} end to end: max {output.max_steps}, "
            f"{100 * output.equal_fraction:.1f} % equal"
            + ("" if top1 is None else f", top-1 agreement {100 * top1:.1f} %"),
            "    ",
        )
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    """`text` in lines of 80 characters; those that go on stand further in."""
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=f"{indent}  ")
