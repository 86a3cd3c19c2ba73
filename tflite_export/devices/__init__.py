"""Checks a model or file against a target: missing kernels, Edge TPU limits, Vela's estimate."""

from tflite_export.devices import checks, vela
from tflite_export.devices.checks import (
    check_file,
    check_limits,
    check_target,
    computed,
    runtimes_of,
)
from tflite_export.devices.vela import ACCELERATORS, Fallback, NpuEstimate, estimate

__all__ = [
    "ACCELERATORS",
    "Fallback",
    "NpuEstimate",
    "check_file",
    "check_limits",
    "check_target",
    "checks",
    "computed",
    "estimate",
    "runtimes_of",
    "vela",
]
