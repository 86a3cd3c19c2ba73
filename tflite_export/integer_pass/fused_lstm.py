"""A trained LSTM as one UNIDIRECTIONAL_SEQUENCE_LSTM.

The operator has 24 inputs: the sequence, four kernels, four recurrent kernels, four biases, and two
states: variables that it changes and that keep their values between invocations. The inputs that
are left out (peepholes, a projection, layer normalization) belong to variants that Keras does not
have. LiteRT reads the output's scale from the last of five empty tensors (the intermediates),
TFLite Micro from the output state.
"""

from typing import Any

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.freezing import GATES, FrozenLSTM, GateNumbers
from kqat.kernels import Numbers, run_lstm
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import TENSOR_TYPES, Weights, fit_bias, quantization

_LEFT_OUT = -1


def numbers(layer: FrozenLSTM) -> Numbers:
    """The integers that a trained LSTM ships with."""
    gates = {name: _fitted(gate, layer.source.scale) for name, gate in layer.gates.items()}
    return Numbers(
        kernels={name: weights.integers for name, (weights, _) in gates.items()},
        kernel_scales={name: weights.scale[0] for name, (weights, _) in gates.items()},
        recurrent_kernels={name: gate.recurrent.T for name, gate in layer.gates.items()},
        recurrent_scales={name: gate.recurrent_scale for name, gate in layer.gates.items()},
        biases={name: bias for name, (_, bias) in gates.items()},
        input_scale=layer.source.scale,
        input_zero_point=layer.source.zero_point,
        output_scale=layer.result.scale,
        output_zero_point=layer.result.zero_point,
        carry_power=int(np.log2(layer.carry.scale)),
    )


def call_layer(layer: Any, runtime: str, *args: Any, **kwargs: Any) -> Any:
    """The output of a layer of a frozen model; of a fused LSTM, bit for bit that of the runtime."""
    if not isinstance(layer, FrozenLSTM):
        return layer(*args, **kwargs)
    integers = layer.source.integers(np.asarray(args[0])).astype(np.int8)
    outputs = run_lstm(numbers(layer), integers, runtime)
    return keras.ops.convert_to_tensor(layer.result.reals(outputs))


def _fitted(gate: GateNumbers, input_scale: np.float32) -> tuple[Weights, np.ndarray]:
    weights = Weights(np.ascontiguousarray(gate.kernel.T), np.reshape(gate.kernel_scale, 1), 0)
    weights, bias = fit_bias(weights, gate.bias, input_scale)
    return weights, bias.integers


def insert_lstms(draft: Draft) -> None:
    """Gives the placeholders of `labels.lstms` their weights, states and options."""
    for operator, index in draft.labels.lstms:
        _complete(draft.model, operator, draft.frozen.lstms[index])


def _complete(model: ModelT, operator: OperatorT, layer: FrozenLSTM) -> None:
    values = numbers(layer)
    graph = model.subgraphs[0]
    batch_size = flatbuffer.tensor_shape(graph.tensors[operator.outputs[0]])[0]

    def add(name: str, data: np.ndarray, scale: Any) -> int:
        return _tensor(model, f"{layer.name}/{name}", data.shape, data.dtype, scale, data=data)

    kernels = [add(f"{g}_kernel", values.kernels[g], values.kernel_scales[g]) for g in GATES]
    recurrent = [
        add(f"{g}_recurrent", values.recurrent_kernels[g], values.recurrent_scales[g])
        for g in GATES
    ]
    biases = [
        add(f"{g}_bias", values.biases[g], values.input_scale * values.kernel_scales[g])
        for g in GATES
    ]
    states = [
        _tensor(model, f"{layer.name}/{name}", (batch_size, layer.units), dtype, scale, zero_point)
        for name, dtype, scale, zero_point in (
            ("output_state", np.int8, values.output_scale, values.output_zero_point),
            ("carry_state", np.int16, layer.carry.scale, 0),
        )
    ]
    for state in states:
        graph.tensors[state].isVariable = True
    grid = values.output_scale, values.output_zero_point
    operator.intermediates = [
        _tensor(model, f"{layer.name}/inside_{i}", (0,), np.int8, *grid) for i in range(5)
    ]
    source = int(operator.inputs[0])
    none = [_LEFT_OUT]
    operator.inputs = [
        source, *kernels, *recurrent, *none * 3, *biases, *none * 2, *states, *none * 4
    ]  # fmt: skip
    operator.builtinOptionsType = schema.BuiltinOptions.UnidirectionalSequenceLSTMOptions
    operator.builtinOptions = schema.UnidirectionalSequenceLSTMOptionsT()
    operator.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.TANH


def _tensor(
    model: ModelT,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    scale: Any,
    zero_point: int = 0,
    *,
    data: np.ndarray | None = None,
) -> int:
    kind, grid = TENSOR_TYPES[np.dtype(dtype)], quantization([scale], [zero_point], 0)
    return flatbuffer.add_tensor(model, shape, kind, name=name, grid=grid, data=data)
