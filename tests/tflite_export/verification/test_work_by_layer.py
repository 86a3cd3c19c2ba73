"""The report's work for each layer: what the layer does, by hand, and in sum the file's."""

import json
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from tflite_export import Report
from tflite_export.verification.node_data import node_data


def conv1d() -> keras.Model:
    x = keras.Input((16, 3), name="x")
    y = L.Conv1D(4, 3, activation="relu", name="first")(x)  # 14 x 4 of 3 x 3
    y = L.Conv1D(6, 3, padding="causal", dilation_rate=2, name="dilated")(y)  # 14 x 6 of 3 x 4
    y = L.SeparableConv1D(5, 3, strides=2, name="separable")(y)  # 6 x 6 of 3, 6 x 5 of 6
    return keras.Model(x, L.Dense(2, name="last")(L.Flatten()(y)))


def depthwise() -> keras.Model:
    x = keras.Input((8, 8, 3), name="x")
    y = L.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)  # 6 x 6 x 6 of 9
    y = L.Conv2D(4, 1, name="pointwise")(y)  # 6 x 6 x 4 of 6
    y = L.Conv2DTranspose(2, 3, strides=2, name="wider")(y)  # each of 6 x 6 x 4 into 9 x 2
    y = L.Conv2D(4, 3, groups=2, name="grouped")(y)  # 11 x 11 x 4 of 9 x 1
    return keras.Model(x, L.Dense(2, name="last")(L.GlobalAveragePooling2D()(y)))


def transformer() -> keras.Model:
    x = keras.Input((6, 8), name="x")
    y = L.MultiHeadAttention(2, 4, name="attention")(x, x)
    y = L.Dense(12, activation="gelu", name="up")(L.Add(name="sum")([x, y]))
    return keras.Model(x, L.Dense(2, name="last")(L.Flatten()(y)))


def recurrent() -> keras.Model:
    x = keras.Input((3, 5), name="x")
    return keras.Model(x, L.Dense(2, name="last")(L.LSTM(4, name="lstm")(x)))


FRONT = {"first": None, "dilated": None, "separable": None}
# Network -> policy, and what rows with these in their names do in sum; "" is in all.
CASES: Mapping[str, tuple[Any, Any, Mapping[str, int]]] = {
    "conv1d": (
        conv1d,
        "int8",
        {"first": 504, "dilated": 1008, "separable": 288, "last": 60},
    ),
    "depthwise": (
        depthwise,
        "int8",
        {"depthwise": 1944, "pointwise": 864, "wider": 2592, "grouped": 4356, "last": 8},
    ),
    "transformer": (
        transformer,
        "int8",
        # Four projections of 6 x 8 x 8, and twice 2 heads x 6 x 6 x 4.
        {"attention": 4 * 384 + 2 * 288, "up": 576, "last": 144},
    ),
    # Each of 3 steps has 4 gates of 4 x (5 + 4).
    "recurrent": (recurrent, "int8", {"lstm": 3 * (80 + 64), "last": 8}),
    # The last product of what stays float makes a value that is rounded, and is its row's.
    "float front": (conv1d, FRONT, {"": 180 + 60, "last": 60}),
    "float attention": (
        transformer,
        {"attention": None},
        {"attention": 384, "up": 576, "last": 144},
    ),
}


def verified(make: Any, policy: Any) -> tuple[Report, bytes]:
    keras.utils.set_random_seed(0)
    model = make()
    data = np.random.default_rng(0).normal(size=(32, *model.input_shape[1:])).astype(np.float32)
    qat = kqat.quantize_model(model, policy, calibration_data=data)
    blob = tflite_export.convert(qat)
    return tflite_export.verify(qat, blob, data[:2], runtimes=("litert_reference",)), blob


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "transformer" else pytest.mark.slow) for n in CASES],
)
def test_the_work_is_that_of_each_layer(name: str) -> None:
    make, policy, expected = CASES[name]
    report, blob = verified(make, policy)
    inspection = tflite_export.inspect(blob)
    assert sum(row.macs for row in report.layers) == report.macs == inspection.macs > 0
    assert sum(row.constant_bytes for row in report.layers) == inspection.constant_bytes
    for layer, macs in expected.items():
        found = [row for row in report.layers if layer in row.name and row.grid_share is not None]
        assert sum(row.macs for row in found) == macs, (layer, found)
    # Model Explorer finds nodes by the names of their outputs.
    results = json.loads(node_data(report)["macs"])["results"]
    outputs = {tensor.name for operator in inspection.operators for tensor in operator.outputs}
    assert set(results) <= outputs
    # None of the work of layers that stay float is that of a layer with a grid.
    if name.startswith("float"):
        integer = sum(row.macs for row in report.layers if row.grid_share is not None)
        assert integer == expected.get("", sum(expected.values()))
        assert sum(row.grid_share is None and row.macs > 0 for row in report.layers) >= 3
        assert "no grid here" in report.to_html()
        assert len(str(report).splitlines()) > len(report.layers)
