"""`FrozenModel`: all that `tflite_export` sees of a trained model."""

import dataclasses

import keras

from kqat.freezing.frozen_weight import FrozenWeight
from kqat.grids import Site
from kqat.parts import (
    FrozenLSTM,
    Tabulated,
)


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A trained model, ready to be lowered.

    Attributes:
        model: float Keras model with `Marker(i)` after the value of `sites[i]`.
        sites: every value that is an integer in the file.
        weights: the integers and scales of every weight; weights are found by content.
        tables: the elementwise layers that may ship as tables, by their `Tabulated` index.
        lstms: the LSTMs that ship as one operator.
        input_names, output_names: those of the user's model, in its order: the keys of a dict.
    """

    model: keras.Model
    sites: tuple[Site, ...]
    weights: tuple[FrozenWeight, ...]
    tables: tuple[Tabulated, ...]
    lstms: tuple[FrozenLSTM, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
