"""Each operator's arithmetic is its kernel's: no integer differs, on any runtime."""

import warnings

import keras
import numpy as np
import pytest

import kqat
import tflite_export
from benchmarks import op_probe
from benchmarks.op_probe import NOT_EXACT, files
from tflite_export.flatbuffer import read
from tflite_export.integer_model import supported
from tflite_export.kernels import OP_TABLE
from tflite_export.runtimes.execution import run, supports
from tflite_export.verification.exactness import exactness
from tflite_export.verification.site_tensors import SiteTensors
from tflite_export.verification.verifier import DEFAULT_RUNTIMES

# Those that differed most from the float graph: 13 % and 33 % of the values by a step. All others
# are compared in `tests/benchmarks/test_op_probe.py`, with the same files and data.
SAMPLE = ("LEAKY_RELU", "MEAN")


def check(operator: str) -> None:
    for probed in files(operator):
        precision = probed.precision
        if (operator, precision.activations, precision.weights) in NOT_EXACT:
            continue
        model = read(probed.blob)
        x = probed.data if isinstance(probed.data, list) else [probed.data]
        feeds = SiteTensors(model, probed.frozen).feeds(x)
        for runtime in DEFAULT_RUNTIMES:
            if runtime not in op_probe_runs(operator, precision):
                continue
            computed = run(probed.blob, feeds, runtime=runtime, tensors="all").tensors
            assert str(exactness(model, computed, runtime)).startswith("exact: all"), precision


def op_probe_runs(operator: str, precision: op_probe.Precision) -> set[str]:
    """The runtimes on which the table says that this runs; others may end the process."""
    return {
        cell.runtime
        for cell in op_probe.read_table()
        if (cell.operator, cell.activations) == (operator, precision.activations)
        and (cell.weights, cell.scales) == (precision.weights or "", precision.scales or "")
        and cell.result != "refuses"
    }


@pytest.mark.skipif(not supports("tflite_micro"), reason="needs the extra tflm")
@pytest.mark.parametrize("operator", SAMPLE)
def test_no_integer_differs(operator: str) -> None:
    check(operator)


@pytest.mark.skipif(not supports("tflite_micro"), reason="needs the extra tflm")
def test_elu_of_tiny_values_is_the_kernels() -> None:
    """TFLite Micro subtracts one from a float32 near one, of which 2**-24 is left."""
    x = keras.Input((64,), name="x")
    model = keras.Model(x, keras.layers.ELU(name="elu")(x))
    data = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32) * 2e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kqat.CalibrationWarning)
        qat = kqat.quantize_model(model, calibration_data=data)
    blob = tflite_export.convert(qat)
    for part in tflite_export.verify(qat, blob, data, runtimes=["litert", "tflite_micro"]).runtimes:
        assert part.by_operator()["ELU"].elements and part.exact is not None
        assert part.exact.is_exact, part.runtime


def test_packed_convolutions_round_as_the_optimized_kernels() -> None:
    """XNNPACK leaves them to LiteRT: of 13 channels eight are rounded together, of groups none."""
    image = keras.Input((6, 6, 16), name="x")
    outputs = [
        keras.layers.Conv2D(13, 3)(image),
        keras.layers.DepthwiseConv2D(3)(image),
        keras.layers.DepthwiseConv2D(3)(image[..., :13]),
        keras.layers.Conv2D(8, 3, groups=2)(image),
    ]
    keras.utils.set_random_seed(0)
    data = np.random.default_rng(0).normal(size=(32, 6, 6, 16)).astype(np.float32)
    qat = kqat.quantize_model(keras.Model(image, outputs), "w4a8", calibration_data=data)
    blob = tflite_export.convert(qat)
    (part,) = tflite_export.verify(qat, blob, data, runtimes=["litert"]).runtimes
    assert str(part.exact).startswith("exact: all"), part.exact


def test_every_row_of_the_op_table_has_its_arithmetic() -> None:
    assert set(OP_TABLE) - set(supported()) == set()


def test_what_is_not_exact_is_known() -> None:
    """The kept table; `--only LEAKY_RELU` measures again."""
    inexact = {
        (cell.operator, cell.activations, cell.weights, cell.runtime)
        for cell in op_probe.read_table()
        if cell.differing
    }
    known = {
        key
        for key in inexact
        if key[:3] in NOT_EXACT or (*key[:2], key[3]) in op_probe.NOT_EXACT_ON
    }
    assert inexact == known
    assert {key[:3] for key in inexact} - {("DEQUANTIZE", "int8", "")} == set(NOT_EXACT)
    # Whatever runs was compared.
    ran = [cell for cell in op_probe.read_table() if cell.result != "refuses"]
    assert [cell.key for cell in ran if cell.differing is None] == []
