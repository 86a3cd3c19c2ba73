"""What a conversion for a device does and says."""

import importlib.util
import re
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from kqat.base.errors import TargetError
from kqat.devices.kernels import KERNELS, TABLE_OPS
from tests.tflite_export.small_models import operators, quantized
from tflite_export import flatbuffer
from tflite_export.devices import checks
from tflite_export.kernels.op_table import OP_TABLE

VELA = importlib.util.find_spec("ethosu") is not None


def odd(x: Any) -> Any:
    x = L.Activation("gelu", name="smooth")(L.Conv2D(4, 3, name="conv")(x))
    return L.Dense(3, name="head")(L.Flatten()(L.Activation("mish", name="odd")(x)))


@pytest.fixture(scope="module")
def net() -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(0)
    return quantized((6, 6, 2), odd)


@pytest.mark.parametrize(
    ("target", "slow", "gelu"),
    [
        ("cmsis_nn", None, False), ("ethos_u55", ["odd"], True), ("ethos_u85", None, True),
        ("edge_tpu", ["smooth", "odd"], True),
    ],
)  # fmt: skip
def test_layers_left_to_the_cpu_are_named(
    net: tuple[keras.Model, np.ndarray], target: str, slow: list[str] | None, gelu: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        blob = tflite_export.convert(net[0], target=target)
    said = [str(w.message) for w in caught if w.category is kqat.TargetWarning]
    assert len(said) == (slow is not None)
    for name in slow or ():
        assert f"layer '{name}'" in said[0] and "as kqat.adapt does" in said[0]
    found = operators(flatbuffer.read(blob))
    assert ("GELU" in found) == gelu
    assert found.count("GATHER") == 2 - gelu


def test_weights_of_eight_bits_only_are_not_packed() -> None:
    qat, _ = quantized((6, 6, 2), lambda x: L.Conv2D(4, 3)(x), policy="w4a8")
    frozen = kqat.freeze(qat)
    for target, dtype in (("tflite_micro", "int4"), ("ethos_u55", "int8"), ("edge_tpu", "int8")):
        found = tflite_export.inspect(tflite_export.convert(frozen, target=target))
        assert found.operators[0].weight_dtype == dtype


@pytest.mark.parametrize(
    "options", [{"batch_size": 2}, {"inference_output_type": "float32"}], ids=["batch", "float"]
)
def test_the_edge_tpu_has_rules_of_its_own(options: dict[str, Any]) -> None:
    qat, _ = quantized((4,), L.Dense(2))
    with pytest.raises(TargetError, match="batch of 1 and int8 or uint8 inputs and outputs"):
        tflite_export.convert(qat, target="edge_tpu", **options)
    blob = tflite_export.convert(qat, target="edge_tpu", inference_input_type="uint8")
    assert checks.check_file(blob, tflite_export.inspect(blob), "edge_tpu") == (None, ())


def test_files_are_checked_too(net: tuple[keras.Model, np.ndarray]) -> None:
    blob = tflite_export.convert(net[0], batch_size=2, inference_input_type="float32")
    inspection = tflite_export.inspect(blob)
    _, notes = checks.check_file(blob, inspection, "edge_tpu")
    text = "\n".join(notes)
    assert "'x' is float32; inputs and outputs must be int8" in text
    assert "only the three innermost axes may be larger than 1" in text
    assert "not on the Edge TPU, but on the CPU: 2 CAST, 2 GATHER" in text
    _, notes = checks.check_file(blob, inspection, "cmsis_nn")
    assert notes == ("cmsis_nn: not on CMSIS-NN, but on the CPU: 2 CAST, 2 GATHER, 1 QUANTIZE, "
                     "1 RESHAPE",)  # fmt: skip
    with pytest.raises(TargetError, match="one of the targets"):
        checks.check_file(blob, inspection, "toast")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "call", "said"),
    [
        ((3, 4), lambda x: L.Softmax(name="odd")(x),
         r"SOFTMAX: 'odd' reads \(1, 3, 4\); SOFTMAX takes one axis of at most 16,000 values"),
        ((6, 6, 5), lambda x: L.Cropping2D(((0, 1), (0, 0)), name="odd")(x), None),
        ((4, 4, 3), lambda x: L.UpSampling2D(name="odd")(x), "RESIZE_NEAREST_NEIGHBOR: 'odd' has "
         "version 3; the compiler knows RESIZE_NEAREST_NEIGHBOR up to version 2"),
        ((6, 6, 4), lambda x: L.Conv2D(2, 3, dilation_rate=(1, 2), name="odd")(x),
         r"CONV_2D: 'odd' has dilations \(2, 1\); both must be the same"),
        ((6,), lambda x: x[:, ::2], "STRIDED_SLICE: 'get_item' "
         r"has strides \[1, 2\]; all must be 1"),
        ((5,), lambda x: keras.ops.mean(x, axis=-1, keepdims=True), r"MEAN: 'mean' averages 5 "
         "channels; MEAN over channels takes a multiple of 4 of them"),
        ((6, 6, 5), lambda x: L.PReLU(name="odd")(x), "PRELU: 'odd' has slopes along more axes"),
        ((6, 6, 4), lambda x: L.Dense(2, name="odd")(L.Flatten()(L.Conv2D(3, 3)(x))), None),
    ],
)  # fmt: skip
def test_limits_of_the_edge_tpu_are_named(
    shape: tuple[int, ...], call: Any, said: str | None
) -> None:
    qat, _ = quantized(shape, call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tflite_export.convert(qat, target="edge_tpu")
    found = [str(w.message) for w in caught if w.category is kqat.TargetWarning]
    assert len(found) == (said is not None)
    if said:
        assert re.search(f"leaves to the CPU: .*{said}", found[0]), found[0]


def test_a_depthwise_layer_that_multiplies_channels_is_noted() -> None:
    def call(x: Any) -> Any:
        return L.DepthwiseConv2D(3, depth_multiplier=2, name="two")(L.DepthwiseConv2D(3)(x))

    blob = tflite_export.convert(quantized((6, 6, 2), call)[0])
    _, notes = checks.check_file(blob, tflite_export.inspect(blob), "cmsis_nn")
    assert len(notes) == 1 and "'two' has more output than input channels" in notes[0]


@pytest.mark.skipif(not VELA, reason="needs the extra ethos-u")
def test_the_report_has_what_vela_says(net: tuple[keras.Model, np.ndarray]) -> None:
    qat, x = net
    with pytest.warns(kqat.TargetWarning, match="'odd'"):
        blob = tflite_export.convert(qat, target="ethos_u55")
    report = tflite_export.verify(
        qat, blob, x, runtimes=["litert_reference"], samples=4, target="ethos_u55"
    )
    assert report.estimate is not None
    assert [f.operator for f in report.estimate.fallbacks] == ["CAST", "GATHER"]
    assert "on the CPU: CAST 'odd/wide': Unsupported opType" in str(report)
    assert f"{report.estimate.cycles:,}" in report.to_html()


def test_vela_missing_is_a_note(
    net: tuple[keras.Model, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    blob = tflite_export.convert(net[0])
    found, notes = checks.check_file(blob, tflite_export.inspect(blob), "ethos_u55")
    assert found is None and "Expected Vela to be installed" in notes[0]


def test_the_op_table_and_the_targets_know_the_same() -> None:
    assert set(KERNELS) <= set(OP_TABLE)
    assert not set(TABLE_OPS) & set(KERNELS)
