"""Runs a `.tflite` anywhere: LiteRT (reference, builtin, XNNPACK) and TFLite Micro."""

from tflite_export.runtimes import execution, feeds
from tflite_export.runtimes.child_process import run_python
from tflite_export.runtimes.execution import (
    RUNTIMES,
    run,
    run_litert_apart,
    supports,
    tflite_micro_arena_bytes,
    wide_softmax,
)
from tflite_export.runtimes.feeds import as_type, check_finite, has_grid, random_inputs, real

__all__ = [
    "RUNTIMES",
    "as_type",
    "check_finite",
    "execution",
    "feeds",
    "has_grid",
    "random_inputs",
    "real",
    "run",
    "run_litert_apart",
    "run_python",
    "supports",
    "tflite_micro_arena_bytes",
    "wide_softmax",
]
