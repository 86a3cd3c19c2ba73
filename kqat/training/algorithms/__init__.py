"""Algorithms that make a QAT model easier to round: SmoothQuant, AWQ, cross-layer equalization."""

from kqat.training.algorithms.awq import awq
from kqat.training.algorithms.equalization import equalize
from kqat.training.algorithms.smooth_quant import smooth_quant

__all__ = ["awq", "equalize", "smooth_quant"]
