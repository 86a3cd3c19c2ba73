"""QAT model to `FrozenModel`, the only seam between `kqat` and `tflite_export`.

Besides the frozen model itself, this face shows what it is made of: its graph, with markers, lookup
tables and LSTMs among the layers.
"""

from kqat.freezing.freezer import freeze
from kqat.freezing.frozen_model import FrozenModel, NodeFacts
from kqat.freezing.frozen_weight import FrozenConstant, FrozenWeight
from kqat.freezing.stripper import strip
from kqat.graph import Graph, Node, Ref, call_signature
from kqat.parts import (
    GATES,
    ByteInput,
    FrozenLSTM,
    GateNumbers,
    IndexOperation,
    Marker,
    MarkerKind,
    Requantize,
    Tabulated,
    TiedWeight,
    WeightUse,
    is_marker,
    reads_rows,
)

__all__ = [
    "GATES",
    "ByteInput",
    "FrozenConstant",
    "FrozenLSTM",
    "FrozenModel",
    "FrozenWeight",
    "GateNumbers",
    "Graph",
    "IndexOperation",
    "Marker",
    "MarkerKind",
    "Node",
    "NodeFacts",
    "Ref",
    "Requantize",
    "Tabulated",
    "TiedWeight",
    "WeightUse",
    "call_signature",
    "freeze",
    "is_marker",
    "reads_rows",
    "strip",
]
