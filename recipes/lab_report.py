"""Renders the lab's report: one HTML page with tables, curves and explanations."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from kqat.grids import QuantSpec, arithmetic
from recipes.running import Table

TEMPLATE = Path(__file__).with_name("lab_report.html.j2")
# The rounding curve is drawn with few levels, so that its steps are visible.
STAIRCASE = QuantSpec(bits=3, symmetric=False, narrow_range=False, axis=None)
STAIRCASE_RANGE = -1.0, 1.5


def html(results: dict[str, Any], tables: Sequence[Table]) -> str:
    """The self-contained HTML page: it needs no other file and no network."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    figures = {
        "accuracy": _svg(lambda figure: _draw_accuracy(figure, results["rows"])),
        "curves": _svg(lambda figure: _draw_curves(figure, results["history"])),
        "staircase": _svg(_draw_staircase),
    }
    return template.render(results=results, tables=tables, figures=figures)


def _svg(draw: Callable[[Figure], None]) -> str:
    """The figure that `draw` draws, as an SVG element; equal figures give equal text."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    draw(figure)
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "kqat"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _draw_accuracy(figure: Figure, rows: dict[str, dict[str, Any]]) -> None:
    axes = figure.subplots()
    for name, row in rows.items():
        axes.scatter(row["file_bytes"] / 1e3, 100 * row["accuracy"], label=name)
    axes.set(xlabel="file, kB", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _draw_curves(figure: Figure, history: dict[str, list[dict[str, float]]]) -> None:
    axes = figure.subplots()
    for name, epochs in history.items():
        # tfmot's models are trained by Keras 2, without held-out images.
        accuracies = [100 * epoch["val_accuracy"] for epoch in epochs if "val_accuracy" in epoch]
        if accuracies:
            axes.plot(range(1, len(accuracies) + 1), accuracies, marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _draw_staircase(figure: Figure) -> None:
    x = np.linspace(-1.6, 2.1, 800, dtype=np.float32)
    low, high = (np.float32(end) for end in STAIRCASE_RANGE)
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        rounded = arithmetic.fake_quantize(inputs, low, high, STAIRCASE)
    gradient = tape.gradient(rounded, inputs)
    left, right = figure.subplots(1, 2)
    left.plot(x, x, color="0.7", linewidth=1, label="x")
    left.plot(x, rounded, label="fake quantized")
    left.set(xlabel="x", ylabel="value")
    left.legend(frameon=False)
    right.step(x, gradient, color="C1", label="straight-through")
    right.set(xlabel="x", ylabel="gradient", ylim=(-0.1, 1.3))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
