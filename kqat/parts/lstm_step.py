"""An LSTM's step as TFLite's fused operator has it, and the whole of it as it ships.

UNIDIRECTIONAL_SEQUENCE_LSTM rounds inside: the two products of a gate to Q3.12, which ends at 8,
sigmoid and tanh to Q0.15, the carry to int16 with a scale that is a power of two, the output to
int8. Each gate has two weights with one scale each. Training rounds at the same places.
Source: TFLite quantization specification, and `lite/micro/kernels/lstm_eval.h` (2026-08).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.base import TextEnum
from kqat.devices import INT16_FIXED
from kqat.grids import INT16_ACTIVATION, QuantSpec, Site, arithmetic
from kqat.kernels import GATES

CARRY = QuantSpec(bits=16, symmetric=True, power_of_two=True)
_SUMS = (-8.0, 8.0 - 2.0**-12)
# Of sigmoid and tanh.
_UNIT = INT16_FIXED.range


class StateKind(TextEnum):
    """Which of an LSTM's two states."""

    CARRY = "carry"
    OUTPUT = "output"


class RecurrenceKind(TextEnum):
    """How a recurrence ships: step by step, or as one operator.

    For the last kind, sequences have to be turned around before the operator or behind it.
    """

    UNROLLED = "unrolled"
    FUSED = "fused"
    FUSED_BACKWARDS = "fused_backwards"


@keras.saving.register_keras_serializable("kqat")
class LstmState(layers.Layer):
    """One state after a step, of `[x, h, c]`: the carry `f c + i g`, or the output `o tanh(c)`.

    `x` has shape `(batch, features)`, the states `(batch, units)`. A gate `g` has the weights
    `g_kernel` of shape `(features, units)`, `g_recurrent` of `(units, units)` and, with `use_bias`,
    `g_bias`.

    Args:
        kind: the carry, or the output, which takes the carry of the same step.
        units: size of a state.
        use_bias: whether gates have biases.
        kernel_regularizer, recurrent_regularizer, bias_regularizer: as of `keras.layers.LSTM`.

    Reference: Gers et al. 2000, section 3.1 (https://doi.org/10.1162/089976600300015015).
    """

    KINDS = {StateKind.CARRY: GATES[:3], StateKind.OUTPUT: GATES[3:]}  # noqa: RUF012 - a constant of the class

    def __init__(
        self,
        kind: StateKind | str,
        units: int,
        *,
        use_bias: bool = True,
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kind, self.units, self.use_bias = StateKind(kind), units, use_bias
        self.regularizers = tuple(
            keras.regularizers.get(r)
            for r in (kernel_regularizer, recurrent_regularizer, bias_regularizer)
        )

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the gates that this state is made of."""
        return self.KINDS[self.kind]

    def build(self, input_shape: Any) -> None:
        """Creates the weights, gate by gate."""
        features = input_shape[0][-1]
        parts: list[Any] = [
            ("kernel", (features, self.units)),
            ("recurrent", (self.units, self.units)),
        ]
        if self.use_bias:
            parts.append(("bias", (self.units,)))
        for gate in self.gates:
            for (part, shape), regularizer in zip(parts, self.regularizers, strict=False):
                name = f"{gate}_{part}"
                weight = self.add_weight(shape=shape, name=name, regularizer=regularizer)
                setattr(self, name, weight)

    def call(self, inputs: Sequence[Any]) -> Any:
        """The state, not rounded."""
        return self._state(inputs, lambda x, low, high: x)

    def rounded(self, inputs: Sequence[Any]) -> Any:
        """The same with what lies inside the operator rounded as there; the state itself is not."""
        return self._state(inputs, _round)

    def _state(self, inputs: Sequence[Any], rounding: Any) -> Any:
        x, h, c = inputs
        fed, back = ops.matmul(x, self._joined("kernel")), ops.matmul(h, self._joined("recurrent"))
        if self.use_bias:
            fed = fed + self._joined("bias")
        sums = rounding(rounding(fed, *_SUMS) + rounding(back, *_SUMS), *_SUMS)
        parts = dict(zip(self.gates, ops.split(sums, len(self.gates), axis=-1), strict=True))
        values = {
            gate: rounding(ops.tanh(s) if gate == "candidate" else ops.sigmoid(s), *_UNIT)
            for gate, s in parts.items()
        }
        if self.kind is StateKind.CARRY:
            return values["forget"] * c + values["input"] * values["candidate"]
        return values["output"] * rounding(ops.tanh(c), *_UNIT)

    def _joined(self, part: str) -> Any:
        """The weights of all gates side by side, for one product."""
        weights = [ops.convert_to_tensor(getattr(self, f"{gate}_{part}")) for gate in self.gates]
        return weights[0] if len(weights) == 1 else ops.concatenate(weights, axis=-1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """A state's."""
        return (input_shape[0][0], self.units)

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with the arguments above."""
        names = ("kernel_regularizer", "recurrent_regularizer", "bias_regularizer")
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "kind": self.kind.value,
            "units": self.units,
            "use_bias": self.use_bias,
            **{
                name: None if value is None else serialize(value)
                for name, value in zip(names, self.regularizers, strict=True)
            },
        }


def _round(x: Any, low: float, high: float) -> Any:
    rounded = arithmetic.fake_quantize(ops.cast(x, "float32"), low, high, INT16_ACTIVATION)
    return ops.cast(rounded, x.dtype)


@dataclasses.dataclass(frozen=True)
class GateNumbers:
    """One gate as it ships: int8 weights of Keras's shapes, one scale each, and a float bias."""

    kernel: np.ndarray
    kernel_scale: np.float32
    recurrent: np.ndarray
    recurrent_scale: np.float32
    bias: np.ndarray

    def values(self) -> tuple[np.ndarray, ...]:
        """Kernel, recurrent kernel and bias as floats."""
        products = self.kernel * self.kernel_scale, self.recurrent * self.recurrent_scale
        return (*(product.astype(np.float32) for product in products), self.bias)


class FrozenLSTM(layers.Layer):
    """A whole LSTM with its numbers: `(batch, steps, features)` to `(batch, steps, units)`.

    In the file it is one operator. Here it is computed in floats that are rounded at the operator's
    places, up to the roundings between its products.

    Args:
        gates: the numbers of each of `GATES`.
        source, carry, result: grids of the input, the carry and the output.
    """

    kind = RecurrenceKind.FUSED

    def __init__(
        self,
        gates: Mapping[str, GateNumbers],
        *,
        source: Site,
        carry: Site,
        result: Site,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.gates = dict(gates)
        self.source, self.carry, self.result = source, carry, result
        self.units = len(gates["input"].bias)
        self.states = [
            LstmState(kind, self.units, dtype="float32", name=f"{self.name}_{kind}")
            for kind in LstmState.KINDS
        ]

    def build(self, input_shape: Any) -> None:
        """Gives both states their weights."""
        before = (input_shape[0], self.units)
        for state in self.states:
            state.build([(input_shape[0], input_shape[-1]), before, before])
            state.set_weights([a for gate in state.gates for a in self.gates[gate].values()])

    def call(self, x: Any) -> Any:
        """The outputs of all steps, from zero states."""
        carry, output = self.states
        h = c = ops.zeros((ops.shape(x)[0], self.units))
        outputs = []
        for step in ops.unstack(x, axis=1):
            c = self.carry.rounded(carry.rounded([step, h, c]))
            h = self.result.rounded(output.rounded([step, h, c]))
            outputs.append(h)
        return ops.stack(outputs, axis=1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """`(batch, steps, units)`."""
        return (*input_shape[:2], self.units)
