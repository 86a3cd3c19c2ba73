"""Functions as tables: exact on every runtime, and a kernel of its own where the target has one."""

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.devices.kernels import TABLE_OPS
from kqat.freezing.freezer import freeze
from kqat.grids.site import Site
from kqat.parts.markers import Tabulated
from tflite_export import flatbuffer


def _qat(function: str) -> tuple[keras.Model, np.ndarray]:
    x = np.linspace(-6.0, 6.0, 256 * 4, dtype=np.float32).reshape(256, 4)
    model = keras.Sequential([keras.Input((4,)), layers.Activation(function)])
    return kqat.quantize_model(model, calibration_data=x), x


def _operators(blob: bytes) -> list[str]:
    model = flatbuffer.read(blob)
    return [flatbuffer.op_name(model, op) for op in model.subgraphs[0].operators]


def test_a_table_holds_the_function_of_every_integer() -> None:
    source, result = (
        Site("x", np.float32(0.05), -3, 8, (1,)),
        Site("y", np.float32(0.02), -100, 8, (1,)),
    )
    table = Tabulated(layers.Activation("mish"), 0).lookup(source, result)
    x = (np.arange(-128, 128) + 3) * np.float64(np.float32(0.05))
    mish = x * np.tanh(np.log1p(np.exp(x)))
    expected = np.clip(np.floor(mish / np.float64(np.float32(0.02)) + 0.5) - 100, -128, 127)
    np.testing.assert_array_equal(table, expected)


def test_a_table_is_computed_at_the_shape_of_the_layer() -> None:
    """A function of each number may read how many channels there are; 256 is no multiple of 15."""
    source, result = (Site(name, np.float32(0.05), 0, 8, (1,)) for name in ("x", "y"))
    table = Tabulated(layers.Lambda(lambda x: x / x.shape[-1]), 0)
    table(np.zeros((1, 3, 5), np.float32))
    expected = np.floor(np.arange(-128, 128) / 5 + 0.5)
    np.testing.assert_array_equal(table.lookup(source, result), expected)


@pytest.mark.parametrize("function", ["mish", "selu", "softplus", "hard_sigmoid"])
def test_a_function_without_a_kernel_is_exact_on_every_runtime(function: str) -> None:
    qat, x = _qat(function)
    blob = tflite_export.convert(qat, target="tflite_micro")
    assert _operators(blob) == list(TABLE_OPS)
    report = tflite_export.verify(qat, blob, x, samples=256)
    assert report.is_full_integer
    assert [part.max_steps for part in report.runtimes] == [0, 0, 0]


def test_the_target_decides_between_kernel_and_table() -> None:
    qat, _ = _qat("gelu")
    assert _operators(tflite_export.convert(qat, target="litert")) == ["GELU"]
    for target in ("tflite_micro", None):
        assert _operators(tflite_export.convert(qat, target=target)) == list(TABLE_OPS)


def test_tables_are_known_to_the_frozen_model() -> None:
    qat, _ = _qat("gelu")
    (table,) = freeze(qat).tables
    assert table.index == 0
    assert isinstance(table.layer, layers.Activation)
