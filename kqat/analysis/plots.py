"""`plot_quantization`: histograms of a QAT model's weights and values over their grids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kqat.analysis.grid_use import (
    GridCounts,
    RoundedTensor,
    chosen,
    counts_of_values,
    counts_of_weight,
    rounded_tensors,
)
from kqat.base import KqatError
from kqat.graph import trace
from kqat.grids import Fixed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Sizes in inches.
_WIDTH, _ROW, _HEAD = 10.0, 2.3, 0.7
_LEFT, _RIGHT, _GAP = 0.75, 0.2, 0.85
_EXACT, _ROUNDED, _GRID, _CLIPPED = "#1d3b5c", "#86add6", "#e9eef4", "#c2571a"
_LOUD_SHARE = 0.01


def plot_quantization(
    qat: keras.Model, layers: Sequence[str] | str | None = None, data: Any = None
) -> "Figure":
    """Histograms of weights and activations over their grids, one row for each layer.

    On the left the weights of a layer, on the right the values that it hands on. The horizontal
    axis is in integers of the grid, whatever the scale of each channel. Filled columns are the
    integers after rounding, the line is the same before rounding, the shaded band is the grid. Each
    title has the share of numbers that lie outside the grid, which rounding clips. Shares are on a
    logarithmic axis. The model is not changed.

    Args:
        qat: a calibrated QAT model, trained or not.
        layers: names of layers or values to show, with `*` for any letters; all by default. What is
            inside a recurrence is called `lstm/…`.
        data: typical inputs, as for `kqat.calibrate`, of which at most 128 are run. Without them
            the values' ranges are shown, and no histogram.

    Returns:
        A `matplotlib.figure.Figure`: `figure.savefig("grids.png")`, or the last line of a cell of a
        notebook. No global state of matplotlib is touched.

    Raises:
        KqatError: if matplotlib is not installed.
        ModelError: if `qat` is no QAT model, or has no such layer.
        CalibrationError: if a range is not known yet, or data do not fit.
    """
    make_figure = figure_class("kqat.plot_quantization")
    graph = trace(qat)
    tensors = chosen(rounded_tensors(qat, graph), layers, str(qat.name))
    counts = {t: counts_of_weight(t) for t in tensors if t.wrapper is not None}
    if data is not None:
        counts |= counts_of_values(graph, tensors, data)
    rows = _rows(tensors)
    height = _HEAD + _ROW * len(rows)
    figure = make_figure(figsize=(_WIDTH, height))
    figure.text(
        _LEFT / _WIDTH, 1.0 - 0.25 / height, f"{qat.name}: weights and values over their grids",
        fontsize=12, fontweight="bold", va="center",
    )  # fmt: skip
    for index, row in enumerate(rows):
        bottom = height - _HEAD - _ROW * (index + 1) + 0.65
        for side, tensor in enumerate(row):
            width = (_WIDTH - _LEFT - _RIGHT - _GAP) / 2
            left = _LEFT + side * (width + _GAP)
            place = (left / _WIDTH, bottom / height, width / _WIDTH, (_ROW - 1.05) / height)
            axes = figure.add_axes(place)
            if tensor is None:
                axes.set_axis_off()
                what = (
                    "no weights on a grid" if side == 0 else "its values have no grid of their own"
                )
                axes.text(0.5, 0.5, what, ha="center", va="center", color="#777777", fontsize=8)
            elif tensor in counts and counts[tensor].total:
                _draw_counts(axes, counts[tensor])
            else:
                _draw_range(axes, tensor, ran=data is not None)
    return figure


def figure_class(user: str) -> Any:
    """Matplotlib's `Figure`, which is imported when it is needed.

    Raises:
        KqatError: if matplotlib is not installed; names `user`, which needs it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KqatError(
            f"Expected matplotlib for {user}. Received: it is not installed ({error}). Use "
            "pip install 'kqat[plots]'."
        ) from error
    return Figure


def _rows(
    tensors: Sequence[RoundedTensor],
) -> list[tuple[RoundedTensor | None, RoundedTensor | None]]:
    """Pairs of a weight and of values, of one layer each where it has both."""
    rows: list[tuple[RoundedTensor | None, RoundedTensor | None]] = []
    for layer in dict.fromkeys(tensor.layer for tensor in tensors):
        own = [tensor for tensor in tensors if tensor.layer == layer]
        sides = [[t for t in own if (t.wrapper is None) is values] for values in (False, True)]
        for index in range(max(map(len, sides))):
            weight, value = (side[index] if index < len(side) else None for side in sides)
            rows.append((weight, value))
    return rows


