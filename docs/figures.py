"""Draws the figures of the documentation: kqat's own arithmetic, and the kept results of a recipe.

    python -m docs.figures

Each figure is an SVG in `docs/assets`. The numbers come from the functions that training uses.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from kqat.grids import MSE, Histogram, MinMax, Percentile, QuantSpec, arithmetic, bias_steps

FOLDER = Path(__file__).parent / "assets"
RESULTS = Path(__file__).parents[1] / "recipes" / "results"
TEAL, ORANGE, GREY = "#00796b", "#e64a19", "#757575"
# Text as text, and the same bytes for the same numbers.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kqat",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def fake_quantization() -> Figure:
    """Fake quantization on a grid of 3 bits, and the gradient that stands for its derivative."""
    low, high, spec = -1.0, 1.5, QuantSpec(bits=3)
    x = tf.Variable(np.linspace(-2.0, 2.5, 901, dtype=np.float32))
    with tf.GradientTape() as tape:
        rounded = arithmetic.fake_quantize(x, low, high, spec)
    gradient = tape.gradient(rounded, x)
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(x, x, color=GREY, linewidth=1, linestyle="--", label="x")
    left.plot(x, rounded, color=TEAL, label="rounded, 3 bits")
    left.set(xlabel="x", ylabel="output", title="forward")
    left.legend(frameon=False)
    right.plot(x, gradient, color=ORANGE)
    right.set(xlabel="x", ylabel="d output / d x", title="backward", ylim=(-0.1, 1.4))
    return figure


def ranges() -> Figure:
    """The error of rounding and of clipping for each range, and the ranges that methods choose."""
    values = np.abs(np.random.default_rng(0).laplace(0.0, 1.0, 40_000)).astype(np.float32)
    spec = QuantSpec(bits=4)
    seen = Histogram()
    seen.add(values, float(values.min()), float(values.max()))
    bounds = np.linspace(0.3, float(values.max()), 120, dtype=np.float32)
    errors = np.array([_errors(values, 0.0, float(bound), spec) for bound in bounds], np.float64)
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(bounds, errors[:, 0], color=GREY, linestyle="--", label="clipping")
    axes.plot(bounds, errors[:, 1], color=GREY, linestyle=":", label="rounding")
    axes.plot(bounds, errors.sum(axis=1), color=TEAL, label="both")
    methods = {"MSE": MSE(), "Percentile(99.9)": Percentile(99.9), "MinMax": MinMax()}
    for name, method in methods.items():
        low, high = method.calibrated(seen, spec)
        error = sum(_errors(values, low, high, spec))
        axes.plot([high], [error], "o", color=ORANGE)
        axes.annotate(
            name,
            (high, error),
            textcoords="offset points",
            xytext=(0, -18) if name == "MSE" else (-6, 10),
            ha="center" if name == "MSE" else "right",
        )
    axes.set(xlabel="upper end of the range", ylabel="mean squared error")
    axes.set_ylim(0, float(errors.sum(axis=1)[-1]) * 1.6)
    axes.legend(frameon=False, loc="upper center")
    return figure


def bias_grid() -> Figure:
    """Biases on their grid of input scale × weight scale, for two channels."""
    input_scale = 0.05
    biases = np.linspace(-0.02, 0.02, 801)
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    axes = figure.subplots()
    for weight_scale, color in ((0.08, ORANGE), (0.01, TEAL)):
        step = input_scale * weight_scale
        shipped = bias_steps(biases, step) * step
        axes.plot(biases, shipped, color=color, label=f"weight scale {weight_scale:g}")
    axes.plot(biases, biases, color=GREY, linewidth=1, linestyle="--", label="trained")
    axes.set(xlabel="trained bias", ylabel="bias that ships", title=f"input scale {input_scale:g}")
    axes.legend(frameon=False)
    return figure


def lab() -> Figure:
    """Accuracy of the lab's files at each width, calibrated and trained, from its kept results."""
    rows = json.loads((RESULTS / "mobilenetv2_cifar10.json").read_text())["rows"]
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    axes = figure.subplots()
    policies = ("int8", "w4a8", "w3a8", "ternary")
    accuracy = {
        kind: [100 * rows[f"{kind} {policy}"]["accuracy"] for policy in policies]
        for kind in ("PTQ", "QAT")
    }
    places = np.arange(len(policies))
    bars = (
        ("PTQ", "calibrated only (PTQ)", ORANGE, -0.2),
        ("QAT", "then trained for two epochs (QAT)", TEAL, 0.2),
    )
    for kind, label, color, shift in bars:
        drawn = axes.bar(places + shift, accuracy[kind], 0.38, color=color, label=label)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line of float
        axes.bar_label(drawn, fmt="%.1f", fontsize=9, padding=2, bbox=behind, zorder=3)
    start = 100 * rows["FP32, half pruned"]["accuracy"]
    axes.axhline(start, color=GREY, linewidth=1, linestyle="--", label=f"float, {start:.1f} %")
    sizes = [rows[f"QAT {policy}"]["file_bytes"] / 1000 for policy in policies]
    names = [f"{p}\n{size:.0f} kB" for p, size in zip(policies, sizes, strict=True)]
    axes.set_xticks(places, names)
    axes.set(ylabel="accuracy of the .tflite, %", ylim=(0, 95))
    axes.legend(frameon=False, loc="upper right", fontsize=9, ncols=3)
    return figure


def _errors(values: np.ndarray, low: float, high: float, spec: QuantSpec) -> tuple[float, float]:
    """Mean squared error of clipping to a range, and of rounding what was clipped."""
    clipped = np.clip(values, low, high)
    rounded = np.asarray(arithmetic.fake_quantize(clipped, low, high, spec))
    return float(np.mean((values - clipped) ** 2)), float(np.mean((clipped - rounded) ** 2))


FIGURES: dict[str, Callable[[], Figure]] = {
    "fake-quantization": fake_quantization,
    "ranges": ranges,
    "bias-grid": bias_grid,
    "lab": lab,
}


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Draws one figure; returns its file."""
    path = folder / f"{name}.svg"
    with matplotlib.rc_context(STYLE):
        metadata: dict[str, Any] = {"Date": None, "Creator": f"matplotlib {matplotlib.__version__}"}
        FIGURES[name]().savefig(path, metadata=metadata)
    # Matplotlib leaves blanks at the end of lines.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
    return path


if __name__ == "__main__":
    for figure in FIGURES:
        print(f"wrote assets/{draw(figure).name}")
