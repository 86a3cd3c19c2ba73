"""Cases for recurrent layers: one step's operators, as often as there are steps, or one fused."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers as L
from keras import ops

from kqat import QuantizeConfig
from kqat.parts.recurrence import Recurrence, Stack, Unstack
from tests.coverage.cases import Case, functional

STEPS = 3
SEQUENCE = (STEPS, 5)


def _one(name: str, call: Callable[[Any], Any], **ops: int) -> Case:
    return Case(name=name, build=lambda: functional(SEQUENCE, call), ops=ops)


def _fused(name: str, call: Callable[[Any], Any], **ops: int) -> Case:
    ops = {"UNIDIRECTIONAL_SEQUENCE_LSTM": 1, **ops}
    policy = QuantizeConfig(recurrence="fused")
    return Case(name=name, build=lambda: functional(SEQUENCE, call), ops=ops, policy=policy)


def _states(x: Any) -> Any:
    """An encoder whose last states begin a decoder."""
    _, h, c = L.LSTM(4, return_state=True)(x)
    return L.LSTM(4, return_sequences=True)(x, initial_state=[h, c])


def _all_states(x: Any) -> Any:
    """Every output of a layer that returns its states."""
    layer = L.Bidirectional(L.LSTM(4, return_sequences=True, return_state=True), merge_mode=None)
    return layer(x)


def _by_hand(x: Any) -> Any:
    """A step of one's own, and its sequence taken apart and put together."""
    h, step = keras.Input((5,)), keras.Input((5,))
    model = keras.Model([step, h], [L.Activation("tanh")(L.Add()([step, L.Dense(5)(h)]))])
    y = Recurrence(model, 1, return_sequences=True, go_backwards=True, flip=True)([x])
    return Stack()(Unstack()(y)[1:])


def _cells(x: Any) -> Any:
    """Cells that are called by hand, the first of them from zeros."""
    y, _ = L.SimpleRNNCell(4)(x[:, 0], [ops.zeros_like(x[:, 0, :4])])
    y, _ = L.GRUCell(4)(x[:, 1], [y])
    y, (_, c) = L.LSTMCell(4)(x[:, 2], [y, L.Dense(4)(x[:, 0])])
    return L.Add()([y, c])


def _cell_stack(x: Any) -> Any:
    """Two cells, one above the other, for two steps."""
    cells = L.StackedRNNCells([L.SimpleRNNCell(4), L.SimpleRNNCell(4)])
    states = [L.Dense(4)(x[:, 0]), L.Dense(4)(x[:, 0])]
    _, states = cells(x[:, 1], states)
    return cells(x[:, 2], states)[0]


@keras.saving.register_keras_serializable("tests")
class Gated(L.Layer):
    """A cell of the user's own, made of layers, whose output is none of its states."""

    state_size, output_size = (4, 4), 2

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gate, self.new = L.Dense(4, "sigmoid"), L.Dense(4, "tanh")
        self.out = L.Dense(2)

    def build(self, shape: Any) -> None:
        """Builds the layers."""
        self.gate.build((None, shape[-1] + 4))
        self.new.build((None, shape[-1] + 4))
        self.out.build((None, 4))

    def call(self, x: Any, states: Any) -> Any:
        """The output of a step, and the states after it."""
        h, before = states
        both = ops.concatenate([x, h], axis=-1)
        after = h + self.gate(both) * (self.new(both) - h)
        return self.out(after - before), [after, h]


def _images(name: str, shape: tuple[int, ...], layer: Callable[[], Any], **ops: int) -> Case:
    """Images, one a step: rows, images, or volumes."""
    return Case(name=name, build=lambda: functional(shape, lambda x: layer()(x)), ops=ops)


def _bidirectional(merge: str, sequences: bool = True) -> Callable[[Any], Any]:
    inner = L.GRU(4, return_sequences=sequences)
    return lambda x: L.Bidirectional(inner, merge_mode=merge)(x)


