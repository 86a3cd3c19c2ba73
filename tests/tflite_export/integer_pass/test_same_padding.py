"""PADs before convolutions: gone where SAME means the same to the convolution, and only there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from tests.tflite_export.small_models import operators, quantized
from tflite_export import flatbuffer
from tflite_export.integer_pass import pipeline
from tflite_export.integer_pass.same_padding import join_padding
from tflite_export.runtimes.execution import RUNTIMES, run

IMAGE = (7, 8, 3)


def joined(x: Any) -> Any:
    """Odd and even sizes, strides, dilation, both kinds of convolutions, two readers."""
    x = L.ZeroPadding2D(0, name="nothing")(L.ZeroPadding2D(1, name="whole")(x))
    a = L.Conv2D(4, 3, name="conv")(x)
    b = L.DepthwiseConv2D(3, name="depthwise")(x)
    a = L.Conv2D(4, 3, 2, name="strided")(L.ZeroPadding2D(((1, 1), (0, 1)), name="half")(a))
    b = L.Conv2D(2, 3, dilation_rate=2, name="dilated")(L.ZeroPadding2D(2, name="wide")(b))
    return [a, b]


def kept(x: Any) -> Any:
    """More, less or elsewhere than SAME would put; another reader; pooling; the model's output."""
    before = L.Conv2D(3, 3, 2, name="before")(L.ZeroPadding2D(1, name="first")(x))
    much = L.Conv2D(3, 3, name="much")(L.ZeroPadding2D(2, name="more")(x))
    pooled = L.ZeroPadding2D(1, name="shared")(L.Activation("tanh")(x))
    pooled = [L.MaxPooling2D(3, 1)(pooled), L.Conv2D(3, 3, name="beside")(pooled)]
    whole = L.ZeroPadding2D(1, name="output")(L.Activation("sigmoid")(x))
    return [before, much, *pooled, whole, L.Conv2D(3, 3, name="last")(whole)]


@pytest.mark.parametrize("policy", ["int8", pytest.param("int16x8", marks=pytest.mark.slow)])
def test_every_runtime_computes_the_same_without(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qat, x = quantized(IMAGE, joined, policy)
    frozen = kqat.freeze(qat)
    without = tflite_export.convert(frozen)
    others = tuple(step for step in pipeline.PASSES if step.run is not join_padding)
    monkeypatch.setattr(pipeline, "PASSES", others)
    whole = tflite_export.convert(frozen)
    assert pads(whole) == 3 and pads(without) == 0
    dtype = np.int16 if policy == "int16x8" else np.int8
    feed = [np.random.default_rng(0).integers(-128, 128, x[:8].shape).astype(dtype)]
    for runtime in RUNTIMES:
        ours, reference = (run(blob, feed, runtime=runtime).outputs for blob in (without, whole))
        for a, b in zip(ours, reference, strict=True):
            np.testing.assert_array_equal(a, b)
    report = tflite_export.verify(frozen, without, x, samples=8, runtimes=RUNTIMES)
    for part in report.runtimes:
        assert part.problem is None and part.unmatched == () and part.max_steps <= 1


@pytest.mark.parametrize(("call", "count"), [(kept, 4), (joined, 0)])
def test_a_pad_that_is_needed_stays(call: Callable[[Any], Any], count: int) -> None:
    qat, _ = quantized(IMAGE, call)
    assert pads(tflite_export.convert(qat)) == count


def test_a_pad_that_is_lost_is_seen() -> None:
    """Verification takes the pad for the convolution's own, and then compares what that makes."""

    def call(x: Any) -> Any:
        return L.Conv2D(4, 3, 2, name="conv")(L.ZeroPadding2D(1, name="pad")(x))

    qat, x = quantized((8, 8, 3), call)
    model = flatbuffer.read(tflite_export.convert(qat))
    pad, conv = model.subgraphs[0].operators
    conv.inputs = [pad.inputs[0], *conv.inputs[1:]]
    conv.builtinOptions.padding = 0  # SAME, which pads these at the end alone
    model.subgraphs[0].operators = [conv]
    (part,) = tflite_export.verify(
        qat, flatbuffer.write(model), x, runtimes=["litert_reference"]
    ).runtimes
    assert not part.is_right and part.max_steps > 1


def pads(blob: bytes) -> int:
    return operators(flatbuffer.read(blob)).count("PAD")
