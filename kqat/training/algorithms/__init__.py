"""Algorithms that make a QAT model easier to round, or round it better, before it is trained."""

from kqat.training.algorithms.adaround import adaround
from kqat.training.algorithms.awq import awq
from kqat.training.algorithms.bias_correction import correct_biases
from kqat.training.algorithms.equalization import equalize
from kqat.training.algorithms.gptq import gptq
from kqat.training.algorithms.smooth_quant import smooth_quant

__all__ = ["adaround", "awq", "correct_biases", "equalize", "gptq", "smooth_quant"]
