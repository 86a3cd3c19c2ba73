"""Measures the times of several cases in turns, and the ratios between them.

Two clocks are used. Wall time is what a user waits for, but on a shared machine it also includes
other users' work. CPU time is that of this process only, the sum over its threads.
"""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CLOCKS = ("wall", "processor")
PACKAGES = ("tensorflow", "keras", "tf_keras", "tensorflow-model-optimization", "ai-edge-litert")


class Seconds(NamedTuple):
    """A time in seconds by both clocks."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        """The current time of both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Seconds") -> "Seconds":
        """The time that has passed between `start` and this."""
        return Seconds(self.wall - start.wall, self.processor - start.processor)


Measured = dict[str, list[Seconds]]


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


def take_turns(cases: Mapping[str, Callable[[], Seconds]], rounds: int, warmup: int) -> Measured:
    """The seconds of every case in every round, after `warmup` rounds that are not measured.

    Every other round runs in reverse order, so that a case does not always find the caches that
    the same other case left.

    Args:
        cases: name -> a function that runs the case and returns its seconds.
        rounds: how often each case is measured.
        warmup: how often each case runs before.
    """
    measured: Measured = {name: [] for name in cases}
    names = list(cases)
    for turn in range(warmup + rounds):
        for name in names if turn % 2 else reversed(names):
            seconds = cases[name]()
            if turn >= warmup:
                measured[name].append(seconds)
    return measured


def spread(measured: Measured, case: str, clock: str = "wall") -> Spread:
    """The spread of one case's seconds by one clock."""
    return Spread.of([getattr(seconds, clock) for seconds in measured[case]])


def ratio(measured: Measured, case: str, reference: str, clock: str = "wall") -> Spread:
    """The spread of the ratio `case / reference` within each round: common slowdowns cancel out."""
    return Spread.of(
        [
            getattr(mine, clock) / getattr(its, clock)
            for mine, its in zip(measured[case], measured[reference], strict=True)
        ]
    )


def as_json(measured: Measured, ratios: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """All seconds, and the quartiles of the ratio for each pair of a case and its reference."""
    return {
        clock: {
            "ratios": {
                f"{case} / {reference}": dataclasses.asdict(ratio(measured, case, reference, clock))
                for case, reference in ratios
            },
            "seconds": {
                case: [getattr(seconds, clock) for seconds in sample]
                for case, sample in measured.items()
            },
        }
        for clock in CLOCKS
    }


def machine() -> dict[str, Any]:
    """The machine that the numbers were measured on, and its load."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the measurements and the machine to `path` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
