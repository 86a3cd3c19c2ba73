"""Layers that Keras lacks: each becomes one TFLite operator, or marks a value for the exporter."""

from kqat.parts.elementwise import Elementwise, is_elementwise, within_domain
from kqat.parts.learned import Learned
from kqat.parts.lstm_step import CARRY, GATES, FrozenLSTM, GateNumbers, LstmState
from kqat.parts.markers import Marker, PrecisionBoundary, Requantize, Tabulated, is_marker
from kqat.parts.recurrence import Recurrence, Stack, Unstack
from kqat.parts.single_op_layers import (
    ChannelAffine,
    DepthToSpace,
    Hide,
    IndexOperation,
    Matmul,
    ReciprocalSquareRoot,
    Reduce,
    Select,
    Slice,
    SpaceToDepth,
    Take,
    WithConstant,
    sliced,
    stacked,
    total,
)
from kqat.parts.tensorflow_function import TensorFlowFunction

__all__ = [
    "CARRY",
    "GATES",
    "ChannelAffine",
    "DepthToSpace",
    "Elementwise",
    "FrozenLSTM",
    "GateNumbers",
    "Hide",
    "IndexOperation",
    "Learned",
    "LstmState",
    "Marker",
    "Matmul",
    "PrecisionBoundary",
    "ReciprocalSquareRoot",
    "Recurrence",
    "Reduce",
    "Requantize",
    "Select",
    "Slice",
    "SpaceToDepth",
    "Stack",
    "Tabulated",
    "Take",
    "TensorFlowFunction",
    "Unstack",
    "WithConstant",
    "is_elementwise",
    "is_marker",
    "sliced",
    "stacked",
    "total",
    "within_domain",
]
