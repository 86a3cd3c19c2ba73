"""Four-bit weights: packed where the target's kernels take them, int8 where one does not."""

from typing import Any

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers

import kqat
import tflite_export
from kqat.devices import stored_bits
from kqat.devices.kernels import RUNTIMES
from tflite_export import flatbuffer
from tflite_export.kernels.op_table import OP_TABLE
from tflite_export.kernels.weight_layout import PACKED_TYPES, pack, unpack

ONE_SCALE = kqat.QuantizeConfig(
    weights=kqat.QuantSpec(bits=4, symmetric=True, narrow_range=True, axis=None)
)
INT4, INT8 = schema.TensorType.INT4, schema.TensorType.INT8

# Operator -> a layer that becomes it, and the shape of its input.
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "CONV_2D": (lambda: layers.Conv2D(5, 3, bias_initializer="ones"), (6, 6, 3)),
    "DEPTHWISE_CONV_2D": (lambda: layers.DepthwiseConv2D(3, bias_initializer="ones"), (6, 6, 3)),
    "FULLY_CONNECTED": (lambda: layers.Dense(5, bias_initializer="ones"), (17,)),
}


@given(hnp.arrays(np.int8, st.integers(0, 33), elements=st.integers(-8, 7)))
def test_packing_keeps_every_integer(integers: np.ndarray) -> None:
    packed = pack(integers, 4)
    assert packed.size == (integers.size + 1) // 2
    halves = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(-1).astype(np.int8)
    unpacked = np.where(halves > 7, halves - 16, halves)[: integers.size]
    np.testing.assert_array_equal(unpacked, integers)


@pytest.mark.parametrize("bits", PACKED_TYPES)
@given(st.data())
def test_unpacking_is_its_inverse(bits: int, data: st.DataObject) -> None:
    elements = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    integers = data.draw(hnp.arrays(np.int8, st.integers(0, 33), elements=elements))
    packed = pack(integers, bits)
    assert packed.size == -(-integers.size * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, integers.shape), integers)


def test_every_row_with_int4_has_a_layer() -> None:
    assert set(LAYERS) == {name for name, rule in OP_TABLE.items() if rule.packing(4).per_tensor}


def _weights(blob: bytes) -> list[int]:
    model = flatbuffer.read(blob)
    tensors = model.subgraphs[0].tensors
    return [
        tensors[int(op.inputs[1])].type
        for op in model.subgraphs[0].operators
        if flatbuffer.op_name(model, op) in LAYERS
    ]


def test_a_matrix_of_many_scales_ships_as_a_convolution() -> None:
    x = np.random.default_rng(0).normal(size=(16, 40)).astype(np.float32)
    inputs = keras.Input((40,), name="x")
    wide = layers.Dense(60, activation="relu", bias_initializer="ones", name="wide")(inputs)
    model = keras.Model(inputs, layers.Dense(40, name="end")(wide))
    frozen = kqat.freeze(kqat.quantize_model(model, "w4a8", calibration_data=x))
    blob = tflite_export.convert(frozen, batch_size=2)
    counts = tflite_export.inspect(blob).counts()
    assert counts == {"CONV_2D": 2, "RESHAPE": 4}
    assert _weights(blob) == [INT4, INT4]
    report = tflite_export.verify(frozen, blob, x, runtimes=tflite_export.RUNTIMES)
    for part in report.runtimes:
        # One step: kernels round twice where float arithmetic rounds once.
        assert (part.problem, part.unmatched, part.max_steps <= 1) == (None, (), True)
        assert {site.operator for site in part.sites if site.name in ("wide", "end")} == {"CONV_2D"}
    assert [(row.operator, row.macs) for row in report.layers if row.macs] == [
        ("CONV_2D", 2 * 40 * 60), ("CONV_2D", 2 * 60 * 40)
    ]  # fmt: skip
    litert = tflite_export.convert(frozen, target="litert")
    assert tflite_export.inspect(litert).counts() == {"FULLY_CONNECTED": 2}
    assert len(litert) < len(blob) < len(tflite_export.convert(frozen, target="ethos_u55"))


@pytest.mark.parametrize("operator", LAYERS)
@pytest.mark.parametrize("config", ["w4a8", ONE_SCALE], ids=["per channel", "per tensor"])
def test_packed_where_all_kernels_take_it(operator: str, config: Any) -> None:
    make, shape = LAYERS[operator]
    model = keras.Sequential([keras.Input(shape), make()])
    x = np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
    qat = kqat.quantize_model(model, config, calibration_data=x)
    blob = tflite_export.convert(qat)
    rule = OP_TABLE[operator]
    everywhere = rule.packs(4, config != "w4a8", RUNTIMES)
    assert _weights(blob) == [INT4 if everywhere else INT8]
    packed = tflite_export.convert(qat, target="litert", weights="packed")
    assert _weights(packed) == [INT4]
    # Only FULLY_CONNECTED is as fast packed.
    fast = INT4 if operator == "FULLY_CONNECTED" else INT8
    assert _weights(tflite_export.convert(qat, target="litert")) == [fast]
    assert _weights(tflite_export.convert(qat, weights="unpacked")) == [INT8]
    report = tflite_export.verify(qat, blob, x, runtimes=tflite_export.RUNTIMES)
    # One step: kernels round twice where float arithmetic rounds once.
    assert [(part.problem, part.max_steps <= 1) for part in report.runtimes] == [(None, True)] * 4


def test_how_weights_are_stored_is_asked_for_by_name() -> None:
    x = np.random.default_rng(0).normal(size=(16, 40)).astype(np.float32)
    model = keras.Sequential([keras.Input((40,)), layers.Dense(60)])
    frozen = kqat.freeze(kqat.quantize_model(model, "w4a8", calibration_data=x))
    with pytest.raises(kqat.ExportError, match=r"'unpacked' or None\. Received: 'int4'"):
        tflite_export.convert(frozen, weights="int4")
    with pytest.raises(kqat.TargetError, match=r"\['cmsis_nn', 'litert', 'tflite_micro'\] with"):
        tflite_export.convert(frozen, target="ethos_u55", weights="packed")
    # Nothing is computed by a convolution for the sake of packing, either.
    counts = tflite_export.inspect(tflite_export.convert(frozen, weights="unpacked")).counts()
    assert counts == {"FULLY_CONNECTED": 1}


def test_the_bits_that_are_stored_are_foretold() -> None:
    table = [
        (["CONV_2D"], 4, False, 8, "litert", 8),
        (["CONV_2D"], 3, False, 8, "cmsis_nn", 4),
        (["CONV_2D"], 2, False, 8, None, 4),
        (["CONV_2D"], 4, False, 16, "litert", 4),
        (["FULLY_CONNECTED"], 2, False, 8, "litert", 2),
        (["FULLY_CONNECTED"], 2, False, 8, "tflite_micro", 4),
        (["FULLY_CONNECTED"], 4, False, 8, "ethos_u55", 8),
        (["FULLY_CONNECTED"], 5, False, 8, "litert", 8),
        (["TRANSPOSE_CONV"], 4, False, 8, "litert", 8),
    ]
    for ops, bits, single, width, target, want in table:
        device = None if target is None else kqat.TARGETS[target]
        assert stored_bits(ops, bits, single, width, device) == want, (ops, bits, width, target)
