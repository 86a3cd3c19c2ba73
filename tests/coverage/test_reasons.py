"""Why some kernels differ from the trained model more often: NumPy copies of their arithmetic.

`test_contract.SHARES` allows MEAN, LEAKY_RELU and QUANTIZE more differing elements than other
operators. These copies give their results bit for bit.
"""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from tests.coverage import graph_cases
from tests.coverage.cases import Case, functional, inputs_of
from tflite_export import flatbuffer
from tflite_export.runtimes.execution import run

TWICE = ("litert_reference", "tflite_micro")


@dataclasses.dataclass(frozen=True)
class Seen:
    """What an operator read (its zero point taken off) and wrote, and the grids of both."""

    x: np.ndarray
    y: np.ndarray
    scales: tuple[np.float64, np.float64]
    zero_point: int


def seen(case: Case, operator: str, runtime: str) -> Seen:
    keras.utils.set_random_seed(0)
    model = case.model()
    x = inputs_of(model, 64)
    # For LiteRT alone: for TFLite Micro no LEAKY_RELU ships.
    qat = kqat.quantize_model(model, calibration_data=x)
    blob = tflite_export.convert(qat, target="litert")
    file = flatbuffer.read(blob)
    graph = file.subgraphs[0]
    op = next(op for op in graph.operators if flatbuffer.op_name(file, op) == operator)
    grids = [graph.tensors[i].quantization for i in (graph.inputs[0], op.inputs[0], op.outputs[0])]
    scales = [np.float64(grid.scale[0]) for grid in grids]
    zeros = [int(grid.zeroPoint[0]) for grid in grids]
    integers = np.clip(np.rint(x / scales[0]) + zeros[0], -128, 127).astype(np.int8)
    tensors = run(blob, [integers], runtime=runtime, tensors="all").tensors
    read, written = (tensors[int(i)].astype(np.int64) for i in (op.inputs[0], op.outputs[0]))
    return Seen(read - zeros[1], written, (scales[1], scales[2]), zeros[2])


def multiplier(ratio: np.float64) -> tuple[int, int]:
    """`ratio` as 31 bits and a shift to the left, as TFLite's QuantizeMultiplier has it."""
    mantissa, shift = np.frexp(ratio)
    return int(np.rint(mantissa * 2**31)), int(shift)


def twice_rounded(x: np.ndarray, mantissa: int, shift: int) -> np.ndarray:
    """TFLite's MultiplyByQuantizedMultiplier with gemmlowp's rounding: two of them."""
    product = x * 2 ** max(shift, 0) * mantissa
    high = np.where(product >= 0, (product + 2**30) >> 31, -((-product + 2**30 - 1) >> 31))
    right = max(-shift, 0)
    return np.sign(high) * ((np.abs(high) + (1 << right >> 1)) >> right)


def once_rounded(x: np.ndarray, factor: np.float64) -> np.ndarray:
    """XNNPACK's products with 8 bits behind the point."""
    return (x * int(np.rint(256 * factor)) + 128) >> 8


def on_grid(y: np.ndarray, kernel: Seen) -> np.ndarray:
    return np.clip(y + kernel.zero_point, -128, 127)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", TWICE)
@pytest.mark.parametrize("steps", [5, 8, 64])
def test_mean_rounds_twice(steps: int, runtime: str) -> None:
    case = Case(
        name="mean",
        build=lambda: functional((steps, 16), lambda x: L.GlobalAveragePooling1D()(x)),
        ops={},
    )
    kernel = seen(case, "MEAN", runtime)
    mantissa, shift = multiplier(kernel.scales[0] / kernel.scales[1])
    # The number of elements is divided into the multiplier, its power of two into the shift.
    power = steps.bit_length() - 1
    mantissa, shift = (mantissa << power) // steps, shift - power
    y = twice_rounded(kernel.x.sum(axis=1), mantissa, shift)
    np.testing.assert_array_equal(on_grid(y, kernel), kernel.y)


def leaky_relu() -> Case:
    return Case(
        name="leaky_relu",
        build=lambda: functional((64,), lambda x: L.LeakyReLU(0.2)(x)),
        ops={},
    )


@pytest.mark.slow
@pytest.mark.parametrize("runtime", TWICE)
def test_leaky_relu_rounds_twice(runtime: str) -> None:
    kernel = seen(leaky_relu(), "LEAKY_RELU", runtime)
    ratio, slope = kernel.scales[0] / kernel.scales[1], np.float64(np.float32(0.2))
    above, below = (twice_rounded(kernel.x, *multiplier(f * ratio)) for f in (1.0, slope))
    np.testing.assert_array_equal(on_grid(np.where(kernel.x >= 0, above, below), kernel), kernel.y)


@pytest.mark.slow
def test_leaky_relu_of_xnnpack_has_eight_bits_behind_the_point() -> None:
    kernel = seen(leaky_relu(), "LEAKY_RELU", "litert")
    ratio = kernel.scales[0] / kernel.scales[1]
    above, below = once_rounded(kernel.x, ratio), once_rounded(kernel.x, 0.2 * ratio)
    np.testing.assert_array_equal(on_grid(np.where(kernel.x >= 0, above, below), kernel), kernel.y)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [*TWICE, "litert"])
def test_quantize(runtime: str) -> None:
    case = next(case for case in graph_cases.CASES if case.name == "fixed_and_own")
    kernel = seen(case, "QUANTIZE", runtime)
    ratio = kernel.scales[0] / kernel.scales[1]
    if runtime == "litert":
        y = once_rounded(kernel.x, ratio)
    else:
        y = twice_rounded(kernel.x, *multiplier(ratio))
    np.testing.assert_array_equal(on_grid(y, kernel), kernel.y)
