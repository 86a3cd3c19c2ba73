"""What improves a QAT model around its training; each takes one and returns a new one."""

from kqat.algorithms.awq import awq
from kqat.algorithms.equalization import equalize
from kqat.algorithms.smooth_quant import smooth_quant

__all__ = ["awq", "equalize", "smooth_quant"]