def _title(tensor: RoundedTensor) -> str:
    what = tensor.role if tensor.branch == 0 else f"{tensor.role}, branch {tensor.branch}"
    name = tensor.layer if tensor.quantizer is None else tensor.title
    name = name if len(name) <= 34 else f"…{name[-33:]}"
    return f"{name}  {what}, int{tensor.spec.bits}"


def _about_scale(tensor: RoundedTensor) -> str:
    scale = np.ravel(tensor.scale)
    if scale.size == 1 or np.min(scale) == np.max(scale):
        return f"step {scale[0]:.3g}"
    return f"{scale.size} steps, {np.min(scale):.2g} to {np.max(scale):.2g}"


def _axis_label(tensor: RoundedTensor) -> str:
    zero = f", zero at {tensor.zero_point}" if tensor.zero_point else ""
    return f"integer ({_about_scale(tensor)}{zero})"


def _draw_counts(axes: Any, counts: GridCounts) -> None:
    tensor, spec, edges = counts.tensor, counts.tensor.spec, counts.edges
    total = max(counts.total, 1)
    axes.axvspan(spec.qmin - 0.5, spec.qmax + 0.5, color=_GRID, lw=0, zorder=0)
    integers, heights, width = _columns(counts)
    axes.bar(integers, heights / total, width=width, color=_ROUNDED, zorder=2, label="rounded")
    axes.stairs(counts.exact / total, edges, color=_EXACT, lw=0.9, zorder=3, label="before")
    axes.set_yscale("log")
    axes.set_ylim(0.5 / max(total, 2), 1.5)
    axes.set_xlim(edges[0], edges[-1])
    share = counts.clipped_share
    loud = share > _LOUD_SHARE
    axes.set_title(
        f"{_title(tensor)}: {_percent(share)} clipped",
        fontsize=8.5, loc="left", color=_CLIPPED if loud else "black",
    )  # fmt: skip
    _label(axes, tensor)
    axes.set_ylabel("share", fontsize=7.5)
    axes.legend(fontsize=6, frameon=False, loc="upper right", handlelength=1.2)


def _columns(counts: GridCounts) -> tuple[np.ndarray, np.ndarray, float]:
    """Integers, how many numbers have them, and the width of a column; few bins, one an integer."""
    width = counts.edges[1] - counts.edges[0]
    middles = (counts.edges[:-1] + counts.edges[1:]) / 2
    if width >= 1.0:
        return middles, counts.rounded, float(width)
    integers = np.arange(counts.tensor.spec.qmin, counts.tensor.spec.qmax + 1)
    places = [int(np.argmin(np.abs(middles - integer))) for integer in integers]
    return integers.astype(float), counts.rounded[places], 0.6


def _percent(share: float) -> str:
    return "0 %" if share == 0.0 else f"{100 * share:.2g} %" if share >= 1e-4 else "< 0.01 %"


def _draw_range(axes: Any, tensor: RoundedTensor, ran: bool) -> None:
    """The range of values that were not counted: those of given ranges inside a recurrence are not,
    and without data none are.
    """
    low, high = tensor.real_range()
    quantizer = tensor.quantizer
    assert quantizer is not None
    given = isinstance(quantizer.range_method, Fixed)
    axes.axvspan(tensor.spec.qmin - 0.5, tensor.spec.qmax + 0.5, color=_GRID, lw=0)
    words = f"{'given' if given else 'found'} range {low:.4g} to {high:.4g}"
    words += "" if ran else "\npass data for a histogram"
    axes.text(0.5, 0.5, words, ha="center", va="center", fontsize=8, transform=axes.transAxes)
    edges = GridCounts.of(tensor).edges
    axes.set_xlim(edges[0], edges[-1])
    axes.set_yticks([])
    axes.set_title(_title(tensor), fontsize=8.5, loc="left")
    _label(axes, tensor)


def _label(axes: Any, tensor: RoundedTensor) -> None:
    axes.set_xlabel(_axis_label(tensor), fontsize=7.5)
    axes.tick_params(labelsize=7)
    spec = tensor.spec
    if spec.qmax - spec.qmin < 16:
        axes.set_xticks([q for q in range(spec.qmin, spec.qmax + 1) if spec.bits > 1 or q])
    elif spec.bits == 8:
        axes.set_xticks([-128, -64, 0, 64, 127])
