"""Runs that take turns, and the ratios between them.

Two clocks run along. The wall's is what a user waits for; on a machine that others use too it
says more about them. The processor's counts this process alone, all its threads together.
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
    """A time by both clocks."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        """What the clocks show."""
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
    """The seconds of every case in every round, after `warmup` rounds that do not count.

    Every other round runs backwards: so no case always follows the same one, whose leftovers
    in the caches it would pay for.

    Args:
        cases: name -> a run that returns the seconds which count.
        rounds: how often each case runs.
        warmup: how often each runs before.
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
    """The spread of `case / reference`, each taken within one round: what slows both cancels."""
    return Spread.of(
        [
            getattr(mine, clock) / getattr(its, clock)
            for mine, its in zip(measured[case], measured[reference], strict=True)
        ]
    )


def as_json(measured: Measured, ratios: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """All seconds, and for pairs of a case and its reference the quartiles of their ratio."""
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
