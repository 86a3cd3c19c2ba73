"""Renders a report as one self-contained HTML page, with tables and with plots in SVG.

Colours are variables of the style sheet, so the same plots serve light and dark screens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jinja2

from kqat.base import counted, decimal

# The size of a plot in SVG units. The page stretches it to its own width, and writes the words
# around it, which so have one size on every screen.
WIDTH, HEIGHT = 960, 160
# Bars below this many dB stand out: such a value carries less than five bits of signal.
LOW_SQNR_DB = 30.0
# Clipping of more values than this share stands out where it costs: where there are few dB, too. A
# softmax's 1.0 is clipped to 255/256, which is less than a step and costs nothing.
MUCH_CLIPPED = 0.01


@dataclasses.dataclass(frozen=True)
class Bar:
    """One column of a plot: its box, its tooltip, and whether it stands out."""

    x: float
    y: float
    width: float
    height: float
    title: str
    stands_out: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row of the table of runtimes, with a cell for each runtime that ran the file.

    A cell is a pair: the largest difference, and the share of values that differ. It is `None` if
    the runtime has no such value.
    """

    name: str
    values: str
    cells: tuple[tuple[int, float] | None, ...]
    note: str


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot of columns, one for each value of the network.

    `unit` labels the vertical axis; `ticks` are pairs of the distance from the top, in percent of
    the height, and a label. `loud` says what columns stand out, "" if none can. `names` are those
    of the first column and of the last.
    """

    title: str
    about: str
    unit: str
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    loud: str
    names: tuple[str, str]
    width: int = WIDTH
    height: int = HEIGHT


def render(report: Any) -> str:
    """The HTML page of a `tflite_export.Report`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tflite_export.verification"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = counted
    environment.filters["percent"] = _percent
    layers = report.layers
    page = environment.get_template("report.html.j2")
    text = page.render(
        report=report,
        verdicts=_verdicts(report),
        figures=_figures(report),
        ran=[part for part in report.runtimes if part.problem is None],
        comparisons=_comparisons(report),
        plots=_plots(layers) if layers else (),
        low_sqnr_db=LOW_SQNR_DB,
        clips_much=_clips_much,
        has_ties=any(site.ties for part in report.runtimes for site in part.sites),
        measured=any(layer.grid_share is not None for layer in layers),
        most_macs=max((layer.macs for layer in layers), default=0),
        most_bytes=max((layer.constant_bytes for layer in layers), default=0),
    )
    return text + "\n"


def _percent(share: float) -> str:
    """A share in percent; one that is not zero does not read as zero."""
    if 0.0 < share < 0.0001:
        return "< 0.01"
    return f"{100 * share:.2f}".rstrip("0").rstrip(".")


def _verdicts(report: Any) -> list[tuple[bool, str]]:
    """Pairs of whether a result is good, and the result in words."""
    found = [
        (
            report.is_full_integer,
            "full integer"
            if report.is_full_integer
            else f"{report.float_operators} operators read or write floats",
        )
    ]
    for part in report.runtimes:
        if not part.installed:
            continue
        if part.problem is not None:
            lacks = f": it has no kernel for {', '.join(part.lacks)}" if part.lacks else ""
            found.append((bool(part.lacks), f"{part.runtime} did not run it{lacks}"))
        elif part.sites:
            steps = part.max_steps
            unit = "step" if steps == 1 else "steps"
            found.append((steps <= 1, f"{part.runtime}: at most {steps} {unit} in lockstep"))
        else:
            found.append((True, f"{part.runtime} ran it"))
    if (npu := report.estimate) is not None:
        found.append((not npu.fallbacks, f"{100 * npu.npu_share:.0f} % of operators on the NPU"))
    return found


def _figures(report: Any) -> list[tuple[str, str, str]]:
    """The totals of the file, as triples of name, figure and unit."""
    figures = [
        ("Flash", f"{report.size_bytes:,}", "bytes of .tflite"),
        ("Work", counted(report.macs), "multiply-accumulates"),
        ("Operators", str(sum(report.operators.values())), f"{report.float_operators} float"),
    ]
    if report.arena_bytes is not None:
        figures.insert(1, ("Arena", f"{report.arena_bytes:,}", "bytes, TFLite Micro on 64 bits"))
    if (npu := report.estimate) is not None:
        figures += [
            ("Cycles", counted(npu.cycles), f"on {npu.accelerator}, as Vela estimates"),
            ("NPU memory", f"{npu.sram_bytes + npu.dram_bytes:,}", "bytes of SRAM and DRAM"),
            ("NPU flash", f"{npu.flash_bytes:,}", "bytes of weights and commands"),
        ]
    return figures


