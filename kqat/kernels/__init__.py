"""Integer arithmetic of TFLite's operators as each runtime rounds it, over NumPy and Keras alike.

Each function takes integers and grids and returns the exact integers of one kernel: LiteRT's own
(reference and builtin), XNNPACK's, TFLite Micro's. The array functions come first, as `xp`:
`NUMPY` or `KERAS`. Facts were read in the kernels of LiteRT, TFLite Micro and XNNPACK as of
2026-08, and are held against the runtimes by `benchmarks/op_probe.py`.
"""

from kqat.kernels import normalizers, pointwise, reductions, resizing, sums, tables
from kqat.kernels.arrays import KERAS, NUMPY, Arrays
from kqat.kernels.grids import Grid, onto
from kqat.kernels.lstm_arithmetic import GATES, Numbers, run_lstm
from kqat.kernels.rounding import Factor, fixed_point, once_rounded, twice_rounded

__all__ = [
    "GATES",
    "KERAS",
    "NUMPY",
    "Arrays",
    "Factor",
    "Grid",
    "Numbers",
    "fixed_point",
    "normalizers",
    "once_rounded",
    "onto",
    "pointwise",
    "reductions",
    "resizing",
    "run_lstm",
    "sums",
    "tables",
    "twice_rounded",
]
