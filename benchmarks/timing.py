"""Runs that take turns, and the ratios between them."""

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("tensorflow", "keras", "tf_keras", "tensorflow-model-optimization", "ai-edge-litert")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> "Spread":
        """The spread of a sample, which must not be empty."""
        return cls(*(float(q) for q in np.quantile(sample, (0.25, 0.5, 0.75))))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower:.3f}–{self.upper:.3f})"


def take_turns(
    cases: Mapping[str, Callable[[], float]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of every case in every round, after `warmup` rounds that do not count.

    Every other round runs backwards: so no case always follows the same one, whose leftovers
    in the caches it would pay for.

    Args:
        cases: name -> a run that returns the seconds which count.
        rounds: how often each case runs.
        warmup: how often each runs before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(warmup + rounds):
        for name in names if turn % 2 else reversed(names):
            measured = cases[name]()
            if turn >= warmup:
                seconds[name].append(measured)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], case: str, reference: str) -> Spread:
    """The spread of `case / reference`, each taken within one round: what slows both cancels."""
    return Spread.of(np.divide(seconds[case], seconds[reference]))


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the measurements, and what they were measured on, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