def _comparisons(report: Any) -> list[Comparison]:
    """One row for each operator in lockstep, then one for each output end to end."""
    parts = [part for part in report.runtimes if part.problem is None]
    tables = [part.by_operator() for part in parts]
    rows = []
    for operator in sorted({name for table in tables for name in table}):
        found = [table.get(operator) for table in tables]
        ties = sum(row.ties for row in found if row) / max(
            sum(row.differing for row in found if row), 1
        )
        cells = tuple(
            row and (row.max_steps, row.differing / max(row.elements, 1)) for row in found
        )
        values = next(f"{row.elements:,}" for row in found if row)
        note = f"of these {100 * ties:.0f} % halfway" if ties else ""
        rows.append(Comparison(operator, values, cells, note))
    for name in dict.fromkeys(output.name for part in parts for output in part.outputs):
        outputs = [next((o for o in part.outputs if o.name == name), None) for part in parts]
        agree = [o.top1_agreement for o in outputs if o and o.top1_agreement is not None]
        note = ""
        if agree:
            least = " or more" if min(agree) < max(agree) else ""
            note = f"same class in {_percent(min(agree))} %{least}"
        ends = tuple(o and (o.max_steps, 1 - o.equal_fraction) for o in outputs)
        rows.append(Comparison(f"end to end: {name}", "", ends, note))
    return rows


def _clips_much(layer: Any) -> bool:
    """Whether clipping costs: many values are clipped, and little signal is left."""
    few_db = layer.sqnr_db is not None and layer.sqnr_db < LOW_SQNR_DB
    return layer.clipped_share > MUCH_CLIPPED and few_db


def _plots(layers: Sequence[Any]) -> tuple[Plot, ...]:
    names = [layer.name for layer in layers]
    work = _plot(
        "Work",
        "Multiply-accumulates of each operator: where the time goes.",
        "multiply-accumulates",
        names,
        [float(layer.macs) for layer in layers],
        [f"{layer.macs:,}" for layer in layers],
    )
    flash = _plot(
        "Constants",
        "Bytes of weights, biases and tables of each operator: where the flash goes.",
        "bytes",
        names,
        [float(layer.constant_bytes) for layer in layers],
        [f"{layer.constant_bytes:,} bytes" for layer in layers],
    )
    # Layers that stay float have no grid.
    measured = [layer for layer in layers if layer.grid_share is not None]
    if not measured:
        return work, flash
    names, found = [layer.name for layer in measured], [layer.sqnr_db for layer in measured]
    noise = _plot(
        "Signal over quantization noise (SQNR)",
        "Power of each value over that of its own rounding error. Exact values have no column.",
        "SQNR, dB",
        names,
        [0.0 if db is None else max(db, 0.0) for db in found],
        ["exact" if db is None else f"{decimal(db)} dB" for db in found],
        loud=f"below {LOW_SQNR_DB:g} dB",
        stands_out=[db is not None and db < LOW_SQNR_DB for db in found],
    )
    grid = _plot(
        "Use of the grid",
        "Share of the grid's integers that occur at all.",
        "% of integers",
        names,
        [100 * layer.grid_share for layer in measured],
        [
            f"{100 * x.grid_share:.0f} % used, {100 * x.clipped_share:.2f} % clipped"
            for x in measured
        ],
        loud=f"more than {100 * MUCH_CLIPPED:g} % of its values clipped, and below "
        f"{LOW_SQNR_DB:g} dB",
        stands_out=[_clips_much(layer) for layer in measured],
        top=100.0,
    )
    return noise, grid, work, flash


def _plot(
    title: str,
    about: str,
    unit: str,
    names: Sequence[str],
    values: Sequence[float],
    words: Sequence[str],
    *,
    loud: str = "",
    stands_out: Sequence[bool] = (),
    top: float | None = None,
) -> Plot:
    """A plot of one column for each name; `words` say its value, `top` is the axis's end."""
    highest = top or _round_up(max(values, default=0.0))
    slot = WIDTH / max(len(values), 1)
    width = min(slot * 0.72, 64.0)
    bars = []
    for index, (name, value, said) in enumerate(zip(names, values, words, strict=True)):
        height = HEIGHT * min(value / highest, 1.0)
        x = slot * index + (slot - width) / 2
        bars.append(
            Bar(
                round(x, 1),
                round(HEIGHT - height, 1),
                round(width, 1),
                round(height, 1),
                f"{name}: {said}",
                bool(stands_out) and stands_out[index],
            )
        )
    steps = [highest * share for share in (0.0, 0.5, 1.0)]
    ticks = tuple((round(100 * (1.0 - s / highest), 1), counted(s)) for s in steps)
    ends = (names[0], names[-1]) if names else ("", "")
    return Plot(title, about, unit, tuple(bars), ticks, loud, ends)


def _round_up(value: float) -> float:
    """The smallest of 1, 2, 4, 6, 8, 10, 20, … that is at least `value`; 1 for zero."""
    size = 1.0
    while True:
        for digit in (1, 2, 4, 6, 8):
            if digit * size >= value:
                return digit * size
        size *= 10
