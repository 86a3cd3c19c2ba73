"""`keras.ops` nodes and operators on tensors: the same values as layers of the registry."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import kqat
from kqat.expanding import expand
from kqat.operations import OPERATIONS
from kqat.tracing import rebuild, trace

CHANNELS = np.array([0.5, -1.0, 2.0], np.float32)

# Operation of the table -> a function of two (batch, 4, 6, 3) tensors that uses it.
CASES: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda x, y: (x + y) + 3.0 + CHANNELS,
    "Subtract": lambda x, y: (1.0 - x) - y - CHANNELS,
    "Multiply": lambda x, y: x * y * 2.0 * CHANNELS,
    "Divide": lambda x, y: ops.divide(x, 4.0),
    "TrueDivide": lambda x, y: x / 3.0,
    "Negative": lambda x, y: -x,
    "Square": lambda x, y: ops.square(x),
    "Maximum": lambda x, y: ops.maximum(ops.maximum(x, y), 0.0),
    "Minimum": lambda x, y: ops.minimum(x, y),
    "Clip": lambda x, y: ops.clip(x * 4.0, 0, 6),
    "Relu": lambda x, y: ops.relu(x),
    "Relu6": lambda x, y: ops.relu6(x * 4.0),
    "Sigmoid": lambda x, y: ops.sigmoid(x),
    "Tanh": lambda x, y: ops.tanh(x),
    "Silu": lambda x, y: ops.silu(x),
    "HardSilu": lambda x, y: ops.hard_silu(x),
    "HardSigmoid": lambda x, y: ops.hard_sigmoid(x),
    "HardTanh": lambda x, y: ops.hard_tanh(x),
    "LogSigmoid": lambda x, y: ops.log_sigmoid(x),
    "Selu": lambda x, y: ops.selu(x),
    "Softplus": lambda x, y: ops.softplus(x),
    "Softsign": lambda x, y: ops.softsign(x),
    "Exp": lambda x, y: ops.exp(x),
    "Softmax": lambda x, y: ops.softmax(x),
    "LogSoftmax": lambda x, y: ops.log_softmax(x),
    "LeakyRelu": lambda x, y: ops.leaky_relu(x, 0.3),
    "Mean": lambda x, y: ops.mean(x, axis=(1, 2)),
    "Max": lambda x, y: ops.max(x, axis=(1, 2), keepdims=True),
    "Reshape": lambda x, y: ops.reshape(x, (-1, 24, 3)),
    "Squeeze": lambda x, y: ops.squeeze(ops.max(x, axis=(1, 2), keepdims=True), 1),
    "ExpandDims": lambda x, y: ops.expand_dims(x, 1),
    "Transpose": lambda x, y: ops.transpose(x, (0, 2, 1, 3)),
    "Swapaxes": lambda x, y: ops.swapaxes(x, 1, 2),
    "Concatenate": lambda x, y: ops.concatenate([x, y], axis=1),
    "GetItem": lambda x, y: x[:, 1:4:2, ::3, 0:2],
    "Resize": lambda x, y: ops.image.resize(x, (8, 12), interpolation="nearest"),
    "MaxPool": lambda x, y: ops.max_pool(x, 2),
    "AveragePool": lambda x, y: ops.average_pool(x, 2),
}


def _model(function: Callable[[Any, Any], Any]) -> keras.Model:
    x, y = keras.Input((4, 6, 3), name="x"), keras.Input((4, 6, 3), name="y")
    return keras.Model([x, y], function(x, y))


def _data() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=(8, 4, 6, 3)).astype(np.float32) for _ in range(2)]


def test_every_operation_of_the_table_has_a_case() -> None:
    assert set(CASES) == set(OPERATIONS)


@pytest.mark.parametrize("name", CASES)
def test_layers_compute_what_the_operations_compute(name: str) -> None:
    model, data = _model(CASES[name]), _data()
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    assert all(isinstance(node.layer, keras.layers.Layer) for node in graph.nodes)
    layers = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    # The constants are applied in another order: a few float32 roundings.
    np.testing.assert_allclose(layers(data), model(data), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (np.s_[:, 1:3], (2, 6, 3)),
        (np.s_[..., 0], (4, 6)),
        (np.s_[:, -1, :, 1:], (6, 2)),
        (np.s_[:, None, ::2], (1, 2, 6, 3)),
    ],
)
def test_slices_are_numpys(key: Any, shape: tuple[int, ...]) -> None:
    x, _ = _data()
    inputs = keras.Input((4, 6, 3))
    model = keras.Model(inputs, inputs[key])
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    layers = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    assert layers.output.shape[1:] == shape
    np.testing.assert_array_equal(layers(x), x[key])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, y: ops.erf(x), "operation 'erf.*' of type Erf"),
        (lambda x, y: x / y, "division by a constant"),
        (lambda x, y: ops.minimum(x, 0.5), "maximum(x, 0)"),
        (lambda x, y: ops.clip(x, -1, 1), "clip(x, 0, 6)"),
        (lambda x, y: ops.mean(x, axis=1), "all axes between batch and channels"),
        (lambda x, y: x[:, ::-1], "forward slice"),
        (lambda x, y: ops.softmax(x, axis=1), "axis=-1"),
        (lambda x, y: x + ops.max(y, axis=(1, 2)), "equal rank"),
        (lambda x, y: x * np.ones((4, 6, 3), np.float32), "one number per channel"),
    ],
)
def test_what_has_no_integer_form_is_named(function: Any, message: str) -> None:
    model = _model(function)
    with pytest.raises(kqat.UnsupportedLayerError, match=re.escape(message).replace(r"\.\*", ".*")):
        kqat.plan(model)
