"""The op table: a new operator is one row, and whoever asks about operators asks there."""

import dataclasses
import math
from pathlib import Path

import keras
import numpy as np
import pytest

import kqat
import tflite_export
from benchmarks import op_probe
from kqat.base.errors import LoweringError
from kqat.devices.kernels import INT16
from kqat.freezing.frozen_model import FrozenModel
from kqat.registry.layer_table import REGISTERED
from kqat.registry.rule import LayerRule, Output
from tests.tflite_export.small_models import operators
from tflite_export import flatbuffer
from tflite_export.devices import edge_tpu_file
from tflite_export.kernels.op_table import OP_TABLE, OpRule, fixed_output, kernel_version
from tflite_export.runtimes.execution import supports


@keras.saving.register_keras_serializable("test_op_table")
class Magnitude(keras.layers.Layer):
    """|x|, which the converter makes an ABS of, an operator that the table does not have."""

    def call(self, x):  # type: ignore[no-untyped-def]
        return keras.ops.abs(x)


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> FrozenModel:
    monkeypatch.setitem(REGISTERED, Magnitude, LayerRule(output=Output.OWN, ops=("ABS",)))
    image = keras.Input((6, 4), name="image")
    model = keras.Model(image, Magnitude(name="size")(image), name="net")
    x = np.random.default_rng(0).normal(size=(32, 6, 4)).astype(np.float32)
    return kqat.freeze(kqat.quantize_model(model, calibration_data=x))


# Versions of ABS: TensorFlow's `lite/tools/versioning/op_version.cc`.
ABS = OpRule(
    scales="own",
    version=2,
    macs=lambda inputs, result: 7 * math.prod(result),
    resolver_method="AddAbsolutely",
)


def test_a_new_operator_is_one_row(
    frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(LoweringError, match=r"op table\. Received: ABS, .*add a row"):
        tflite_export.convert(frozen)
    monkeypatch.setitem(OP_TABLE, "ABS", ABS)
    # The integer pass.
    blob = tflite_export.convert(frozen)
    model = flatbuffer.read(blob)
    assert operators(model) == ["ABS"]
    assert model.operatorCodes[0].version == 2
    # What it computes.
    data = np.random.default_rng(1).normal(size=(8, 6, 4)).astype(np.float32)
    (part,) = tflite_export.verify(frozen, blob, data, runtimes=["litert"]).runtimes
    assert (part.problem, part.unmatched) == (None, ()) and part.max_steps <= 1
    # The inspection of files. A multiply-accumulate needs two operands.
    (found,) = tflite_export.inspect(blob).operators
    assert (found.name, found.macs, found.weight_dtype) == ("ABS", 0, None)
    twice = flatbuffer.read(blob)
    operator = twice.subgraphs[0].operators[0]
    operator.inputs = [operator.inputs[0], operator.inputs[0]]
    monkeypatch.setitem(OP_TABLE, "ABS", dataclasses.replace(ABS, weights=1))
    (found,) = tflite_export.inspect(flatbuffer.write(twice)).operators
    assert (found.macs, found.weight_dtype) == (7 * 6 * 4, "int8")
    # The Edge TPU's limits, of an operator that it is said to have.
    reader = edge_tpu_file._Reader(twice, twice.subgraphs[0].tensors)
    assert "has weights that are not constants" in "".join(reader.read(operator))
    # The C++ resolver.
    if supports("tflite_micro"):
        source = tflite_export.to_c(blob, tmp_path, samples=1)
        assert "resolver.AddAbsolutely()" in source.files[2].read_text()
    # The probe of kernels, which asks for a model of it.
    with pytest.raises(AssertionError, match=r"a model in MODELS .* none for \['ABS'\]"):
        op_probe.probed_operators()
    monkeypatch.setitem(op_probe.MODELS, "ABS", op_probe.MODELS["RELU"])
    assert op_probe.probed_operators()[-1] == "ABS"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scales": "same"}, "one scale around ABS"),
        ({"scales": "fixed", "fixed": (1 / 256, -128)}, r"zero point \(0.00390625, -128\) from A"),
        ({"least_input_scale": 10.0}, "a scale above 10 into ABS"),
        ({"input_scale_below": 2.0**-20}, "a scale below 9.5.*into ABS"),
    ],
    ids=["same", "fixed", "least", "below"],
)
def test_the_checks_read_the_row(
    changes: dict, match: str, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OP_TABLE, "ABS", dataclasses.replace(ABS, **changes))
    with pytest.raises(LoweringError, match=match):
        tflite_export.convert(frozen)


def test_a_row_may_ship_as_another_operator(
    frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OP_TABLE, "ABS", dataclasses.replace(ABS, ships_as="NEG", version=5))
    # No runtime has such a kernel, so the file is not loaded.
    monkeypatch.setattr("tflite_export.exporter._check_loads", lambda blob, name: None)
    model = flatbuffer.read(tflite_export.convert(frozen))
    assert operators(model) == ["NEG"] and model.operatorCodes[0].version == 5


def test_the_scales_that_kernels_fix_are_those_of_the_registry() -> None:
    """The specification of TFLite's 8-bit quantization; 16 bits as the kernels' sources have them.

    A range that the planner gives an output must have the scale that the kernel writes.
    """
    from kqat.registry.layer_table import ACTIVATIONS, LAYERS

    seen = set()
    for row in (*LAYERS.values(), *ACTIVATIONS.values()):
        for op in row.ops if row.fixed_range is not None else ():
            for bits in (8, 16) if op in INT16 else (8,):
                fixed = fixed_output(op, bits)
                assert fixed is not None, op
                low, high = row.range_at(bits)
                scale, zero_point = fixed
                lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
                if bits == 8:
                    assert low == (lowest - zero_point) * scale, op
                assert high == pytest.approx((highest - zero_point) * scale, rel=1e-12), op
                seen.add(op)
    assert {"SOFTMAX", "LOGISTIC", "TANH", "LOG_SOFTMAX"} <= seen


def test_versions_at_sixteen_bits_are_those_of_the_kernels_there() -> None:
    assert [kernel_version("GATHER", bits) for bits in (8, 16)] == [2, 4]
    assert [kernel_version("CONV_2D", bits) for bits in (8, 16)] == [3, 3]
    assert fixed_output("LOGISTIC", 16) == (2.0**-15, 0)
    assert fixed_output("L2_NORMALIZATION", 16) == fixed_output("L2_NORMALIZATION", 8)