CASES = (
    _one(
        "simple_rnn",
        lambda x: L.SimpleRNN(4)(x),
        ADD=3,
        FULLY_CONNECTED=4,
        STRIDED_SLICE=1,
        SUB=1,
        TANH=3,
        UNPACK=1,
    ),
    _one(
        "simple_rnn_relu",
        lambda x: L.SimpleRNN(4, "relu", return_sequences=True)(x),
        ADD=3,
        FULLY_CONNECTED=4,
        PACK=1,
        STRIDED_SLICE=1,
        SUB=1,
        UNPACK=1,
    ),
    _one(
        "simple_rnn_linear",
        lambda x: L.SimpleRNN(4, None, use_bias=False)(x),
        ADD=3,
        FULLY_CONNECTED=4,
        STRIDED_SLICE=1,
        SUB=1,
        UNPACK=1,
    ),
    _one(
        "gru",
        lambda x: L.GRU(4)(x),
        ADD=9,
        FULLY_CONNECTED=8,
        LOGISTIC=3,
        MUL=6,
        STRIDED_SLICE=7,
        SUB=4,
        TANH=3,
        UNPACK=2,
    ),
    _one(
        "gru_reset_before",
        lambda x: L.GRU(4, reset_after=False, go_backwards=True)(x),
        ADD=9,
        FULLY_CONNECTED=8,
        LOGISTIC=3,
        MUL=6,
        STRIDED_SLICE=7,
        SUB=4,
        TANH=3,
        UNPACK=2,
    ),
    _one(
        "gru_softsign",
        lambda x: L.GRU(4, recurrent_activation="softsign")(x),
        ADD=12,
        CAST=3,
        FULLY_CONNECTED=8,
        GATHER=3,
        MUL=6,
        STRIDED_SLICE=7,
        SUB=7,
        TANH=3,
        UNPACK=2,
    ),
    _one(
        "lstm",
        lambda x: L.LSTM(4)(x),
        ADD=9,
        FULLY_CONNECTED=8,
        LOGISTIC=3,
        MUL=9,
        QUANTIZE=1,
        STRIDED_SLICE=10,
        SUB=1,
        TANH=6,
        UNPACK=2,
    ),
    _one(
        "lstm_dropout",
        lambda x: L.LSTM(4, dropout=0.2, recurrent_dropout=0.2)(x),
        ADD=9,
        FULLY_CONNECTED=8,
        LOGISTIC=3,
        MUL=9,
        QUANTIZE=1,
        STRIDED_SLICE=10,
        SUB=1,
        TANH=6,
        UNPACK=2,
    ),
    _one(
        "lstm_hard",
        lambda x: L.LSTM(4, "relu", recurrent_activation="hard_sigmoid")(x),
        ADD=12,
        CAST=3,
        FULLY_CONNECTED=8,
        GATHER=3,
        MUL=9,
        QUANTIZE=1,
        STRIDED_SLICE=10,
        SUB=1,
        UNPACK=2,
    ),
    _fused("lstm_fused", lambda x: L.LSTM(4)(x), RESHAPE=1, STRIDED_SLICE=1),
    _fused(
        "bidirectional_fused",
        lambda x: L.Bidirectional(L.LSTM(4, return_sequences=True), merge_mode="sum")(x),
        ADD=1,
        GATHER=2,
        UNIDIRECTIONAL_SEQUENCE_LSTM=2,
    ),
    _one(
        "lstm_stacked",
        lambda x: L.LSTM(4)(L.LSTM(6, return_sequences=True)(x)),
        ADD=18,
        FULLY_CONNECTED=16,
        LOGISTIC=6,
        MUL=18,
        PACK=1,
        QUANTIZE=2,
        STRIDED_SLICE=20,
        SUB=2,
        TANH=12,
        UNPACK=4,
    ),
    _one(
        "lstm_states",
        _states,
        ADD=18,
        FULLY_CONNECTED=16,
        LOGISTIC=6,
        MUL=18,
        PACK=1,
        QUANTIZE=3,
        STRIDED_SLICE=19,
        SUB=1,
        TANH=12,
        UNPACK=4,
    ),
    _one(
        "lstm_all_states",
        _all_states,
        ADD=18,
        FULLY_CONNECTED=16,
        LOGISTIC=6,
        MUL=18,
        PACK=2,
        QUANTIZE=2,
        STRIDED_SLICE=20,
        SUB=2,
        TANH=12,
        UNPACK=4,
    ),
    _one(
        "bidirectional_concat",
        _bidirectional("concat"),
        ADD=18,
        CONCATENATION=1,
        FULLY_CONNECTED=16,
        LOGISTIC=6,
        MUL=12,
        PACK=2,
        QUANTIZE=2,
        STRIDED_SLICE=14,
        SUB=8,
        TANH=6,
        UNPACK=4,
    ),
    _one(
        "bidirectional_sum",
        _bidirectional("sum", sequences=False),
        ADD=19,
        FULLY_CONNECTED=16,
        LOGISTIC=6,
        MUL=12,
        STRIDED_SLICE=14,
        SUB=8,
        TANH=6,
        UNPACK=4,
    ),
    _one(
        "bidirectional_ave",
        _bidirectional("ave"),
        ADD=19,
        FULLY_CONNECTED=16,
        LOGISTIC=6,
        MUL=13,
        PACK=2,
        STRIDED_SLICE=14,
        SUB=8,
        TANH=6,
        UNPACK=4,
    ),
    _one(
        "bidirectional_mul",
        _bidirectional("mul"),
        ADD=18,
        FULLY_CONNECTED=16,
        LOGISTIC=6,
        MUL=13,
        PACK=2,
        STRIDED_SLICE=14,
        SUB=8,
        TANH=6,
        UNPACK=4,
    ),
    _one(
        "bidirectional_simple",
        lambda x: L.Bidirectional(L.SimpleRNN(4, return_sequences=True))(x),
        ADD=6,
        CONCATENATION=1,
        FULLY_CONNECTED=8,
        PACK=2,
        STRIDED_SLICE=2,
        SUB=2,
        TANH=6,
        UNPACK=2,
    ),
    _one(
        "rnn",
        lambda x: L.RNN(L.LSTMCell(4), return_sequences=True, go_backwards=True)(x),
        ADD=9,
        FULLY_CONNECTED=8,
        LOGISTIC=3,
        MUL=9,
        PACK=1,
        QUANTIZE=1,
        STRIDED_SLICE=10,
        SUB=1,
        TANH=6,
        UNPACK=2,
    ),
    _one(
        "rnn_stacked",
        lambda x: L.RNN([L.LSTMCell(4), L.GRUCell(3), L.SimpleRNNCell(4)])(x),
        ADD=21,
        FULLY_CONNECTED=20,
        LOGISTIC=6,
        MUL=15,
        PACK=2,
        QUANTIZE=1,
        STRIDED_SLICE=18,
        SUB=6,
        TANH=12,
        UNPACK=5,
    ),
    _one(
        "recurrence",
        _by_hand,
        ADD=3,
        FULLY_CONNECTED=3,
        PACK=2,
        STRIDED_SLICE=1,
        SUB=1,
        TANH=3,
        UNPACK=2,
    ),
    _one(
        "cells",
        _cells,
        ADD=7,
        FULLY_CONNECTED=10,
        LOGISTIC=2,
        MUL=5,
        STRIDED_SLICE=8,
        SUB=1,
        TANH=4,
    ),
    _one(
        "cells_stacked",
        _cell_stack,
        ADD=4,
        FULLY_CONNECTED=10,
        STRIDED_SLICE=3,
        TANH=4,
    ),
    _one(
        "cell_of_ones_own",
        lambda x: L.RNN(Gated(), return_sequences=True)(x),
        ADD=3,
        CONCATENATION=3,
        FULLY_CONNECTED=9,
        LOGISTIC=3,
        MUL=3,
        PACK=1,
        QUANTIZE=2,
        STRIDED_SLICE=1,
        SUB=7,
        TANH=3,
        UNPACK=1,
    ),
    _images(
        "conv_lstm_1d",
        (2, 5, 2),
        lambda: L.ConvLSTM1D(3, 3, padding="same"),
        ADD=6,
        CONCATENATION=1,
        CONV_2D=8,
        LOGISTIC=2,
        MUL=6,
        QUANTIZE=1,
        RESHAPE=10,
        STRIDED_SLICE=7,
        SUB=1,
        TANH=4,
        UNPACK=1,
    ),
    _images(
        "conv_lstm_2d",
        (2, 5, 5, 2),
        lambda: L.ConvLSTM2D(3, 3, return_sequences=True),
        ADD=6,
        CONV_2D=8,
        LOGISTIC=2,
        MUL=6,
        PACK=1,
        QUANTIZE=1,
        RESHAPE=2,
        STRIDED_SLICE=7,
        SUB=1,
        TANH=4,
        UNPACK=1,
    ),
    _images(
        "conv_lstm_3d",
        (2, 2, 3, 3, 2),
        lambda: L.ConvLSTM3D(2, 2, padding="same"),
        ADD=6,
        CONCATENATION=8,
        CONV_2D=16,
        LOGISTIC=2,
        MUL=6,
        PAD=4,
        QUANTIZE=1,
        RESHAPE=46,
        STRIDED_SLICE=15,
        SUB=1,
        TANH=4,
        TRANSPOSE=8,
        UNPACK=1,
    ),
)
