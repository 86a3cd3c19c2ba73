"""A number that is added to a value, or that the value is subtracted from, is one operator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from tests.tflite_export.small_models import operators, quantized
from tflite_export import flatbuffer

KINDS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any], list[str]]] = {
    "more": ((6, 8), lambda x: x + 1.0, ["ADD"]),
    "less": ((8,), lambda x: ops.relu(x - 0.3), ["ADD"]),
    # All but the number is below a step of the sum.
    "far": ((6, 8), lambda x: 0.01 * x + 100.0, ["MUL", "ADD"]),
    "near": ((6, 8), lambda x: x + 0.001, ["ADD"]),
    "rest": ((3, 4, 5, 6), lambda x: 1.0 - x, ["SUB"]),
    "one number": ((1,), lambda x: 1.0 - ops.tanh(x + 1.0), ["ADD", "TANH", "SUB"]),
    "gate": (
        (8,),
        lambda x: (lambda z: z * x + (1.0 - z) * ops.tanh(x))(ops.sigmoid(x)),
        ["LOGISTIC", "MUL", "SUB", "TANH", "MUL", "ADD"],
    ),
    "image": ((4, 4, 3), lambda x: ops.tanh(x) + 1.0, ["TANH", "DEPTHWISE_CONV_2D"]),
}


@pytest.mark.parametrize("policy", ["int8", pytest.param("int16x8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_runtime_computes_what_was_trained(kind: str, policy: str) -> None:
    shape, call, expected = KINDS[kind]
    qat, x = quantized(shape, call, policy)
    blob = tflite_export.convert(qat)
    assert sorted(operators(flatbuffer.read(blob))) == sorted(expected)
    report = tflite_export.verify(qat, blob, x, samples=16)
    for part in report.runtimes:
        assert part.problem is None and part.is_right, part
        assert part.exact is None or part.exact.is_exact, part
    # What is rounded is what is added: the sum is off by half a step of its own, and of its input.
    model = kqat.strip(qat)
    want, got = (np.asarray(m(x, training=False), np.float64) for m in (model, qat))
    # Measured: 40 dB and more; the rest is room for weights that other versions draw.
    assert 10 * np.log10(np.mean(want**2) / np.mean((got - want) ** 2)) > 30.0


def test_a_number_added_behind_a_kernel_is_still_its_bias() -> None:
    qat, _ = quantized((8,), lambda x: L.Dense(4)(x) + 2.0)
    assert operators(flatbuffer.read(tflite_export.convert(qat))) == ["FULLY_CONNECTED"]
