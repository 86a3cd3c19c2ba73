"""`Report`: what verification found, as data, as text of 80 columns, as JSON and as HTML."""

import dataclasses
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kqat.base import counted, decimal, json_text, shortened_apart, write_file, write_files
from tflite_export.devices import NpuEstimate
from tflite_export.verification import html_page
from tflite_export.verification.node_data import node_data


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteDifference:
    """One value in lockstep: `differing` of its `elements` differ, by at most `max_steps`.

    Of those, `ties` lie exactly between two steps in float arithmetic, as the average of two
    integers often does. A kernel may round such a value to either step. `allowed_steps` is more
    than one if the kernel approximates (`tflite_export.verification.coarse_kernels`).
    """

    name: str
    operator: str
    elements: int
    max_steps: int
    differing: int
    ties: int
    allowed_steps: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputAgreement:
    """One output end to end: differences between the QAT model and the file, in output steps.

    If the plan leaves the output float, a step is 1/255 of the spread of its values.

    `top1_agreement` is the share of samples with the same largest class; it is `None` if the
    output is not a vector of classes.
    """

    name: str
    max_steps: int
    equal_fraction: float
    top1_agreement: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exactness:
    """Whether a runtime computed the integers that its kernels are known to compute.

    Attributes:
        elements: number of integers compared; each operator gets the runtime's own inputs.
        differing: number of integers that differ.
        first: name of the first operator that differs, and of its tensor; "" if none does.
        unknown: operators that were not compared, or the reason; empty if all were compared.
    """

    elements: int
    differing: int
    first: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether every operator was compared and no integer differs."""
        return not self.differing and not self.unknown

    def __str__(self) -> str:
        if self.first:
            return (
                f"not exact: {self.differing:,} of {self.elements:,} integers are not those of "
                f"the kernels, first those of {self.first}"
            )
        if self.unknown:
            return f"exact, but for what has no integer arithmetic here: {'; '.join(self.unknown)}"
        return f"exact: all {self.elements:,} integers are those of the kernels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeReport:
    """What one runtime did with the file; if it did not run, `problem` says why.

    `exact` is `None` without lockstep. `lacks` names the operators for which the runtime has no
    kernel, if that is the problem; `installed` is false if the runtime itself is not there.
    """

    runtime: str
    problem: str | None = None
    lacks: tuple[str, ...] = ()
    installed: bool = True
    sites: tuple[SiteDifference, ...] = ()
    unmatched: tuple[str, ...] = ()
    outputs: tuple[OutputAgreement, ...] = ()
    arena_bytes: int | None = None
    exact: Exactness | None = None

    @property
    def max_steps(self) -> int:
        """Largest difference of any value in lockstep."""
        return max((site.max_steps for site in self.sites), default=0)

    @property
    def is_right(self) -> bool:
        """Whether it ran the file with no more steps than allowed, or the file is not to blame.

        A runtime that is not installed, or that has no kernel for an operator, says nothing of the
        file.
        """
        if self.problem is not None:
            return bool(self.lacks) or not self.installed
        return all(site.max_steps <= site.allowed_steps for site in self.sites)

    def by_operator(self) -> dict[str, SiteDifference]:
        """Operator -> the sum of the differences of all its outputs."""
        table: dict[str, SiteDifference] = {}
        for site in self.sites:
            total = table.get(site.operator)
            table[site.operator] = site if total is None else _sum(total, site)
        return dict(sorted(table.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One value of the file, and the operator that computes it.

    Attributes:
        name: name of the value.
        operator: the operator that computes it; `"input"` for a model input.
        shape: its shape without the batch axis.
        bits, scale, zero_point: its grid; `None` without one.
        weight_bits: bits of the operator's weights as stored in the file; `None` without weights.
        clipped_share: share of values that lie outside the range, 0..1.
        grid_share: share of the grid's integers that occur at all, 0..1.
        sqnr_db: power of the values over that of their rounding error, in dB; `None` if there is no
            error. Without lockstep these three are `None`.
        max_steps: runtime -> largest difference in lockstep.
        macs, constant_bytes: multiply-accumulates of the operator, bytes of its constants.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    bits: int | None
    weight_bits: int | None
    scale: float | None
    zero_point: int | None
    clipped_share: float | None
    grid_share: float | None
    sqnr_db: float | None
    max_steps: Mapping[str, int]
    macs: int
    constant_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The result of verifying a file: print it, or save it as JSON (`save`) or HTML (`save_html`).

    Attributes:
        model_name, size_bytes, samples: the model, its file's size, and the samples compared on.
        operators, float_operators: operator -> count, and how many read or write a float.
        runtimes: the results for each runtime.
        layers: the values in the order in which they are computed. Their shares and SQNR are those
            of the first runtime that ran the file.
        macs: multiply-accumulates of one invocation.
        estimate: Vela's estimate, for a target with an NPU that Vela knows.
        notes: values that could not be compared, and operators that do not fit the target.
    """

    model_name: str
    size_bytes: int
    samples: int
    operators: dict[str, int]
    float_operators: int
    runtimes: tuple[RuntimeReport, ...]
    layers: tuple[LayerReport, ...] = ()
    macs: int = 0
    estimate: NpuEstimate | None = None
    notes: tuple[str, ...] = ()

    @property
    def arena_bytes(self) -> int | None:
        """Bytes of arena that TFLite Micro uses; `None` if it did not run the file."""
        return next((p.arena_bytes for p in self.runtimes if p.arena_bytes is not None), None)

    @property
    def is_full_integer(self) -> bool:
        """Whether no operator reads or writes a float."""
        return self.float_operators == 0

    def on(self, runtime: str) -> RuntimeReport:
        """The results for one runtime."""
        return next(part for part in self.runtimes if part.runtime == runtime)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json_text(dataclasses.asdict(self), indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to `path`; on failure an older file stays as it was."""
        write_file(path, self.to_json().encode())

    def to_html(self) -> str:
        """The report as one self-contained HTML page, for light and dark screens."""
        return html_page.render(self)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the HTML page to `path`; on failure an older file stays as it was."""
        write_file(path, self.to_html().encode())

    def save_node_data(self, directory: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Writes `sqnr_db.json`, `macs.json` and so on: node data for Model Explorer.

        They show a number of the report on each operator of the file: `model-explorer net.tflite`,
        then "Load node data".

        Args:
            directory: where to write; made if it is missing. All files are written, or none.

        Returns:
            The files; one for each measure that the report has.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = {folder / f"{name}.json": text.encode() for name, text in node_data(self).items()}
        write_files(files)
        return tuple(files)

    def __str__(self) -> str:
        count = sum(self.operators.values())
        kinds = ", ".join(f"{number} {name}" for name, number in self.operators.items())
        lines = [
            *_wrapped(
                f"{self.model_name}: {self.size_bytes:,} bytes, {count} operators, "
                f"{self.float_operators} of them float, {self.macs:,} multiply-accumulates",
                "",
            ),
            *_wrapped(kinds, "  "),
            f"over {self.samples} samples, differences in output steps:",
        ]
        for part in self.runtimes:
            lines += _runtime_lines(part)
        if any(site.ties for part in self.runtimes for site in part.sites):
            lines.append(f"  {HALFWAY}")
        for note in self.notes:
            lines += _wrapped(f"note: {note}", "")
        if self.estimate is not None:
            lines += _estimate_lines(self.estimate)
        lines += _layer_lines(self.layers)
        return "\n".join(lines)


def _sum(a: SiteDifference, b: SiteDifference) -> SiteDifference:
    return SiteDifference(
        name=a.operator,
        operator=a.operator,
        elements=a.elements + b.elements,
        max_steps=max(a.max_steps, b.max_steps),
        differing=a.differing + b.differing,
        ties=a.ties + b.ties,
        allowed_steps=max(a.allowed_steps, b.allowed_steps),
    )


def _runtime_lines(part: RuntimeReport) -> list[str]:
    if not part.installed:
        return _wrapped(f"{part.runtime}: not run. {part.problem}", "  ")
    if part.problem is not None:
        lacks = f": has no kernel for {', '.join(part.lacks)}" if part.lacks else ""
        return [f"  {part.runtime}: did not run{lacks}", *_wrapped(part.problem, "    ")]
    arena = "" if part.arena_bytes is None else f", arena {part.arena_bytes:,} bytes"
    said = f"at most {part.max_steps} in lockstep" if part.sites else "ran it"
    lines = [f"  {part.runtime}: {said}{arena}"]
    if part.exact is not None:
        lines += _wrapped(str(part.exact), "    ")
    for operator, row in part.by_operator().items():
        share = 100 * row.differing / max(row.elements, 1)
        ties = f", {100 * row.ties / row.differing:.0f} % halfway" if row.ties else ""
        lines += _wrapped(
            f"{operator:<23} max {row.max_steps} {share:7.3f} % of {row.elements:,} differ{ties}"
            + (KNOWN.format(row.allowed_steps) if 1 < row.max_steps <= row.allowed_steps else ""),
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


def _estimate_lines(npu: NpuEstimate) -> list[str]:
    on_npu = npu.operators - len(npu.fallbacks)
    lines = _wrapped(
        f"Vela for {npu.accelerator}: {on_npu} of {npu.operators} operators on the NPU "
        f"({100 * npu.npu_share:.0f} %), {npu.cycles:,} cycles, SRAM {npu.sram_bytes:,} bytes, "
        f"DRAM {npu.dram_bytes:,} bytes, flash {npu.flash_bytes:,} bytes",
        "",
    )
    for left in npu.fallbacks:
        lines += _wrapped(f"on the CPU: {left.operator} '{left.tensor}': {left.reason}", "  ")
    return lines


# Behind the steps of a kernel that approximates.
KNOWN = " (its kernel is known for up to {})"
HALFWAY = "halfway: exactly between two steps, so that either of them is right"
LAYER_LEGEND = (
    "bits: weights/values; clip: share of values outside the range; grid: share of its integers "
    "that occur; SQNR: signal over rounding error, in dB; steps: largest difference in lockstep"
)


def _layer_lines(layers: tuple[LayerReport, ...]) -> list[str]:
    """The layers as a table of 80 columns."""
    if not layers:
        return []
    head = f"{'layer':<22} {'bits':>5} {'scale':>9} {'clip':>6} {'grid':>5} {'SQNR':>5}"
    lines = ["", f"{head} {'steps':>5} {'MACs':>7} {'bytes':>7}", "-" * 80]
    names = {row.name: " ".join(row.name.split()) for row in layers}
    short = shortened_apart(names.values(), 22)
    for row in layers:
        name = short[names[row.name]]
        bits = f"{row.weight_bits or '-'}/{row.bits or '-'}"
        scale = "" if row.scale is None else f"{row.scale:.3g}"
        lines.append(
            f"{name:<22} {bits:>5} {scale:>9} {_use_cells(row)} "
            f"{counted(row.macs):>7} {counted(row.constant_bytes):>7}"
        )
    return [*lines, *_wrapped(LAYER_LEGEND, "")]


def _use_cells(row: LayerReport) -> str:
    if row.grid_share is None or row.clipped_share is None:
        return " " * 24
    sqnr = "exact" if row.sqnr_db is None else decimal(row.sqnr_db)
    steps = max(row.max_steps.values(), default=0)
    return f"{100 * row.clipped_share:>5.2f}% {100 * row.grid_share:>4.0f}% {sqnr:>5} {steps:>5}"


def _wrapped(text: str, indent: str) -> list[str]:
    """`text` in lines of 80 characters; continuation lines are indented further."""
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=f"{indent}  ")
