"""Rows and rewrites of LSTMs that ship as one UNIDIRECTIONAL_SEQUENCE_LSTM operator."""

from typing import Any

import keras
from keras import layers

from kqat.base import UnsupportedLayerError
from kqat.graph import Part, activation_name
from kqat.parts import CARRY, GATES, FrozenLSTM, LstmState, Recurrence, RecurrenceKind, StateKind
from kqat.registry.rule import LayerRule, Output
from kqat.rewrites import Builder, Decomposed, bidirectional, rnn

# The options of an LSTM that the operator computes. It also starts from zero states, does not
# output its last ones, and knows no step that does not count.
_OPTIONS = {
    "return_state": False,
    "cell": "LSTMCell",
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "recurrent_dropout": 0.0,
}


_OPERATOR = "UNIDIRECTIONAL_SEQUENCE_LSTM"
_TAKES_LAST = ("STRIDED_SLICE", "RESHAPE")
OPS = (_OPERATOR, "GATHER")
# Rows of the registry for the parts of a fused LSTM.
KINDS: dict[tuple[type, str], LayerRule] = {
    (FrozenLSTM, RecurrenceKind.FUSED): LayerRule(output=Output.OWN, ops=(_OPERATOR,)),
    (Recurrence, RecurrenceKind.FUSED): LayerRule(output=Output.INSIDE, ops=_TAKES_LAST),
    (Recurrence, RecurrenceKind.FUSED_BACKWARDS): LayerRule(
        output=Output.INSIDE, ops=("GATHER", *_TAKES_LAST)
    ),
    **{
        (LstmState, kind): LayerRule(
            output=Output.OWN,
            ops=(_OPERATOR,),
            weights={f"{gate}_{part}": None for gate in gates for part in ("kernel", "recurrent")},
            grid=CARRY if kind is StateKind.CARRY else None,
        )
        for kind, gates in LstmState.KINDS.items()
    },
}


def fused_rnn(layer: Any, name: str, *, flip: bool = False) -> Decomposed:
    """As `kqat.rewrites.layers.recurrent.rnn`, for LSTM cells that ship fused.

    Raises:
        UnsupportedLayerError: if the layer has options that the operator does not compute.
    """
    for cell in getattr(layer.cell, "cells", [layer.cell]):
        _check({"return_state": layer.return_state, **_options(cell)}, name)
    whole = rnn(layer, name, flip=flip, cells={layers.LSTMCell: _step})

    def call(x: Any, initial_state: Any = None, mask: Any = None) -> Any:
        _check({"initial_state": initial_state, "mask": mask}, name)
        return whole(x)

    return call


def fused_bidirectional(layer: Any, name: str) -> Decomposed:
    """As `kqat.rewrites.layers.recurrent.bidirectional`, with two LSTMs from `fused_rnn`."""
    return bidirectional(layer, name, make=fused_rnn)


def _options(cell: Any) -> dict[str, Any]:
    """The options of a cell that the operator has to compute."""
    if not isinstance(cell, layers.LSTMCell):
        return {"cell": type(cell).__name__}
    functions = ("activation", "recurrent_activation")
    found = {
        option: activation_name(getattr(cell, option)) or "a function of your own"
        for option in functions
    }
    return {**found, "recurrent_dropout": cell.recurrent_dropout}


def _check(found: dict[str, Any], name: str) -> None:
    for option, value in found.items():
        wanted = _OPTIONS.get(option)
        if value is not wanted and (wanted is None or value != wanted):
            received = value if isinstance(value, bool | float | str) else "tensors"
            raise UnsupportedLayerError(
                f"Expected {option}={wanted!r} for recurrence='fused' in layer '{name}'. Received: "
                f"{received!r}. Give it a config with recurrence='unrolled'."
            )


def _step(builder: Builder) -> keras.Model:
    """`c = f c + i g`, `h = o tanh(c)`; the operator reads `x` itself, so nothing is projected."""
    x = builder.read()
    h, c = builder.state("state"), builder.state("carry_state")
    carry = _state(builder, StateKind.CARRY)([x, h, c])
    return builder.model([h, c], [_state(builder, StateKind.OUTPUT)([x, h, carry]), carry])


def _state(builder: Builder, kind: StateKind) -> Part:
    """The layer that computes one state, with the cell's weights split by gate."""
    options = builder.regularizers("kernel_regularizer", "recurrent_regularizer")
    use_bias = builder.bias is not None
    layer = LstmState(
        kind, builder.units, use_bias=use_bias, name=builder.part_name(kind), **options
    )
    layer.trainable = builder.trainable
    arrays = (builder.kernel, builder.recurrent_kernel, builder.bias)
    starts = [GATES.index(gate) * builder.units for gate in layer.gates]
    columns = [slice(start, start + builder.units) for start in starts]
    return Part(layer, [a[..., part] for part in columns for a in arrays if a is not None])
