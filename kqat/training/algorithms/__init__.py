"""What improves a QAT model around its training; each takes one and returns a new one."""

from kqat.training.algorithms.awq import awq
from kqat.training.algorithms.equalization import equalize
from kqat.training.algorithms.smooth_quant import smooth_quant

__all__ = ["awq", "equalize", "smooth_quant"]
