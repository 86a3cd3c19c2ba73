"""Means of rows: FULLY_CONNECTED where that is as exact on every runtime, MEAN elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from tests.tflite_export.small_models import operators, quantized
from tflite_export import flatbuffer

ROWS = (5, 6)


def normalized(x: Any) -> Any:
    return L.LayerNormalization(name="layer")(x)


def root_mean_square(x: Any) -> Any:
    return L.RMSNormalization(name="rms")(x)


def centered(x: Any) -> Any:
    return x - ops.mean(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(("call", "means"), [(normalized, 3), (root_mean_square, 1), (centered, 1)])
def test_means_of_rows_are_right_on_every_runtime(call: Callable[[Any], Any], means: int) -> None:
    qat, x = quantized(ROWS, call)
    blob = tflite_export.convert(qat)
    assert count(blob, "FULLY_CONNECTED") == means and count(blob, "MEAN") == 0
    for part in tflite_export.verify(qat, blob, x, samples=64).runtimes:
        assert part.problem is None and part.unmatched == ()
        assert part.exact is not None and part.exact.is_exact
        # MEAN has 13 to 25 % of them a step off on the reference kernels.
        dense = part.by_operator()["FULLY_CONNECTED"]
        assert dense.max_steps <= 1 and dense.differing - dense.ties <= 0.02 * dense.elements


@pytest.mark.parametrize("target", ["litert", "ethos_u55"])
@pytest.mark.filterwarnings("ignore::kqat.TargetWarning")
def test_means_are_kept_where_no_micro_kernel_runs_them(target: str) -> None:
    qat, _ = quantized(ROWS, centered)
    blob = tflite_export.convert(qat, target=target)
    assert count(blob, "MEAN") == 1 and count(blob, "FULLY_CONNECTED") == 0


@pytest.mark.parametrize(
    ("call", "policy"),
    [
        (lambda x: L.GlobalAveragePooling1D()(x), "int8"),
        (lambda x: ops.mean(x, axis=-1), "int8"),
        (lambda x: ops.mean(x, axis=(1, 2), keepdims=True), "int8"),
        (centered, "int16x8"),
    ],
)
def test_other_means_stay(call: Callable[[Any], Any], policy: str) -> None:
    qat, _ = quantized(ROWS, call, policy)
    assert count(tflite_export.convert(qat), "MEAN") == 1


def count(blob: bytes, operator: str) -> int:
    return operators(flatbuffer.read(blob)).count(operator)


def test_the_plan_names_both_operators() -> None:
    qat, _ = quantized(ROWS, centered)
    model = kqat.strip(qat)
    ops_of = {op for layer in kqat.plan(model).layers for op in layer.ops}
    assert {"MEAN", "FULLY_CONNECTED"} <= ops_of
