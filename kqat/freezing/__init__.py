"""QAT model to `FrozenModel`, the only seam between `kqat` and `tflite_export`.

Besides the frozen model itself, this face shows what it is made of: markers, tables and LSTMs.
"""

from kqat.freezing.freezer import freeze
from kqat.freezing.frozen_model import FrozenModel
from kqat.freezing.frozen_weight import FrozenWeight
from kqat.freezing.stripper import strip

__all__ = [
    "FrozenModel",
    "FrozenWeight",
    "freeze",
    "strip",
]
