"""The NumPy arithmetic of UNIDIRECTIONAL_SEQUENCE_LSTM is that of each runtime, bit for bit."""

from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from kqat.kernels import lstm_arithmetic
from kqat.kernels.lstm_arithmetic import Numbers, run_lstm
from kqat.parts.lstm_step import GATES
from tflite_export import flatbuffer
from tflite_export.runtimes.execution import run, supports

SAMPLES, FEATURES, UNITS = 8, 6, 8
INT8, INT16, INT32 = schema.TensorType.INT8, schema.TensorType.INT16, schema.TensorType.INT32
RUNTIMES = ("litert_reference", "litert_builtin", "litert", "tflite_micro")
# Steps, binary logarithm of the carry's scale, zero points of input and output, size of weights.
# The powers are all that LiteRT takes: from -15, where tanh's input is no wider than its output, to
# -9; the largest weights saturate sums, gates and the carry.
CASES = (
    (1, -12, 5, 0, 1.0),
    (2, -15, 0, 3, 1.0),
    (5, -14, -128, -7, 2.0),
    (5, -13, 127, 0, 8.0),
    (28, -11, 5, -20, 2.0),
    (28, -10, 5, 11, 1.0),
    (100, -9, -3, -7, 4.0),
)


def _numbers(power: int, zeros: tuple[int, int], size: float, rng: np.random.Generator) -> Numbers:
    def kernels(columns: int) -> dict[str, np.ndarray]:
        return {g: rng.integers(-127, 128, (UNITS, columns)).astype(np.int8) for g in GATES}

    def scales() -> dict[str, np.float32]:
        return {g: np.float32(size * rng.uniform(0.005, 0.01)) for g in GATES}

    kernel_scales, source = scales(), np.float32(0.0213)
    biases = {g: rng.normal(0, 0.5, UNITS) / (source * kernel_scales[g]) for g in GATES}
    return Numbers(
        kernels=kernels(FEATURES),
        kernel_scales=kernel_scales,
        recurrent_kernels=kernels(UNITS),
        recurrent_scales=scales(),
        biases={gate: np.rint(bias).astype(np.int32) for gate, bias in biases.items()},
        input_scale=source,
        input_zero_point=zeros[0],
        output_scale=np.float32(0.0071),
        output_zero_point=zeros[1],
        carry_power=power,
    )


class _File:
    """A file of one operator, made here from the schema alone."""

    def __init__(self, numbers: Numbers, steps: int):
        self.model = flatbuffer.ModelT()
        self.model.version, self.model.buffers = 3, [schema.BufferT()]
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.model.subgraphs = [], [self.graph]
        n = numbers
        source, result = (n.input_scale, n.input_zero_point), (n.output_scale, n.output_zero_point)
        x = self.tensor((1, steps, FEATURES), INT8, source)
        weights = [self.tensor((), INT8, (n.kernel_scales[g], 0), n.kernels[g]) for g in GATES]
        weights += [
            self.tensor((), INT8, (n.recurrent_scales[g], 0), n.recurrent_kernels[g]) for g in GATES
        ]
        biases = [
            self.tensor((), INT32, (n.input_scale * n.kernel_scales[g], 0), n.biases[g])
            for g in GATES
        ]
        h = self.tensor((1, UNITS), INT8, result)
        c = self.tensor((1, UNITS), INT16, (2.0**n.carry_power, 0))
        for state in (h, c):
            self.graph.tensors[state].isVariable = True
        y = self.tensor((1, steps, UNITS), INT8, result)
        operator = schema.OperatorT()
        operator.opcodeIndex = 0
        operator.inputs = [x, *weights, -1, -1, -1, *biases, -1, -1, h, c, -1, -1, -1, -1]
        operator.outputs = [y]
        operator.intermediates = [self.tensor((0,), INT8, result) for _ in range(5)]
        operator.builtinOptionsType = schema.BuiltinOptions.UnidirectionalSequenceLSTMOptions
        operator.builtinOptions = schema.UnidirectionalSequenceLSTMOptionsT()
        operator.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.TANH
        code = schema.OperatorCodeT()
        code.builtinCode = schema.BuiltinOperator.UNIDIRECTIONAL_SEQUENCE_LSTM
        code.deprecatedBuiltinCode, code.version = code.builtinCode, 1
        self.model.operatorCodes, self.graph.operators = [code], [operator]
        self.graph.inputs, self.graph.outputs = [x], [y]

    def tensor(
        self, shape: tuple[int, ...], kind: int, grid: Any, data: np.ndarray | None = None
    ) -> int:
        tensor = schema.TensorT()
        tensor.type, tensor.buffer, tensor.name = kind, 0, f"t{len(self.graph.tensors)}"
        tensor.shape = shape if data is None else data.shape
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale, tensor.quantization.zeroPoint = [grid[0]], [grid[1]]
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = data.tobytes()
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1


