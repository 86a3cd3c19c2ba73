"""Rewrites composite layers and `keras.ops` functions as simpler layers, one module per family.

The tables in `kqat.registry` name the rewrite of each layer and operation.
"""

from kqat.rewrites.layers import (
    attention,
    attention_masks,
    basic,
    channels_first,
    matrix_products,
    normalization,
    one_hot,
    recurrent,
    step_masks,
    time_and_depth,
    whole_numbers,
)
from kqat.rewrites.layers.basic import Decomposed
from kqat.rewrites.layers.one_hot import truth
from kqat.rewrites.layers.recurrent import Builder, bidirectional, rnn
from kqat.rewrites.operations.binary import (
    BINARY,
    FAR_BELOW,
    Row,
    clip,
    function,
    is_number,
    scaled,
)
from kqat.rewrites.operations.nn import NETWORKS
from kqat.rewrites.operations.reductions import REDUCING
from kqat.rewrites.operations.shapes import REARRANGING, zeros_around
from kqat.rewrites.operations.sorting import SORTING
from kqat.rewrites.operations.weights import WANT_BATCH, as_values, computed, is_weight, zero

__all__ = [
    "BINARY",
    "FAR_BELOW",
    "NETWORKS",
    "REARRANGING",
    "REDUCING",
    "SORTING",
    "WANT_BATCH",
    "Builder",
    "Decomposed",
    "Row",
    "as_values",
    "attention",
    "attention_masks",
    "basic",
    "bidirectional",
    "channels_first",
    "clip",
    "computed",
    "function",
    "is_number",
    "is_weight",
    "matrix_products",
    "normalization",
    "one_hot",
    "recurrent",
    "rnn",
    "scaled",
    "step_masks",
    "time_and_depth",
    "truth",
    "whole_numbers",
    "zero",
    "zeros_around",
]
