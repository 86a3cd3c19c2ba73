"""Attention and feature normalization, decomposed: the same values, and gradients that train."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.graph.tracer import rebuild, trace
from kqat.planning.expansion import expand


def _expanded(model: keras.Model) -> keras.Model:
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    return rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")


def _randomized(layer: Any) -> Any:
    generator = np.random.default_rng(1)
    layer.set_weights([generator.normal(size=w.shape) for w in layer.get_weights()])
    return layer


def _model(layer: Any, calls: int = 1) -> keras.Model:
    inputs = keras.Input((6, 8))
    outputs = layer(*[inputs] * calls)
    _randomized(layer)
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize(
    ("layer", "calls"),
    [
        (lambda: layers.LayerNormalization(), 1),
        (lambda: layers.LayerNormalization(scale=False), 1),
        (lambda: layers.LayerNormalization(center=False, scale=False, epsilon=0.1), 1),
        (lambda: layers.RMSNormalization(), 1),
        (lambda: layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"), 1),
        (
            lambda: layers.EinsumDense(
                "abc,cde->abde", (None, 2, 3), bias_axes="de", activation="relu"
            ),
            1,
        ),
        (lambda: layers.EinsumDense("...c,cd->...d", 5), 1),
        (lambda: layers.EinsumDense("abc,cd->adb", (5, 6)), 1),
        (lambda: layers.EinsumDense("abc,bd->adc", (4, 8), bias_axes="d"), 1),
        (lambda: layers.GroupNormalization(4), 1),
        (lambda: layers.GroupQueryAttention(4, 4, 2), 2),
        (lambda: layers.MultiHeadAttention(2, 4), 2),
        (lambda: layers.MultiHeadAttention(3, 4, value_dim=5, use_bias=False, output_shape=7), 3),
        (lambda: layers.MultiHeadAttention(2, 4, dropout=0.5), 2),
        (lambda: layers.MultiHeadAttention(2, 4, sliding_window=2), 2),
        (lambda: layers.MultiHeadAttention(2, 4, value_dim=3, use_gate=True), 2),
        (lambda: layers.GroupQueryAttention(4, 4, 2, use_gate=True, sliding_window=3), 2),
    ],
)
def test_parts_compute_what_the_layer_computes(layer: Callable[[], Any], calls: int) -> None:
    model = _model(layer(), calls)
    x = np.random.default_rng(0).normal(size=(5, 6, 8)).astype(np.float32)
    # Sums run in another order: a few float32 roundings of values near one.
    np.testing.assert_allclose(_expanded(model)(x), model(x), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((4, 6, 8), None), ((4, 6, 8), 2), ((4, 6, 8), (1,)), ((2, 3, 4, 8), (1, 3))],
)
def test_attention_over_any_axes_computes_what_the_layer_computes(shape: Any, axes: Any) -> None:
    inputs = keras.Input(shape)
    layer = layers.MultiHeadAttention(2, 4, attention_axes=axes, name="attention")
    model = keras.Model(inputs, layer(inputs, inputs[..., ::-1]))
    _randomized(layer)
    parts = _expanded(model)
    x = np.random.default_rng(0).normal(size=(5, *shape)).astype(np.float32)
    np.testing.assert_allclose(parts(x), model(x), rtol=2e-4, atol=2e-5)
    assert "attention" in [part.name for part in parts.layers]


def test_masks_over_many_axes_are_refused_by_name() -> None:
    inputs = keras.Input((4, 6, 8))
    layer = layers.MultiHeadAttention(2, 4, attention_axes=2, name="rows")
    mask = np.ones((1, 4, 6, 6), bool)
    model = keras.Model(inputs, layer(inputs, inputs, attention_mask=mask))
    with pytest.raises(kqat.UnsupportedLayerError, match="no masks in attention layer 'rows'"):
        kqat.plan(model)


@pytest.mark.parametrize(
    ("layer", "calls", "message"),
    [
        (layers.LayerNormalization(axis=[1, 2]), 1, "over the last axis in layer 'layer_normal"),
        (layers.EinsumDense("abc,bcd->abd", (6, 5)), 1, "matrix product for each sample in"),
    ],
)
def test_other_forms_are_refused_by_name(layer: Any, calls: int, message: str) -> None:
    with pytest.raises(kqat.UnsupportedLayerError, match=re.escape(message)):
        kqat.plan(_model(layer, calls))


@pytest.mark.slow
def test_a_transformer_block_ships_full_integer() -> None:
    inputs = keras.Input((6, 8), name="tokens")
    x = layers.Dense(16)(inputs)
    normal = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 8)(normal, normal)])
    normal = layers.RMSNormalization()(x)
    x = layers.Add()([x, layers.Dense(16)(layers.Dense(32, activation="gelu")(normal))])
    outputs = layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, outputs)
    x_data = np.random.default_rng(0).normal(size=(64, 6, 8)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x_data)
    qat.compile("adam", "mse")
    before = [w.copy() for w in qat.get_weights()]
    qat.fit(x_data, model.predict(x_data, verbose=0), verbose=0)
    assert all(
        v.trainable is False or not np.array_equal(v, b)
        for v, b in zip(qat.weights, before, strict=True)
        if "bias" not in v.path
    )
    report = tflite_export.verify(qat, tflite_export.convert(qat), x_data)
    assert report.is_full_integer
    for runtime in report.runtimes:
        assert runtime.problem is None
        assert runtime.unmatched == ()
        # One step: kernels round twice where float arithmetic rounds once.
        assert runtime.max_steps <= 1