@pytest.mark.parametrize(("steps", "power", "source", "result", "size"), CASES)
def test_equals_the_runtimes(steps: int, power: int, source: int, result: int, size: float) -> None:
    rng = np.random.default_rng(steps)
    numbers = _numbers(power, (source, result), size, rng)
    blob = flatbuffer.write(_File(numbers, steps).model)
    x = np.clip(rng.normal(0, 50, (SAMPLES, steps, FEATURES)), -128, 127).astype(np.int8)
    for runtime in filter(supports, RUNTIMES):
        found = run(blob, [x], runtime=runtime).outputs[0]
        np.testing.assert_array_equal(run_lstm(numbers, x, runtime), found, err_msg=runtime)


def test_runtimes_drift_apart() -> None:
    """Why each has an arithmetic of its own: over 100 steps one step of difference grows."""
    rng = np.random.default_rng(100)
    numbers = _numbers(-11, (5, -7), 2.0, rng)
    x = np.clip(rng.normal(0, 50, (64, 100, FEATURES)), -128, 127).astype(np.int8)
    micro, litert = (
        run_lstm(numbers, x, runtime).astype(int) for runtime in ("tflite_micro", "litert")
    )
    assert np.abs(micro - litert).max() > 1


def _of_one(code: int, kind: int, count: int, source: float, result: float) -> bytes:
    """A file of one operator without options: `count` numbers of a type, of two scales."""
    model, graph, operator = schema.ModelT(), schema.SubGraphT(), schema.OperatorT()
    graph.tensors = []
    for scale in (source, result):
        tensor = schema.TensorT()
        tensor.type, tensor.buffer, tensor.shape = kind, 0, (1, count)
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale, tensor.quantization.zeroPoint = [scale], [0]
        graph.tensors.append(tensor)
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0], [1]
    operators = schema.OperatorCodeT()
    operators.builtinCode = operators.deprecatedBuiltinCode = code
    operators.version = 3
    graph.inputs, graph.outputs, graph.operators = [0], [1], [operator]
    model.version, model.buffers = 3, [schema.BufferT()]
    model.subgraphs, model.operatorCodes = [graph], [operators]
    return flatbuffer.write(model)


def test_the_micro_table_is_read_back_by_its_operators() -> None:
    """All that the table of sigmoid is used for, at all 65,536 inputs."""
    x = np.arange(-(2**15), 2**15, dtype=np.int16)[None]
    operators = schema.BuiltinOperator
    logistic = _of_one(operators.LOGISTIC, INT16, x.size, 2.0**-12, 2.0**-15)
    found = run(logistic, [x], runtime="tflite_micro").outputs[0]
    np.testing.assert_array_equal(lstm_arithmetic._micro_sigmoid(x.astype(np.int64)), found)
    for power in (-15, -12, -9):
        tanh = _of_one(operators.TANH, INT16, x.size, 2.0**power, 2.0**-15)
        found = run(tanh, [x], runtime="tflite_micro").outputs[0]
        np.testing.assert_array_equal(lstm_arithmetic._micro_tanh(x.astype(np.int64), power), found)
