"""Values of more axes than a kernel takes are reshaped around it, and compute the same."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from kqat.devices import MOST_BROADCAST_AXES

FIVE, SIX, SEVEN = (2, 3, 2, 4), (2, 3, 2, 2, 4), (2, 1, 3, 2, 2, 4)
CASES: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "slice": (FIVE, lambda x: x[:, :1, ..., 1::2]),
    "slice_of_six": (SIX, lambda x: x[:, :, 1:, :, 0]),
    "crop": (FIVE, lambda x: L.Cropping3D(((0, 1), (1, 0), (0, 0)))(x)),
    "windows": (SIX, lambda x: ops.transpose(x, (0, 1, 3, 2, 4, 5))),
    "reversed": (SEVEN, lambda x: ops.transpose(x, (0, 6, 5, 4, 3, 2, 1))),
    "prelu_of_channels": (FIVE, lambda x: slopes(x, [1, 2, 3])),
    "prelu_of_places": (SIX, lambda x: slopes(x, None)),
    "prelu_of_some": (FIVE, lambda x: slopes(x, [3, 4])),
    "prelu_of_every_other": (FIVE, lambda x: slopes(x, [1, 3])),
    "unit": (SIX, lambda x: L.UnitNormalization()(x)),
    "matmul": (SIX, lambda x: ops.matmul(x, ops.swapaxes(x, -1, -2))),
    "where": (FIVE, lambda x: ops.where(x > 0.1, x, -x)),
    "compared": (FIVE, lambda x: ops.where(x > x[:, :1, :, :1], x, -x)),
    "largest": (SIX, lambda x: ops.maximum(x, x[:, :1, :, :1])),
    "pad": (FIVE, lambda x: ops.pad(x, [(0, 0), (1, 0), (0, 0), (0, 2), (1, 1)])),
    "pad_of_six": (SIX, lambda x: ops.pad(x, [*[(0, 0)] * 5, (1, 1)])),
}


def slopes(x: Any, shared: Any) -> Any:
    layer = L.PReLU(shared_axes=shared)
    y = layer(x)
    alpha = np.linspace(0.1, 0.6, math.prod(layer.alpha.shape), dtype=np.float32)
    layer.set_weights([alpha.reshape(layer.alpha.shape)])
    return y


@pytest.mark.parametrize("name", CASES)
def test_it_runs_everywhere(name: str) -> None:
    shape, function = CASES[name]
    x = keras.Input(shape)
    model = keras.Model(x, function(x))
    data = np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)
    assert not kqat.plan(model, target="tflite_micro").misfits
    qat = kqat.quantize_model(model, calibration_data=data)
    np.testing.assert_allclose(kqat.strip(qat)(data), model(data), rtol=1e-5, atol=1e-6)
    blob = tflite_export.convert(qat, target="tflite_micro")
    report = tflite_export.verify(
        qat, blob, data[:2], runtimes=("litert_reference", "tflite_micro")
    )
    assert all(part.is_right and part.problem is None for part in report.runtimes)
    assert not report.runtimes[0].unmatched


def test_few_axes_and_float_layers_stay_as_they_are() -> None:
    x = keras.Input(FIVE)
    model = keras.Model(x, L.Permute((4, 3, 2, 1), name="few")(x))
    assert [layer.kind for layer in kqat.plan(model).layers] == ["Permute"]
    model = keras.Model(x, L.ReLU()(L.PReLU(name="left")(x)))
    kinds = [layer.kind for layer in kqat.plan(model, {"left": None}).layers]
    assert "PReLU" in kinds and "Reshape" not in kinds


BROADCAST: dict[str, Callable[[Any, Any], Any]] = {
    "EQUAL": lambda a, b: ops.cast(ops.equal(a, b), "int32"),
    "NOT_EQUAL": lambda a, b: ops.cast(ops.not_equal(a, b), "int32"),
    "GREATER": lambda a, b: ops.cast(a > b, "int32"),
    "GREATER_EQUAL": lambda a, b: ops.cast(a >= b, "int32"),
    "LESS": lambda a, b: ops.cast(a < b, "int32"),
    "LESS_EQUAL": lambda a, b: ops.cast(a <= b, "int32"),
    "SQUARED_DIFFERENCE": lambda a, b: ops.square(a - b),
    "MAXIMUM": ops.maximum,
    "MINIMUM": ops.minimum,
    "SELECT_V2": lambda a, b: ops.where(b > 0.0, a, -a),
}


@pytest.mark.slow
@pytest.mark.parametrize("op", MOST_BROADCAST_AXES)
def test_kernels_broadcast_over_as_many_axes_as_the_table_says(op: str) -> None:
    """Over one more they read values that are repeated, or another kernel computes it."""
    for axes in (MOST_BROADCAST_AXES[op], MOST_BROADCAST_AXES[op] + 1):
        shape = (2, 3, 2, 3, 2)[: axes - 1]
        shapes = shape, tuple(1 if axis % 2 else size for axis, size in enumerate(shape))
        inputs = [keras.Input(one) for one in shapes]
        model = keras.Model(inputs, BROADCAST[op](*inputs))
        draw = np.random.default_rng(0)
        data = [draw.normal(size=(32, *one)).astype(np.float32) for one in shapes]
        blob = tflite_export.convert(kqat.quantize_model(model, calibration_data=data))
        counts = tflite_export.inspect(blob).counts()
        within = axes == MOST_BROADCAST_AXES[op]
        assert (op in counts) == (within or op != "SQUARED_DIFFERENCE")
        assert ("RESHAPE" in counts) == (not within and op != "SQUARED_DIFFERENCE")
        assert "BROADCAST_TO" not in counts


def test_truth_values_that_are_repeated_are_named_where_no_kernel_moves_them() -> None:
    shape, picked = (2, 3, 2, 3, 4), (2, 1, 2, 1, 4)
    inputs = [keras.Input(shape), keras.Input(picked)]
    model = keras.Model(inputs, ops.where(inputs[1] > 0.0, inputs[0], -inputs[0]))
    (misfit,) = kqat.plan(model, target="tflite_micro").misfits
    assert misfit.blocking and misfit.operators == ("GATHER",)
    assert kqat.plan(model, target="litert").misfits == ()
