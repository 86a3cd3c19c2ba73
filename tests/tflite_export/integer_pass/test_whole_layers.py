"""Layers that the converter takes apart ship as one operator each, with their own weights."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keras import layers as L

import tflite_export
from tests.tflite_export.small_models import quantized


def one_filter(x: Any) -> Any:
    """The bias of the first convolution is left behind as an ADD."""
    return L.Conv1D(4, 1)(L.Conv1D(1, 3, padding="causal", activation="relu")(x))


def one_filter_on_images(x: Any) -> Any:
    """The same, and a RESHAPE stands between the ADD and its marker."""
    return L.Conv1DTranspose(4, 1, strides=2)(L.Conv1D(1, 3, activation="relu")(x))


def one_filter_in_rows(x: Any) -> Any:
    """So it does before a Dense, whose input has rows."""
    return L.Dense(3)(L.Conv1D(1, 1)(x))


def one_channel(x: Any) -> Any:
    """A MUL by the kernel, and an ADD of the bias."""
    return L.Add()([x, L.Dense(4, activation="relu")(x)])


def two_offsets(x: Any) -> Any:
    """One DEPTHWISE_CONV_2D and two ADDs."""
    offsets = [[0.5, 1.0, 2.0], [2.0, 1.0, -0.5]]
    return L.Concatenate()([L.Rescaling(0.5, offset=o)(x) for o in offsets])


def two_numbers(x: Any) -> Any:
    """The same with one number each, and one of them clamped."""
    return L.Concatenate()([L.ReLU()(L.Rescaling(0.5, offset=-1.0)(x)), L.Rescaling(0.5, 2.0)(x)])


@pytest.mark.parametrize(
    ("shape", "call", "policy", "ops"),
    [
        ((6, 3), one_filter, "int8", {"CONV_2D": 2, "PAD": 1}),
        ((6, 3), one_filter_on_images, "int8", {"CONV_2D": 1, "TRANSPOSE_CONV": 1}),
        pytest.param(
            (6, 3),
            one_filter_in_rows,
            "int8",
            {"CONV_2D": 1, "FULLY_CONNECTED": 1},
            marks=pytest.mark.slow,
        ),
        ((6, 1), one_channel, "int8", {"FULLY_CONNECTED": 1, "ADD": 1}),
        ((4, 4, 3), two_offsets, "int8", {"DEPTHWISE_CONV_2D": 2, "CONCATENATION": 1}),
        pytest.param(
            (4, 4, 3),
            two_numbers,
            "int8",
            {"DEPTHWISE_CONV_2D": 2, "CONCATENATION": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (6, 1), one_channel, "int16x8", {"FULLY_CONNECTED": 1, "ADD": 1}, marks=pytest.mark.slow
        ),
        pytest.param(
            (6, 1), one_channel, "w4a8", {"FULLY_CONNECTED": 1, "ADD": 1}, marks=pytest.mark.slow
        ),
        pytest.param(
            (6, 3), one_filter, "int16x8", {"CONV_2D": 2, "PAD": 1}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_layer_is_one_operator(
    shape: tuple[int, ...], call: Callable[[Any], Any], policy: str, ops: dict[str, int]
) -> None:
    qat, x = quantized(shape, call, policy)
    blob = tflite_export.convert(qat)
    counts = tflite_export.inspect(blob).counts()
    assert {name: n for name, n in counts.items() if name != "RESHAPE"} == ops
    report = tflite_export.verify(qat, blob, x, runtimes=["litert_reference", "tflite_micro"])
    for part in report.runtimes:
        assert part.problem is None and not part.unmatched
        assert part.max_steps <= (1 if policy != "int16x8" else 2)
        assert all(np.isfinite(output.max_steps) for output in part.outputs)
